// Requests with any options together: whatever else a server does, and however it computes, what is
// sent for one is the same to the last byte.
#include <algorithm>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "tests/integration/live_server.h"
#include "tests/support/patience.h"

namespace mmfree {
namespace {

constexpr int kRequests = 70;
constexpr int kVocabSize = 4096;

class RandomRequest {
 public:
  explicit RandomRequest(uint32_t seed) : random_(seed) {}

  v1::GenerateRequest Make() {
    v1::GenerateRequest request;
    if (OneIn(4)) {
      for (uint32_t n = 1 + Below(30); n > 0; --n) request.mutable_token_ids()->add_ids(AnyId());
    } else {
      const char* const kTexts[] = {"",
                                    "Once",
                                    "Once upon a time there was a king who had a daughter.",
                                    "the wolf and the fox, the wolf and the fox, the wolf",
                                    "In JSON: ",
                                    "na\u00efve \xf0\x9f\x90\xba"};
      request.set_text(kTexts[Below(std::size(kTexts))]);
    }
    SetSampling(request.mutable_sampling());
    if (OneIn(4)) SetConstraint(request.mutable_constraint());
    SetStopping(request.has_constraint(), request.mutable_stopping());
    v1::ResponseOptions* const response = request.mutable_response();
    response->set_return_token_ids(true);
    response->set_logprobs(OneIn(2));
    response->set_prompt_logprobs(OneIn(4));
    response->set_echo(OneIn(4));
    if (response->logprobs() || response->prompt_logprobs()) {
      response->set_top_logprobs(Below(6));
    }
    if (OneIn(2)) response->set_logprob_mode(v1::LOGPROB_MODE_SAMPLING);
    if (OneIn(5)) request.set_candidates(1 + Below(4));
    if (OneIn(5)) request.set_best_of(std::max(request.candidates(), 1u) + Below(4));
    if (OneIn(4)) response->set_return_state(true);
    request.set_priority(static_cast<v1::Priority>(Below(4)));
    if (OneIn(2)) request.set_speculative_tokens(Below(17));
    return request;
  }

 private:
  uint32_t Below(size_t end) { return static_cast<uint32_t>(random_() % end); }
  bool OneIn(uint32_t n) { return Below(n) == 0; }
  float Share() { return static_cast<float>(1 + Below(100)) * 0.01f; }
  int32_t AnyId() { return static_cast<int32_t>(3 + Below(kVocabSize - 3)); }

  void SetSampling(v1::SamplingOptions* sampling) {
    sampling->set_seed(random_());
    sampling->set_temperature(OneIn(4) ? 0.0f : 2.0f * Share());
    if (OneIn(8)) {
      for (int n = 0; n < 40; ++n) sampling->add_allowed_token_ids(AnyId());
    }
    if (OneIn(8)) sampling->add_banned_token_ids(AnyId());
    if (OneIn(6)) (*sampling->mutable_logit_bias())[AnyId()] = 10.0f * Share();
    if (OneIn(4)) sampling->set_repetition_penalty(0.5f + Share());
    if (OneIn(4)) sampling->set_repetition_window(Below(100));
    if (OneIn(4)) sampling->set_frequency_penalty(Share() - 0.5f);
    if (OneIn(4)) sampling->set_presence_penalty(Share() - 0.5f);
    if (OneIn(4)) sampling->set_top_k(Below(200));
    if (OneIn(4)) sampling->set_typical_p(Share());
    if (OneIn(4)) sampling->set_top_p(Share());
    if (OneIn(4)) sampling->set_min_p(0.2f * Share());
  }

  void SetConstraint(v1::Constraint* constraint) {
    switch (Below(3)) {
      case 0:
        constraint->set_regex("([a-z]{1,9} ){1,4}[a-z]+[.!]");
        break;
      case 1:
        constraint->set_grammar("root ::= \"(\" root \")\" root | [a-d]*");
        break;
      default:
        constraint->set_json_schema(
            R"({"properties": {"name": {"type": "string", "maxLength": 9}, "n": {"minimum": 0.5}},
                "required": ["n"]})");
    }
  }

  void SetStopping(bool constrained, v1::StoppingOptions* stopping) {
    stopping->set_max_new_tokens(Below(30));
    if (OneIn(3)) stopping->set_min_new_tokens(Below(stopping->max_new_tokens() + 1));
    for (uint32_t n = OneIn(3) ? 3 : 0; n > 0; --n) {
      const char* const kStops[] = {"e", ".", " the", "and", "\n", ", ", "er", "wolf and"};
      stopping->add_stop_strings(kStops[Below(std::size(kStops))]);
    }
    if (OneIn(4)) stopping->add_stop_token_ids(AnyId());
    stopping->set_ignore_eos(!constrained && OneIn(2));
    stopping->set_include_stop(OneIn(2));
  }

  std::mt19937 random_;
};

// All that must not depend on anything but the request: the events without times, candidate by
// candidate, however they were cut and mixed.
std::string Said(const Generation& generation) {
  struct Candidate {
    std::string text, ids, logprobs, finished;
  };
  std::map<uint32_t, Candidate> candidates;
  std::string echo, prompt_logprobs;
  for (const v1::GenerateResponse& event : generation.events) {
    if (event.has_prompt()) {
      echo += event.prompt().text();
      for (const auto& logprob : event.prompt().logprobs()) {
        prompt_logprobs += logprob.ShortDebugString();
      }
    } else if (event.has_delta()) {
      Candidate& candidate = candidates[event.delta().candidate()];
      candidate.text += event.delta().text();
      for (const int32_t id : event.delta().token_ids()) absl::StrAppend(&candidate.ids, id, " ");
      for (const auto& logprob : event.delta().logprobs()) {
        absl::StrAppend(&candidate.logprobs, logprob.SerializeAsString());
      }
    } else if (event.has_finished()) {
      v1::GenerationFinished finished = event.finished();
      finished.clear_timings();
      finished.mutable_usage()->clear_cached_tokens();
      finished.mutable_state()->clear_body();  // its checksum stays
      candidates[finished.candidate()].finished = finished.ShortDebugString();
    }
  }
  std::string all =
      absl::StrCat(generation.status.error_message(), "\n", echo, "\n", prompt_logprobs);
  for (const auto& [number, candidate] : candidates) {
    absl::StrAppend(&all, "\n", number, ": ", candidate.text, "\n", candidate.ids, "\n",
                    absl::CHexEscape(candidate.logprobs), "\n", candidate.finished);
  }
  return all;
}

class RandomRequestsTest : public LiveServer {};

TEST_F(RandomRequestsTest, SayTheSameAloneTogetherAndOnAnyServer) {
  StartServer();
  std::vector<v1::GenerateRequest> requests;
  std::vector<std::string> alone;
  int finished = 0;
  for (uint32_t seed = 0; seed < kRequests; ++seed) {
    requests.push_back(RandomRequest(seed).Make());
    const Generation generation = Generate(requests.back());
    finished += generation.status.ok() ? 1 : 0;
    alone.push_back(Said(generation));
  }
  EXPECT_GT(finished, kRequests * 9 / 10);
  // Of every `step`th of them.
  const auto expect_the_same = [&](const std::string& how, size_t step) {
    std::vector<std::string> together(requests.size());
    std::vector<std::thread> threads;
    for (size_t first = 0; first < 12; ++first) {
      threads.emplace_back([&, first] {
        for (size_t i = first * step; i < requests.size(); i += 12 * step) {
          together[i] = Said(Generate(requests[i], Patience(absl::Minutes(4))));
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    for (size_t i = 0; i < requests.size(); i += step) {
      EXPECT_EQ(together[i], alone[i])
          << how << ", request " << i << ": " << requests[i].ShortDebugString();
    }
    ExpectIdle();
  };
  expect_the_same("together, with what the cache has of them", 1);
  StartServer({"--cpu_isa=scalar", "--max_sessions=5", "--prefill_chunk=3", "--threads=1",
               "--speculative_tokens=6", "--prefix_cache_mb=0"});
  expect_the_same("scalar, few slots, speculating", 3);
}

}  // namespace
}  // namespace mmfree

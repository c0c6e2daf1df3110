// The fields of GenerateRequest's sampling, constraint, stopping and response.
#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "tests/integration/fields_fixture.h"

namespace mmfree {
namespace {

using ::testing::AllOf;
using ::testing::Each;
using ::testing::Ge;
using ::testing::Ne;
using ::testing::SizeIs;

std::vector<v1::TokenLogprob> Logprobs(const Generation& generation) {
  std::vector<v1::TokenLogprob> all;
  for (const v1::GenerateResponse& event : generation.events) {
    for (const auto& logprob : event.delta().logprobs()) all.push_back(logprob);
  }
  return all;
}

size_t Distinct(const std::vector<int32_t>& ids) {
  return std::set<int32_t>(ids.begin(), ids.end()).size();
}

}  // namespace

Exercises FieldsTest::GenerateSampling() const {
  // A filter that keeps one token makes a draw greedy.
  const auto is_greedy = [this](const auto& set) {
    return [this, set] {
      EXPECT_NE(Ids(Sampled()), Ids(Greedy()));
      EXPECT_EQ(Ids(Sampled(), set), Ids(Greedy()));
    };
  };
  // A penalty makes a greedy output less monotonous.
  const auto is_more_varied = [this](const auto& set) {
    return [this, set] {
      Request request = Greedy();
      request.mutable_stopping()->set_max_new_tokens(60);
      EXPECT_GT(Distinct(Ids(request, set)), Distinct(Ids(request)));
    };
  };
  const auto sampling = [](const auto& set) {
    return [set](Request* r) { set(r->mutable_sampling()); };
  };
  return {
      {"sampling.allowed_token_ids",
       [this] {
         EXPECT_THAT(
             Ids(Sampled(), [](Request* r) { r->mutable_sampling()->add_allowed_token_ids(301); }),
             Each(301));
       }},
      {"sampling.banned_token_ids",
       [this] {
         const int32_t first = Ids(Greedy())[0];
         EXPECT_THAT(
             Ids(Greedy(), [&](Request* r) { r->mutable_sampling()->add_banned_token_ids(first); }),
             Each(Ne(first)));
       }},
      {"sampling.logit_bias",
       [this] {
         EXPECT_THAT(
             Ids(Sampled(),
                 [](Request* r) { (*r->mutable_sampling()->mutable_logit_bias())[777] = 100; }),
             Each(777));
       }},
      {"sampling.repetition_penalty",
       is_more_varied(sampling([](auto* s) { s->set_repetition_penalty(1.5f); }))},
      {"sampling.repetition_window",
       [this] {
         const auto ids = [this](uint32_t window) {
           return Ids(Greedy(), [&](Request* r) {
             r->mutable_stopping()->set_max_new_tokens(60);
             r->mutable_sampling()->set_repetition_penalty(1.5f);
             r->mutable_sampling()->set_repetition_window(window);
           });
         };
         EXPECT_NE(ids(4), ids(64));
         EXPECT_NE(ids(4), ids(0));
       }},
      {"sampling.frequency_penalty",
       is_more_varied(sampling([](auto* s) { s->set_frequency_penalty(1.5f); }))},
      {"sampling.presence_penalty",
       is_more_varied(sampling([](auto* s) { s->set_presence_penalty(2.0f); }))},
      {"sampling.temperature",
       [this] {
         const auto sum = [this](float temperature) {
           double logprobs = 0;
           for (const uint64_t seed : {1, 2, 3, 4}) {
             logprobs += With(Sampled(), [&](Request* r) {
                           r->mutable_sampling()->set_seed(seed);
                           r->mutable_sampling()->set_temperature(temperature);
                           r->mutable_response()->set_logprobs(true);
                         }).finished.cumulative_logprob();
           }
           return logprobs;
         };
         EXPECT_LT(sum(5.0f), sum(1.0f));
         EXPECT_LT(sum(1.0f), sum(0.2f));
       }},
      {"sampling.top_k", is_greedy(sampling([](auto* s) { s->set_top_k(1); }))},
      {"sampling.top_p", is_greedy(sampling([](auto* s) { s->set_top_p(0.0f); }))},
      {"sampling.min_p", is_greedy(sampling([](auto* s) { s->set_min_p(1.0f); }))},
      {"sampling.typical_p",
       [this] {
         // One token is left, whatever the seed.
         const auto ids = [this](uint64_t seed) {
           return Ids(Sampled(), [&](Request* r) {
             r->mutable_sampling()->set_seed(seed);
             r->mutable_sampling()->set_typical_p(1e-6f);
           });
         };
         EXPECT_EQ(ids(1), ids(2));
       }},
      {"sampling.seed",
       [this] {
         const auto set = [](Request* r) { r->mutable_sampling()->set_seed(4); };
         EXPECT_NE(Ids(Sampled(), set), Ids(Sampled()));
         EXPECT_EQ(Ids(Sampled(), set), Ids(Sampled(), set));
         EXPECT_EQ(With(Sampled(), set).started.seed(), 4u);
       }},
  };
}

Exercises FieldsTest::GenerateStopping() const {
  // The output is `expected`, and complete.
  const auto constrains = [this](const std::function<void(v1::Constraint*)>& set,
                                 const std::string& expected) {
    return [this, set, expected] {
      const auto constrain = [&](Request* r) {
        r->mutable_stopping()->set_ignore_eos(false);
        set(r->mutable_constraint());
      };
      EXPECT_EQ(With(Sampled(), constrain).text, expected);
      EXPECT_EQ(With(Sampled(), constrain).finished.finish_reason(), v1::FINISH_REASON_EOS);
    };
  };
  const auto stopping = [](const auto& set) {
    return [set](Request* r) { set(r->mutable_stopping()); };
  };
  return {
      {"constraint.json_schema",
       constrains([](auto* c) { c->set_json_schema("{\"const\": [1]}"); }, "[1]")},
      {"constraint.regex", constrains([](auto* c) { c->set_regex("x{7}"); }, "xxxxxxx")},
      {"constraint.grammar",
       constrains([](auto* c) { c->set_grammar("root ::= \"a\" b\nb ::= \"b\""); }, "ab")},
      {"stopping.max_new_tokens",
       [=, this] {
         EXPECT_THAT(Ids(Sampled(), stopping([](auto* s) { s->set_max_new_tokens(5); })),
                     SizeIs(5));
       }},
      {"stopping.min_new_tokens",
       [=, this] {
         const int32_t first = Ids(Greedy())[0];
         const auto stop = [first](auto* s) { s->add_stop_token_ids(first); };
         EXPECT_THAT(Ids(Greedy(), stopping(stop)), SizeIs(0));
         EXPECT_THAT(Ids(Greedy(), stopping([&](auto* s) {
                           stop(s);
                           s->set_min_new_tokens(9);
                         })),
                     SizeIs(Ge(9u)));
       }},
      {"stopping.stop_strings",
       [=, this] {
         const std::string whole = With(Sampled()).text;
         const std::string stop = whole.substr(20, 4);
         const Generation stopped =
             With(Sampled(), stopping([&](auto* s) { s->add_stop_strings(stop); }));
         EXPECT_EQ(stopped.text, whole.substr(0, whole.find(stop)));
         EXPECT_EQ(stopped.finished.stop_string(), stop);
       }},
      {"stopping.stop_token_ids",
       [=, this] {
         const std::vector<int32_t> whole = Ids(Sampled());
         const Generation stopped =
             With(Sampled(), stopping([&](auto* s) { s->add_stop_token_ids(whole[10]); }));
         EXPECT_EQ(stopped.finished.stop_token_id(), whole[10]);
         EXPECT_LE(stopped.token_ids.size(), 10u);
       }},
      {"stopping.ignore_eos",
       [=, this] {
         const auto eos = [](bool ignore) {
           return [ignore](Request* r) {
             (*r->mutable_sampling()->mutable_logit_bias())[2] = 100;
             r->mutable_stopping()->set_ignore_eos(ignore);
           };
         };
         EXPECT_THAT(Ids(Sampled(), eos(false)), SizeIs(0));
         EXPECT_THAT(Ids(Sampled(), eos(true)), AllOf(SizeIs(24), Each(2)));
       }},
      {"stopping.include_stop",
       [=, this] {
         const auto text = [&](bool include) {
           return With(Sampled(), stopping([&](auto* s) {
                         s->add_stop_strings("e");
                         s->set_include_stop(include);
                       }))
               .text;
         };
         EXPECT_EQ(text(true), text(false) + "e");
       }},
  };
}

Exercises FieldsTest::GenerateResponse() const {
  const auto response = [](const auto& set) {
    return [set](Request* r) { set(r->mutable_response()); };
  };
  return {
      {"response.logprobs",
       [=, this] {
         EXPECT_THAT(Logprobs(With(Sampled())), SizeIs(0));
         EXPECT_THAT(Logprobs(With(Sampled(), response([](auto* o) { o->set_logprobs(true); }))),
                     SizeIs(24));
       }},
      {"response.top_logprobs",
       [=, this] {
         const auto logprobs = Logprobs(With(Sampled(), response([](auto* o) {
                                               o->set_logprobs(true);
                                               o->set_top_logprobs(7);
                                             })));
         for (const v1::TokenLogprob& logprob : logprobs) EXPECT_EQ(logprob.top_size(), 7);
       }},
      {"response.logprob_mode",
       [=, this] {
         const auto logprobs = Logprobs(With(Greedy(), response([](auto* o) {
                                               o->set_logprobs(true);
                                               o->set_logprob_mode(v1::LOGPROB_MODE_SAMPLING);
                                             })));
         for (const v1::TokenLogprob& logprob : logprobs) EXPECT_EQ(logprob.logprob(), 0.0f);
       }},
      {"response.prompt_logprobs",
       [=, this] {
         const Generation generation =
             With(Sampled(), response([](auto* o) { o->set_prompt_logprobs(true); }));
         int64_t tokens = 0;
         for (const auto& event : generation.events) tokens += event.prompt().logprobs_size();
         EXPECT_EQ(tokens, generation.started.prompt_tokens());
       }},
      {"response.echo",
       [=, this] {
         std::string echo;
         for (const auto& event :
              With(Sampled(), response([](auto* o) { o->set_echo(true); })).events) {
           echo += event.prompt().text();
         }
         EXPECT_EQ(echo, kText);
       }},
      {"response.return_token_ids",
       [=, this] {
         const Generation without =
             With(Sampled(), response([](auto* o) { o->set_return_token_ids(false); }));
         EXPECT_THAT(without.token_ids, SizeIs(0));
         EXPECT_EQ(without.text, With(Sampled()).text);
       }},
      {"response.return_state",
       [=, this] {
         EXPECT_FALSE(With(Sampled()).finished.has_state());
         EXPECT_GT(State().body().size(), 12'000u);
       }},
      {"response.state_dtype",
       [=, this] {
         const Generation half = With(Sampled(), response([](auto* o) {
                                        o->set_return_state(true);
                                        o->set_state_dtype(v1::STATE_DTYPE_F16);
                                      }));
         EXPECT_LT(half.finished.state().body().size(), State().body().size() * 6 / 10);
       }},
  };
}

}  // namespace mmfree

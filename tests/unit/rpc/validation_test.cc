#include "server/rpc/validation.h"

#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "google/rpc/error_details.pb.h"
#include "gtest/gtest.h"
#include "tests/support/status_is.h"

namespace mmfree {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

ModelConfig Config() {
  ModelConfig config;
  config.vocab_size = 100;
  config.eos_token_id = 2;
  return config;
}

std::vector<std::string> Fields(const absl::Status& status) {
  std::vector<std::string> fields;
  const auto payload = status.GetPayload("type.googleapis.com/google.rpc.BadRequest");
  google::rpc::BadRequest detail;
  if (payload.has_value() && detail.ParseFromString(std::string(*payload))) {
    for (const auto& violation : detail.field_violations()) fields.push_back(violation.field());
  }
  return fields;
}

struct Case {
  std::string field;
  std::function<void(v1::GenerateRequest*)> set;
};

v1::GenerateRequest ValidRequest() {
  v1::GenerateRequest request;
  request.set_text("Once");
  return request;
}

class GenerateViolation : public testing::TestWithParam<Case> {};

TEST_P(GenerateViolation, IsRefusedByName) {
  v1::GenerateRequest request = ValidRequest();
  GetParam().set(&request);
  const absl::Status status = ValidateGenerate(request, Config(), {});
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(GetParam().field)));
  EXPECT_THAT(Fields(status), ElementsAre(GetParam().field));
}

std::string CaseName(const testing::TestParamInfo<Case>& info) {
  std::string name;
  for (const char c : info.param.field) name += std::isalnum(c) != 0 ? c : '_';
  return name + "_" + std::to_string(info.index);
}

using R = v1::GenerateRequest;
INSTANTIATE_TEST_SUITE_P(
    Fields, GenerateViolation,
    testing::ValuesIn(std::vector<Case>{
        {"input", [](R* r) { r->clear_text(); }},
        {"request_id", [](R* r) { r->set_request_id(std::string(129, 'x')); }},
        {"request_id", [](R* r) { r->set_request_id("two words"); }},
        {"token_ids", [](R* r) { r->mutable_token_ids(); }},
        {"token_ids.ids[1]",
         [](R* r) {
           r->mutable_token_ids()->add_ids(99);
           r->mutable_token_ids()->add_ids(100);
         }},
        {"token_ids.ids[0]", [](R* r) { r->mutable_token_ids()->add_ids(-1); }},
        {"session_id", [](R* r) { r->set_session_id("a/b"); }},
        {"sampling.temperature", [](R* r) { r->mutable_sampling()->set_temperature(-0.5f); }},
        {"sampling.temperature", [](R* r) { r->mutable_sampling()->set_temperature(kNan); }},
        {"sampling.temperature", [](R* r) { r->mutable_sampling()->set_temperature(kInfinity); }},
        {"sampling.temperature", [](R* r) { r->mutable_sampling()->set_temperature(-kInfinity); }},
        {"sampling.temperature", [](R* r) { r->mutable_sampling()->set_temperature(1e-30f); }},
        {"sampling.temperature", [](R* r) { r->mutable_sampling()->set_temperature(101.0f); }},
        {"sampling.top_p", [](R* r) { r->mutable_sampling()->set_top_p(1.5f); }},
        {"sampling.top_p", [](R* r) { r->mutable_sampling()->set_top_p(kNan); }},
        {"sampling.min_p", [](R* r) { r->mutable_sampling()->set_min_p(-0.1f); }},
        {"sampling.typical_p", [](R* r) { r->mutable_sampling()->set_typical_p(0.0f); }},
        {"sampling.repetition_penalty",
         [](R* r) { r->mutable_sampling()->set_repetition_penalty(0.0f); }},
        {"sampling.repetition_window",
         [](R* r) { r->mutable_sampling()->set_repetition_window(1025); }},
        {"sampling.frequency_penalty",
         [](R* r) { r->mutable_sampling()->set_frequency_penalty(2.5f); }},
        {"sampling.presence_penalty",
         [](R* r) { r->mutable_sampling()->set_presence_penalty(kNan); }},
        {"sampling.logit_bias[100]",
         [](R* r) { (*r->mutable_sampling()->mutable_logit_bias())[100] = 1.0f; }},
        {"sampling.logit_bias[5]",
         [](R* r) { (*r->mutable_sampling()->mutable_logit_bias())[5] = kInfinity; }},
        {"sampling.allowed_token_ids[0]",
         [](R* r) { r->mutable_sampling()->add_allowed_token_ids(100); }},
        {"sampling.banned_token_ids[0]",
         [](R* r) { r->mutable_sampling()->add_banned_token_ids(-7); }},
        {"constraint.kind", [](R* r) { r->mutable_constraint(); }},
        {"constraint", [](R* r) { r->mutable_constraint()->set_regex(std::string(65'537, 'a')); }},
        {"stopping.ignore_eos",
         [](R* r) {
           r->mutable_constraint()->set_regex("a+");
           r->mutable_stopping()->set_ignore_eos(true);
         }},
        {"stopping.max_new_tokens",
         [](R* r) { r->mutable_stopping()->set_max_new_tokens(4'000'000'000u); }},
        {"stopping.min_new_tokens",
         [](R* r) {
           r->mutable_stopping()->set_max_new_tokens(3);
           r->mutable_stopping()->set_min_new_tokens(4);
         }},
        {"stopping.stop_strings[0]", [](R* r) { r->mutable_stopping()->add_stop_strings(""); }},
        {"stopping.stop_strings[0]",
         [](R* r) { r->mutable_stopping()->add_stop_strings(std::string(1025, 'x')); }},
        {"stopping.stop_strings",
         [](R* r) {
           for (int i = 0; i < 65; ++i) r->mutable_stopping()->add_stop_strings("x");
         }},
        {"stopping.stop_token_ids",
         [](R* r) {
           for (int i = 0; i < 64; ++i) r->mutable_stopping()->add_stop_token_ids(i);
         }},
        {"stopping.stop_token_ids[1]",
         [](R* r) {
           r->mutable_stopping()->add_stop_token_ids(3);
           r->mutable_stopping()->add_stop_token_ids(100);
         }},
        {"response.top_logprobs",
         [](R* r) {
           r->mutable_response()->set_logprobs(true);
           r->mutable_response()->set_top_logprobs(21);
         }},
        {"response.top_logprobs", [](R* r) { r->mutable_response()->set_top_logprobs(2); }},
        {"response.logprob_mode",
         [](R* r) { r->mutable_response()->set_logprob_mode(static_cast<v1::LogprobMode>(9)); }},
        {"expected_turn", [](R* r) { r->set_expected_turn(0); }},
        {"response.state_dtype",
         [](R* r) { r->mutable_response()->set_state_dtype(v1::STATE_DTYPE_F16); }},
        {"response.state_dtype",
         [](R* r) { r->mutable_response()->set_state_dtype(static_cast<v1::StateDtype>(9)); }},
        {"candidates", [](R* r) { r->set_candidates(0); }},
        {"candidates", [](R* r) { r->set_candidates(65); }},
        {"best_of", [](R* r) { r->set_best_of(0); }},
        {"best_of", [](R* r) { r->set_best_of(65); }},
        {"best_of",
         [](R* r) {
           r->set_candidates(3);
           r->set_best_of(2);
         }},
        {"best_of",
         [](R* r) {
           r->set_session_id("s");
           r->set_best_of(2);
         }},
        {"best_of",
         [](R* r) {
           r->mutable_stopping()->set_max_new_tokens(4097);
           r->set_best_of(64);
         }},
        {"best_of",
         [](R* r) {
           r->mutable_response()->set_logprobs(true);
           r->mutable_response()->set_top_logprobs(15);
           r->mutable_stopping()->set_max_new_tokens(257);
           r->set_best_of(64);
         }},
        {"priority", [](R* r) { r->set_priority(static_cast<v1::Priority>(9)); }},
        {"cache_salt", [](R* r) { r->set_cache_salt(std::string(129, 's')); }},
        {"speculative_tokens", [](R* r) { r->set_speculative_tokens(17); }},
    }),
    CaseName);

TEST(ValidateGenerate, AcceptsEveryFieldAtItsDefault) {
  v1::GenerateRequest request = ValidRequest();
  v1::SamplingOptions* sampling = request.mutable_sampling();
  sampling->set_temperature(0.0f);
  sampling->set_top_k(0);
  sampling->set_top_p(1.0f);
  sampling->set_min_p(0.0f);
  sampling->set_typical_p(1.0f);
  sampling->set_repetition_penalty(1.0f);
  sampling->set_repetition_window(64);
  sampling->set_frequency_penalty(0.0f);
  sampling->set_presence_penalty(0.0f);
  sampling->set_seed(0);
  request.mutable_stopping()->set_max_new_tokens(0);
  request.mutable_stopping()->set_min_new_tokens(0);
  request.mutable_response()->set_top_logprobs(0);
  request.mutable_response()->set_logprob_mode(v1::LOGPROB_MODE_MODEL);
  request.set_candidates(1);
  request.set_best_of(1);
  request.set_priority(v1::PRIORITY_NORMAL);
  request.set_speculative_tokens(0);
  EXPECT_THAT(ValidateGenerate(request, Config(), {}), IsOk());
}

TEST(ValidateGenerate, AcceptsTheEndsOfEveryRange) {
  v1::GenerateRequest request = ValidRequest();
  v1::SamplingOptions* sampling = request.mutable_sampling();
  for (const bool low : {true, false}) {
    sampling->set_temperature(low ? 1e-6f : 100.0f);
    sampling->set_top_k(low ? 1 : std::numeric_limits<uint32_t>::max());
    sampling->set_top_p(low ? 0.0f : 1.0f);
    sampling->set_min_p(low ? 0.0f : 1.0f);
    sampling->set_typical_p(low ? 1e-30f : 1.0f);
    sampling->set_repetition_penalty(low ? 1e-30f : 10.0f);
    sampling->set_repetition_window(low ? 0 : 1024);
    sampling->set_frequency_penalty(low ? -2.0f : 2.0f);
    sampling->set_presence_penalty(low ? -2.0f : 2.0f);
    (*sampling->mutable_logit_bias())[low ? 0 : 99] = low ? -100.0f : 100.0f;
    EXPECT_THAT(ValidateGenerate(request, Config(), {}), IsOk());
  }
}

TEST(ValidateGenerate, TopKOfTheWholeVocabularyFiltersNothing) {
  v1::GenerateRequest request = ValidRequest();
  request.mutable_sampling()->set_top_k(100);
  EXPECT_THAT(ValidateGenerate(request, Config(), {}), IsOk());
}

TEST(ValidateGenerate, EmptyTextIsAnInput) {
  v1::GenerateRequest request;
  request.set_text("");
  EXPECT_THAT(ValidateGenerate(request, Config(), {}), IsOk());
}

TEST(ValidateGenerate, NamesTheLimitThatIsExceeded) {
  RequestLimits limits;
  limits.max_new_tokens = 10;
  limits.default_max_new_tokens = 5;
  limits.max_prompt_tokens = 3;
  v1::GenerateRequest request;
  for (int i = 0; i < 4; ++i) request.mutable_token_ids()->add_ids(i);
  EXPECT_THAT(ValidateGenerate(request, Config(), limits),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("--max_prompt_tokens")));
  request = ValidRequest();
  request.mutable_stopping()->set_max_new_tokens(11);
  EXPECT_THAT(ValidateGenerate(request, Config(), limits),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("--max_new_tokens")));
}

TEST(ValidateGenerate, EveryViolationIsReported) {
  v1::GenerateRequest request = ValidRequest();
  request.mutable_sampling()->set_temperature(-1.0f);
  request.mutable_sampling()->set_top_p(2.0f);
  request.set_candidates(0);
  const absl::Status status = ValidateGenerate(request, Config(), {});
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("is -1")));
  EXPECT_THAT(Fields(status), ElementsAre("sampling.temperature", "sampling.top_p", "candidates"));
}

TEST(ValidateGenerate, SomethingMustBeLeftToChooseFrom) {
  ModelConfig config = Config();
  config.vocab_size = 4;
  v1::GenerateRequest request = ValidRequest();
  const auto fields = [&] { return Fields(ValidateGenerate(request, config, {})); };
  for (const int id : {0, 1, 3}) request.mutable_sampling()->add_banned_token_ids(id);
  EXPECT_THAT(fields(), IsEmpty());
  request.mutable_sampling()->add_banned_token_ids(2);
  EXPECT_THAT(fields(), ElementsAre("sampling.banned_token_ids"));
  request.mutable_sampling()->clear_banned_token_ids();
  request.mutable_sampling()->add_allowed_token_ids(3);
  EXPECT_THAT(fields(), IsEmpty());
  request.mutable_sampling()->add_banned_token_ids(3);
  EXPECT_THAT(fields(), ElementsAre("sampling.banned_token_ids"));
}

TEST(ValidateGenerate, SomethingMustBeLeftToChooseFromBeforeMinNewTokens) {
  ModelConfig config = Config();
  config.vocab_size = 4;
  v1::GenerateRequest request = ValidRequest();
  const auto fields = [&] { return Fields(ValidateGenerate(request, config, {})); };
  request.mutable_stopping()->set_min_new_tokens(1);
  for (const int id : {0, 1, 3}) request.mutable_stopping()->add_stop_token_ids(id);
  EXPECT_THAT(fields(), ElementsAre("stopping.min_new_tokens"));
  request.mutable_stopping()->set_ignore_eos(true);  // EOS, id 2, is left
  EXPECT_THAT(fields(), IsEmpty());
  request.mutable_sampling()->add_banned_token_ids(2);
  EXPECT_THAT(fields(), ElementsAre("stopping.min_new_tokens"));
  request.mutable_stopping()->set_min_new_tokens(0);
  EXPECT_THAT(fields(), IsEmpty());
}

TEST(ValidateScore, ChecksEveryInput) {
  v1::ScoreRequest request;
  EXPECT_THAT(Fields(ValidateScore(request, Config(), {})), ElementsAre("inputs"));
  request.add_inputs()->set_text("");
  EXPECT_THAT(ValidateScore(request, Config(), {}), IsOk());
  request.add_inputs();
  request.add_inputs()->mutable_token_ids();
  request.add_inputs()->mutable_token_ids()->add_ids(100);
  EXPECT_THAT(Fields(ValidateScore(request, Config(), {})),
              ElementsAre("inputs[1]", "inputs[2].token_ids", "inputs[3].token_ids.ids[0]"));
  for (int i = 0; i < 100; ++i) request.add_inputs()->set_text("x");
  EXPECT_THAT(Fields(ValidateScore(request, Config(), {})), SizeIs(4));
}

TEST(ValidateTokenize, BosContradictsContinuation) {
  v1::TokenizeRequest request;
  request.set_continuation(true);
  EXPECT_THAT(ValidateTokenize(request), IsOk());
  request.set_bos(false);
  EXPECT_THAT(ValidateTokenize(request), IsOk());
  request.set_bos(true);
  EXPECT_THAT(Fields(ValidateTokenize(request)), ElementsAre("bos"));
}

TEST(ValidateDetokenize, IdsAreOfTheVocabulary) {
  v1::DetokenizeRequest request;
  EXPECT_THAT(ValidateDetokenize(request, Config()), IsOk());
  request.add_token_ids(0);
  request.add_token_ids(100);
  EXPECT_THAT(Fields(ValidateDetokenize(request, Config())), ElementsAre("token_ids[1]"));
}

}  // namespace
}  // namespace mmfree

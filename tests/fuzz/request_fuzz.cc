// Any bytes as a request: parsed, validated, converted, and what it asks for done on any logits.
#include <google/protobuf/stubs/logging.h>

#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "mmfree/v1/inference.pb.h"
#include "mmfree/v1/session.pb.h"
#include "server/rpc/conversion.h"
#include "server/rpc/validation.h"
#include "server/sessions/checkpoint.h"
#include "tests/fuzz/fuzz_target.h"
#include "tests/unit/rpc/fake_engine.h"

namespace mmfree {
namespace {

constexpr int kSteps = 8;

RequestLimits Limits() {
  RequestLimits limits;
  limits.max_prompt_tokens = 500;
  return limits;
}

// Any bit patterns: ordinary values, infinities, NaNs, denormal ones.
std::vector<float> AnyLogits(std::mt19937* random) {
  std::vector<float> logits(FakeEngine::kVocabSize);
  const uint32_t kind = (*random)() % 4;
  for (float& logit : logits) {
    const uint32_t bits = (*random)();
    memcpy(&logit, &bits, sizeof(logit));
    if (kind != 0) logit = static_cast<float>(static_cast<int32_t>(bits) % 1000) * 0.01f;
  }
  return logits;
}

void Draw(const v1::GenerateRequest& proto, GenerationRequest request, uint32_t seed) {
  std::mt19937 random(seed);
  const FakeTokenizer tokenizer;
  OutputText text(&tokenizer, StartsText(tokenizer, request.prompt),
                  ToTextOptions(proto.stopping()));
  request.sampling.banned = absl::MakeConstSpan(request.stop_token_ids);
  for (int step = 0; step < kSteps; ++step) {
    int32_t token = static_cast<int32_t>(random() % FakeEngine::kVocabSize);
    if (request.sampler != nullptr) {
      const SampledToken sampled = request.sampler->Sample(
          AnyLogits(&random), request.sampling, request.prompt.size() + static_cast<size_t>(step));
      token = sampled.token;
      MMFREE_FUZZ_CHECK(token >= -1 && token < FakeEngine::kVocabSize);
      if (token < 0) return;
      for (const int32_t banned : proto.sampling().banned_token_ids()) {
        MMFREE_FUZZ_CHECK(token != banned);
      }
      MMFREE_FUZZ_CHECK(!(sampled.logprob > 0.0f));
      MMFREE_FUZZ_CHECK((sampled.top != nullptr) ==
                        (proto.response().logprobs() && proto.response().top_logprobs() > 0));
      request.sampler->Append(token);
      MMFREE_FUZZ_CHECK(!request.sampler->dead() || proto.has_constraint());
    }
    text.Append(token);
  }
  text.Finish();
}

void CheckGenerate(const std::string& bytes, uint32_t seed) {
  v1::GenerateRequest request;
  if (!request.ParseFromString(bytes)) return;
  const FakeEngine engine;
  if (!ValidateGenerate(request, engine.model().config(), Limits()).ok()) return;
  absl::StatusOr<GenerationRequest> converted = ToGenerationRequest(request, engine, Limits());
  if (converted.ok()) Draw(request, *std::move(converted), seed);
}

void CheckScore(const std::string& bytes) {
  v1::ScoreRequest request;
  if (!request.ParseFromString(bytes)) return;
  const FakeEngine engine;
  if (!ValidateScore(request, engine.model().config(), Limits()).ok()) return;
  for (int i = 0; i < request.inputs_size(); ++i) {
    const absl::StatusOr<ScoreRequest> converted = ToScoreRequest(request, i, engine, Limits());
    if (converted.ok()) MMFREE_FUZZ_CHECK(!converted->tokens.empty());
  }
}

// One whose checksum is right, or no change would be looked at.
void CheckCheckpoint(const std::string& body) {
  v1::SessionCheckpoint checkpoint;
  checkpoint.set_format_version(1);
  checkpoint.set_body(body);
  checkpoint.set_checksum(CheckpointChecksum(body));
  const ModelShape shape = {.digest = std::string(64, 'f'), .state_floats = 8, .vocab_size = 259};
  const absl::StatusOr<SessionState> state = DecodeCheckpoint(checkpoint, shape, SessionKey());
  if (!state.ok()) return;
  MMFREE_FUZZ_CHECK(state->state.empty() || state->state.size() == 8);
  MMFREE_FUZZ_CHECK(state->token_count >= 0);
}

template <typename Request, typename Validate>
void CheckValidation(const std::string& bytes, Validate validate) {
  Request request;
  if (request.ParseFromString(bytes)) (void)validate(request);
}

v1::GenerateRequest FullRequest() {
  v1::GenerateRequest request;
  request.set_request_id("r");
  request.set_text("Once upon a time");
  v1::SamplingOptions* const sampling = request.mutable_sampling();
  sampling->set_temperature(0.8f);
  sampling->set_top_k(40);
  sampling->set_top_p(0.9f);
  sampling->set_min_p(0.01f);
  sampling->set_typical_p(0.95f);
  sampling->set_repetition_penalty(1.2f);
  sampling->set_repetition_window(16);
  sampling->set_frequency_penalty(-0.5f);
  sampling->set_presence_penalty(0.5f);
  sampling->set_seed(7);
  (*sampling->mutable_logit_bias())[70] = 3.0f;
  sampling->add_banned_token_ids(71);
  v1::StoppingOptions* const stopping = request.mutable_stopping();
  stopping->set_max_new_tokens(9);
  stopping->set_min_new_tokens(2);
  stopping->add_stop_strings("ab");
  stopping->add_stop_token_ids(72);
  request.mutable_response()->set_logprobs(true);
  request.mutable_response()->set_top_logprobs(3);
  request.mutable_response()->set_logprob_mode(v1::LOGPROB_MODE_SAMPLING);
  request.set_candidates(2);
  request.set_best_of(3);
  request.set_speculative_tokens(0);
  return request;
}

}  // namespace

std::vector<std::string> FuzzSeeds() {
  const auto seed = [](int kind, const std::string& bytes) {
    return std::string({static_cast<char>(kind), '\1'}) + bytes;
  };
  v1::GenerateRequest constrained;
  constrained.mutable_token_ids()->add_ids(70);
  constrained.mutable_constraint()->set_json_schema(R"({"type": "integer"})");
  v1::ScoreRequest score;
  score.add_inputs()->set_text("Once");
  score.add_inputs()->mutable_token_ids()->add_ids(3);
  v1::TokenizeRequest tokenize;
  tokenize.set_text("Once");
  tokenize.set_bos(true);
  v1::DetokenizeRequest detokenize;
  detokenize.add_token_ids(3);
  v1::CreateSessionRequest create;
  create.set_text("Once");
  create.mutable_ttl()->set_seconds(1);
  v1::SessionCheckpointBody body;
  body.set_model_digest(std::string(64, 'f'));
  body.set_dtype(v1::STATE_DTYPE_F32);
  body.set_token_count(3);
  body.add_pending_token_ids(70);
  body.add_last_token_ids(71);
  body.set_payload(std::string(32, '\0'));
  return {seed(0, FullRequest().SerializeAsString()), seed(0, constrained.SerializeAsString()),
          seed(1, score.SerializeAsString()),         seed(2, tokenize.SerializeAsString()),
          seed(3, detokenize.SerializeAsString()),    seed(4, create.SerializeAsString()),
          seed(5, body.SerializeAsString())};
}

}  // namespace mmfree

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* input, size_t size) {
  using namespace mmfree;  // NOLINT(google-build-using-namespace)
  // What does not parse is not worth a line each.
  static const auto log = google::protobuf::SetLogHandler(nullptr);
  (void)log;
  FuzzInput in(input, size);
  const uint8_t kind = in.Byte();
  const uint32_t seed = in.Byte();
  const std::string bytes = in.Rest();
  const FakeModel model(FakeEngine::kVocabSize);
  switch (kind % 6) {
    case 0:
      CheckGenerate(bytes, seed);
      break;
    case 1:
      CheckScore(bytes);
      break;
    case 2:
      CheckValidation<v1::TokenizeRequest>(bytes, ValidateTokenize);
      break;
    case 3:
      CheckValidation<v1::DetokenizeRequest>(
          bytes, [&](const auto& r) { return ValidateDetokenize(r, model.config()); });
      break;
    case 4:
      CheckValidation<v1::CreateSessionRequest>(
          bytes, [&](const auto& r) { return ValidateCreateSession(r, model.config(), Limits()); });
      break;
    case 5:
      CheckCheckpoint(bytes);
      break;
  }
  return 0;
}

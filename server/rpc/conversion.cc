#include "server/rpc/conversion.h"

#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "server/base/random.h"
#include "server/base/status_macros.h"
#include "server/rpc/status.h"
#include "server/sampling/dead_end.h"
#include "server/scheduler/retry_after.h"

namespace mmfree {
namespace {

constexpr float kDefaultTemperature = 1.0f;
constexpr absl::Duration kUnavailableRetryDelay = absl::Seconds(1);

// With the error's field.
absl::StatusOr<std::shared_ptr<CompiledConstraint>> CompileConstraint(
    const v1::Constraint& constraint, ConstraintCache* cache) {
  using Kind = ConstraintCache::Kind;
  const auto compile =
      [&](Kind kind,
          const std::string& text) -> absl::StatusOr<std::shared_ptr<CompiledConstraint>> {
    absl::StatusOr<std::shared_ptr<CompiledConstraint>> compiled = cache->Compile(kind, text);
    if (compiled.ok()) return compiled;
    return FieldError(compiled.status().code(),
                      {{ConstraintField(constraint), std::string(compiled.status().message())}});
  };
  switch (constraint.kind_case()) {
    case v1::Constraint::kRegex:
      return compile(Kind::kRegex, constraint.regex());
    case v1::Constraint::kGrammar:
      return compile(Kind::kGrammar, constraint.grammar());
    case v1::Constraint::kJsonSchema:
      return compile(Kind::kJsonSchema, constraint.json_schema());
    case v1::Constraint::KIND_NOT_SET:
      break;
  }
  return nullptr;
}

FieldViolation ToViolation(Exclusion exclusion, absl::string_view constraint_field) {
  switch (exclusion) {
    case Exclusion::kConstraint:
      return {std::string(constraint_field), "no token is left to choose from at this point"};
    case Exclusion::kBounds:
      return {std::string(constraint_field),
              "can be read in too many ways at this point to know which tokens can follow"};
    case Exclusion::kAllowedIds:
      return {"sampling.allowed_token_ids", "has none of the tokens that can follow"};
    case Exclusion::kBannedIds:
      return {"sampling.banned_token_ids", "has all the tokens that can follow"};
    case Exclusion::kStopTokens:
      return {"stopping.stop_token_ids", "has all the tokens that can follow"};
  }
  return {};
}

RequestSampler::Options ToSamplerOptions(const v1::GenerateRequest& request) {
  const v1::SamplingOptions& sampling = request.sampling();
  const v1::ResponseOptions& response = request.response();
  RequestSampler::Options out;
  out.allowed.assign(sampling.allowed_token_ids().begin(), sampling.allowed_token_ids().end());
  out.banned.assign(sampling.banned_token_ids().begin(), sampling.banned_token_ids().end());
  for (const auto& [id, bias] : sampling.logit_bias()) {
    if (bias != 0.0f) out.bias.emplace_back(id, bias);
  }
  if (sampling.has_repetition_penalty()) out.penalties.repetition = sampling.repetition_penalty();
  if (sampling.has_repetition_window()) {
    out.penalties.repetition_window = sampling.repetition_window();
  }
  out.penalties.frequency = sampling.frequency_penalty();
  out.penalties.presence = sampling.presence_penalty();
  out.filters.top_k = sampling.top_k();
  if (sampling.has_typical_p()) out.filters.typical_p = sampling.typical_p();
  if (sampling.has_top_p()) out.filters.top_p = sampling.top_p();
  out.filters.min_p = sampling.min_p();
  if (!response.logprobs() && !request.has_best_of()) {
    out.logprobs = RequestSampler::Logprobs::kNone;
  } else if (response.logprob_mode() == v1::LOGPROB_MODE_SAMPLING) {
    out.logprobs = RequestSampler::Logprobs::kSampling;
  }
  if (response.logprobs()) out.top_logprobs = static_cast<int>(response.top_logprobs());
  return out;
}

Priority ToPriority(v1::Priority priority) {
  switch (priority) {
    case v1::PRIORITY_LOW:
      return Priority::kLow;
    case v1::PRIORITY_HIGH:
      return Priority::kHigh;
    default:
      return Priority::kNormal;
  }
}

absl::StatusOr<std::vector<int32_t>> Encode(const Tokenizer& tokenizer, absl::string_view text,
                                            bool continuation, absl::string_view field,
                                            int64_t max_tokens) {
  absl::StatusOr<std::vector<int32_t>> ids =
      tokenizer.Encode(text, {.bos = !continuation, .continuation = continuation});
  if (!ids.ok()) {
    if (absl::IsInvalidArgument(ids.status())) return InvalidField(field, ids.status().message());
    return ids.status();
  }
  if (static_cast<int64_t>(ids->size()) > max_tokens) {
    return InvalidField(field, absl::StrCat("is ", ids->size(), " tokens, more than the limit of ",
                                            max_tokens, " (--max_prompt_tokens)"));
  }
  return ids;
}

// What samples within rows.
void SetInnerSampling(const v1::GenerateRequest& request, const RequestLimits& limits,
                      const SessionState& context, GenerationRequest* out) {
  if (out->prompt_logprobs) {
    out->prompt_top_logprobs = static_cast<int>(request.response().top_logprobs());
  }
  out->speculative_tokens =
      static_cast<int32_t>(request.has_speculative_tokens() ? request.speculative_tokens()
                                                            : limits.default_speculative_tokens);
  if (out->speculative_tokens > 0) out->lookup_context = context.last_tokens;
}

}  // namespace

absl::StatusOr<std::vector<int32_t>> EncodeInput(const Tokenizer& tokenizer, absl::string_view text,
                                                 absl::string_view field, int64_t max_tokens) {
  absl::StatusOr<std::vector<int32_t>> ids =
      Encode(tokenizer, text, /*continuation=*/false, field, max_tokens);
  // A tokenizer that adds no BOS gives nothing for an empty text, and there is no "next token"
  // after nothing.
  if (ids.ok() && ids->empty()) {
    return InvalidField(field, "gives no tokens with this model's tokenizer");
  }
  return ids;
}

OutputText::Options ToTextOptions(const v1::StoppingOptions& stopping) {
  OutputText::Options out;
  out.include_stop = stopping.include_stop();
  out.min_tokens = stopping.min_new_tokens();
  if (stopping.stop_strings_size() > 0) {
    out.stop_strings = std::make_shared<const StopStrings>(
        std::vector<std::string>(stopping.stop_strings().begin(), stopping.stop_strings().end()));
  }
  return out;
}

absl::StatusOr<GenerationRequest> ToGenerationRequest(const v1::GenerateRequest& request,
                                                      const Engine& engine,
                                                      const RequestLimits& limits,
                                                      const SessionState& context) {
  GenerationRequest out;
  out.request_id = RequestIdOr(request.request_id());
  out.prompt = context.pending;
  if (request.has_token_ids()) {
    out.prompt.insert(out.prompt.end(), request.token_ids().ids().begin(),
                      request.token_ids().ids().end());
  } else if (context.context_tokens() == 0) {
    MMFREE_ASSIGN_OR_RETURN(out.prompt, EncodeInput(engine.tokenizer(), request.text(), "text",
                                                    limits.max_prompt_tokens));
  } else if (request.has_text()) {
    MMFREE_ASSIGN_OR_RETURN(const std::vector<int32_t> ids,
                            Encode(engine.tokenizer(), request.text(), /*continuation=*/true,
                                   "text", limits.max_prompt_tokens));
    out.prompt.insert(out.prompt.end(), ids.begin(), ids.end());
  }
  if (out.prompt.empty()) {
    return InvalidField(
        "input",
        "the last turn was ended by a stop string, a stop or an end-of-sequence token, "
        "so there is no token left to go on from: give text or token_ids");
  }
  const v1::SamplingOptions& sampling = request.sampling();
  out.sampling.temperature =
      sampling.has_temperature() ? sampling.temperature() : kDefaultTemperature;
  out.sampling.seed = sampling.has_seed() ? sampling.seed() : SystemRandomBits() >> 11;
  out.priority = ToPriority(request.priority());
  out.cache_salt = request.cache_salt();
  const v1::StoppingOptions& stopping = request.stopping();
  out.max_new_tokens =
      stopping.has_max_new_tokens() ? stopping.max_new_tokens() : limits.default_max_new_tokens;
  out.min_new_tokens = stopping.min_new_tokens();
  if (!stopping.ignore_eos()) out.eos_token_ids = {engine.model().config().eos_token_id};
  out.prompt_logprobs = request.response().prompt_logprobs();
  SetInnerSampling(request, limits, context, &out);
  out.stop_token_ids.assign(stopping.stop_token_ids().begin(), stopping.stop_token_ids().end());
  RequestSampler::Options sampler = ToSamplerOptions(request);
  MMFREE_ASSIGN_OR_RETURN(sampler.constraint,
                          CompileConstraint(request.constraint(), engine.constraints()));
  if (sampler.constraint != nullptr) {
    sampler.starts_text = context.token_count == 0 && StartsText(engine.tokenizer(), out.prompt);
    sampler.end_tokens = out.eos_token_ids;
    sampler.end_tokens.insert(sampler.end_tokens.end(), out.stop_token_ids.begin(),
                              out.stop_token_ids.end());
  }
  if (!sampler.plain()) {
    std::vector<int32_t> before = context.last_tokens;
    before.insert(before.end(), out.prompt.begin(), out.prompt.end());
    out.sampler =
        std::make_shared<RequestSampler>(sampler, engine.model().config().vocab_size, before);
  }
  return out;
}

absl::StatusOr<ScoreRequest> ToScoreRequest(const v1::ScoreRequest& request, int index,
                                            const Engine& engine, const RequestLimits& limits) {
  const v1::ScoreInput& input = request.inputs(index);
  ScoreRequest out;
  out.request_id = RequestIdOr(request.request_id());
  out.last_logits = request.last_logits();
  out.priority = ToPriority(request.priority());
  if (input.has_token_ids()) {
    out.tokens.assign(input.token_ids().ids().begin(), input.token_ids().ids().end());
  } else {
    MMFREE_ASSIGN_OR_RETURN(out.tokens, EncodeInput(engine.tokenizer(), input.text(),
                                                    absl::StrCat("inputs[", index, "].text"),
                                                    limits.max_prompt_tokens));
  }
  return out;
}

void ToProto(absl::Duration duration, google::protobuf::Duration* out) {
  // The range of google.protobuf.Duration; an infinite estimate becomes its end.
  constexpr absl::Duration kMax = absl::Seconds(315'576'000'000);
  if (duration > kMax) duration = kMax;
  if (duration < -kMax) duration = -kMax;
  const int64_t seconds = absl::ToInt64Seconds(duration);
  out->set_seconds(seconds);
  out->set_nanos(static_cast<int32_t>(absl::ToInt64Nanoseconds(duration - absl::Seconds(seconds))));
}

void ToProto(const Timings& timings, v1::Timings* out) {
  ToProto(timings.queued, out->mutable_queued());
  ToProto(timings.prefill, out->mutable_prefill());
  ToProto(timings.decode, out->mutable_decode());
}

void ToProto(const Usage& usage, v1::Usage* out) {
  out->set_prompt_tokens(usage.prompt_tokens);
  out->set_cached_tokens(usage.cached_tokens);
  out->set_completion_tokens(usage.completion_tokens);
}

void ToProto(const GenerationResult& result, v1::GenerationFinished* out) {
  switch (result.reason) {
    case FinishReason::kEos:
      out->set_finish_reason(v1::FINISH_REASON_EOS);
      out->set_stop_token_id(result.matched_stop_token);
      break;
    case FinishReason::kLength:
      out->set_finish_reason(v1::FINISH_REASON_LENGTH);
      break;
    case FinishReason::kStopToken:
      out->set_finish_reason(v1::FINISH_REASON_STOP_TOKEN);
      out->set_stop_token_id(result.matched_stop_token);
      break;
    case FinishReason::kStopString:
      out->set_finish_reason(v1::FINISH_REASON_STOP_STRING);
      break;
  }
  ToProto(result.usage, out->mutable_usage());
  ToProto(result.timings, out->mutable_timings());
}

void ToProto(const SampledToken& token, v1::TokenLogprob* out) {
  out->set_token_id(token.token);
  out->set_logprob(token.logprob);
  if (token.top == nullptr) return;
  for (const TokenAlternative& alternative : *token.top) {
    v1::TokenLogprob::Alternative* const top = out->add_top();
    top->set_token_id(alternative.token);
    top->set_logprob(alternative.logprob);
  }
}

std::string RequestIdOr(absl::string_view request_id) {
  if (!request_id.empty()) return std::string(request_id);
  return absl::StrFormat("%016x", SystemRandomBits());
}

std::string ConstraintField(const v1::Constraint& constraint) {
  switch (constraint.kind_case()) {
    case v1::Constraint::kRegex:
      return "constraint.regex";
    case v1::Constraint::kGrammar:
      return "constraint.grammar";
    case v1::Constraint::kJsonSchema:
      return "constraint.json_schema";
    case v1::Constraint::KIND_NOT_SET:
      break;
  }
  return "constraint";
}

absl::Status WithExcludingFields(absl::Status status, absl::string_view constraint_field) {
  const std::vector<Exclusion> exclusions = TakeExclusions(&status);
  if (exclusions.empty()) return status;
  std::vector<FieldViolation> violations;
  for (const Exclusion exclusion : exclusions) {
    violations.push_back(ToViolation(exclusion, constraint_field));
  }
  return FieldError(status.code(), violations);
}

absl::Status WithEngineRetryDelay(absl::Status status, const Engine& engine) {
  const std::optional<absl::Duration> delay = TakeRetryAfter(&status);
  if (absl::IsResourceExhausted(status)) {
    return WithRetryDelay(std::move(status), delay.value_or(engine.load().estimated_wait));
  }
  if (absl::IsUnavailable(status)) {
    return WithRetryDelay(std::move(status), kUnavailableRetryDelay);
  }
  return status;
}

}  // namespace mmfree

#include "server/rpc/validation.h"

#include <algorithm>
#include <cstdint>
#include <string>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "server/backends/backend.h"
#include "server/rpc/model_registry.h"
#include "server/rpc/violations.h"

namespace mmfree {
namespace {

constexpr float kMinTemperature = 1e-6f;
constexpr float kMaxTemperature = 100.0f;

void CheckRequestId(absl::string_view id, Violations* violations) {
  const bool visible = std::all_of(id.begin(), id.end(), [](char c) {
    return absl::ascii_isgraph(static_cast<unsigned char>(c));
  });
  violations->Check(id.size() <= kMaxRequestIdBytes && visible, "request_id",
                    absl::StrCat("must be at most ", kMaxRequestIdBytes,
                                 " visible ASCII characters, is ", Quoted(id)));
}

template <typename Ids>
void CheckTokenIds(absl::string_view field, const Ids& ids, int64_t vocab_size,
                   Violations* violations) {
  for (int i = 0; i < ids.size(); ++i) {
    if (ids[i] >= 0 && ids[i] < vocab_size) continue;
    violations->Add(absl::StrCat(field, "[", i, "]"),
                    absl::StrCat("must be a token id in [0, ", vocab_size, "), is ", ids[i]));
    return;  // one is enough: the rest of a wrong vocabulary would drown the other fields
  }
}

// The ids of an input, given as a message so that "empty" and "absent" differ.
void CheckInputIds(absl::string_view field, const v1::TokenIds& ids, bool may_be_empty,
                   const ModelConfig& config, const RequestLimits& limits, Violations* violations) {
  if (ids.ids().empty() && !may_be_empty) {
    violations->Add(field, "must hold at least one token id");
  } else if (ids.ids_size() > limits.max_prompt_tokens) {
    violations->Add(field, absl::StrCat("has ", ids.ids_size(), " tokens, more than the limit of ",
                                        limits.max_prompt_tokens, " (--max_prompt_tokens)"));
  } else {
    CheckTokenIds(absl::StrCat(field, ".ids"), ids.ids(), config.vocab_size, violations);
  }
}

void CheckInput(const v1::GenerateRequest& request, const ModelConfig& config,
                const RequestLimits& limits, Violations* violations) {
  const bool continues = request.context_case() != v1::GenerateRequest::CONTEXT_NOT_SET;
  switch (request.input_case()) {
    case v1::GenerateRequest::kText:
      break;
    case v1::GenerateRequest::kTokenIds:
      CheckInputIds("token_ids", request.token_ids(), continues, config, limits, violations);
      break;
    case v1::GenerateRequest::INPUT_NOT_SET:
      violations->Check(continues, "input", "set text or token_ids");
      break;
  }
  switch (request.context_case()) {
    case v1::GenerateRequest::kSessionId:
      violations->Check(IsResourceName(request.session_id()), "session_id",
                        "must be 1 to 128 characters of letters, digits, '.', '_', '-'");
      break;
    case v1::GenerateRequest::kState:
    case v1::GenerateRequest::CONTEXT_NOT_SET:
      break;
  }
  violations->Check(!request.has_expected_turn() || request.has_session_id(), "expected_turn",
                    "needs session_id");
}

// What does not go together with a session.
void CheckTurn(const v1::GenerateRequest& request, Violations* violations) {
  const uint32_t candidates = request.has_candidates() ? request.candidates() : 1;
  violations->Check(!request.has_session_id() || candidates == 1, "candidates",
                    "must be 1 with session_id");
  violations->Check(!request.has_session_id() || request.best_of() <= 1, "best_of",
                    "must be 1 with session_id");
}

void CheckSampling(const v1::SamplingOptions& sampling, const ModelConfig& config,
                   Violations* violations) {
  CheckTokenIds("sampling.allowed_token_ids", sampling.allowed_token_ids(), config.vocab_size,
                violations);
  CheckTokenIds("sampling.banned_token_ids", sampling.banned_token_ids(), config.vocab_size,
                violations);

  violations->Check(sampling.logit_bias_size() <= kMaxLogitBias, "sampling.logit_bias",
                    absl::StrCat("must have at most ", kMaxLogitBias, " entries, has ",
                                 sampling.logit_bias_size()));
  for (const auto& [id, bias] : sampling.logit_bias()) {
    const std::string field = absl::StrCat("sampling.logit_bias[", id, "]");
    violations->Check(id >= 0 && id < config.vocab_size, field,
                      absl::StrCat("must be a token id in [0, ", config.vocab_size, ")"));
    violations->CheckRange(field, bias, -100.0f, 100.0f);
    if (violations->invalid()) break;
  }

  if (sampling.has_temperature() && sampling.temperature() != 0.0f) {
    const float temperature = sampling.temperature();
    violations->Check(temperature >= kMinTemperature && temperature <= kMaxTemperature,
                      "sampling.temperature",
                      absl::StrCat("must be 0 (greedy) or in [", kMinTemperature, ", ",
                                   kMaxTemperature, "], is ", temperature));
  }

  const auto check = [&](absl::string_view name, float value, float low, float high) {
    violations->CheckRange(absl::StrCat("sampling.", name), value, low, high);
  };
  const auto check_open = [&](absl::string_view name, bool set, float value, float high) {
    violations->Check(!set || (value > 0.0f && value <= high), absl::StrCat("sampling.", name),
                      absl::StrCat("must be in (0, ", high, "], is ", value));
  };
  check_open("repetition_penalty", sampling.has_repetition_penalty(), sampling.repetition_penalty(),
             10.0f);
  violations->CheckRange<int64_t>("sampling.repetition_window", sampling.repetition_window(), 0,
                                  kMaxPenaltyWindow);
  check("frequency_penalty", sampling.frequency_penalty(), -2.0f, 2.0f);
  check("presence_penalty", sampling.presence_penalty(), -2.0f, 2.0f);
  check_open("typical_p", sampling.has_typical_p(), sampling.typical_p(), 1.0f);
  check("top_p", sampling.top_p(), 0.0f, 1.0f);
  check("min_p", sampling.min_p(), 0.0f, 1.0f);
}

// Allowed less banned ids must leave something, also while end tokens are banned by
// min_new_tokens. Ids are in range.
void CheckChoices(const v1::GenerateRequest& request, const ModelConfig& config,
                  Violations* violations) {
  const v1::SamplingOptions& sampling = request.sampling();
  const v1::StoppingOptions& stopping = request.stopping();
  const absl::flat_hash_set<int32_t> allowed(sampling.allowed_token_ids().begin(),
                                             sampling.allowed_token_ids().end());
  absl::flat_hash_set<int32_t> excluded(sampling.banned_token_ids().begin(),
                                        sampling.banned_token_ids().end());
  const auto left = [&] {
    if (allowed.empty()) return static_cast<int64_t>(excluded.size()) < config.vocab_size;
    return std::any_of(allowed.begin(), allowed.end(),
                       [&excluded](int32_t id) { return !excluded.contains(id); });
  };
  if (!left()) {
    violations->Add("sampling.banned_token_ids", "must leave a token to choose from");
    return;
  }
  if (stopping.min_new_tokens() == 0) return;
  excluded.insert(stopping.stop_token_ids().begin(), stopping.stop_token_ids().end());
  if (!stopping.ignore_eos()) excluded.insert(config.eos_token_id);
  violations->Check(left(), "stopping.min_new_tokens",
                    "needs a token to choose from that does not end the output");
}

void CheckStopping(const v1::StoppingOptions& stopping, const ModelConfig& config,
                   const RequestLimits& limits, Violations* violations) {
  const int64_t max_new_tokens =
      stopping.has_max_new_tokens() ? stopping.max_new_tokens() : limits.default_max_new_tokens;
  violations->Check(max_new_tokens <= limits.max_new_tokens, "stopping.max_new_tokens",
                    absl::StrCat("must be at most ", limits.max_new_tokens,
                                 " (--max_new_tokens), is ", max_new_tokens));
  violations->Check(stopping.min_new_tokens() <= max_new_tokens, "stopping.min_new_tokens",
                    absl::StrCat("must be at most max_new_tokens (", max_new_tokens, "), is ",
                                 stopping.min_new_tokens()));

  violations->Check(stopping.stop_strings_size() <= kMaxStopStrings, "stopping.stop_strings",
                    absl::StrCat("must be at most ", kMaxStopStrings, " strings, are ",
                                 stopping.stop_strings_size()));
  for (int i = 0; i < std::min(stopping.stop_strings_size(), kMaxStopStrings); ++i) {
    const size_t size = stopping.stop_strings(i).size();
    violations->Check(size >= 1 && size <= kMaxStopStringBytes,
                      absl::StrCat("stopping.stop_strings[", i, "]"),
                      absl::StrCat("must be 1 to ", kMaxStopStringBytes, " bytes, is ", size));
  }

  violations->Check(stopping.stop_token_ids_size() <= kMaxStopTokenIds, "stopping.stop_token_ids",
                    absl::StrCat("must be at most ", kMaxStopTokenIds, " ids, are ",
                                 stopping.stop_token_ids_size()));
  CheckTokenIds("stopping.stop_token_ids", stopping.stop_token_ids(), config.vocab_size,
                violations);
}

// What only compiling shows is left to ToGenerationRequest.
void CheckConstraint(const v1::GenerateRequest& request, Violations* violations) {
  const v1::Constraint& constraint = request.constraint();
  violations->Check(constraint.kind_case() != v1::Constraint::KIND_NOT_SET, "constraint.kind",
                    "set json_schema, regex or grammar");
  // At most one of them is set.
  const size_t size =
      constraint.json_schema().size() + constraint.regex().size() + constraint.grammar().size();
  violations->Check(size <= kMaxConstraintBytes, "constraint",
                    absl::StrCat("must be at most ", kMaxConstraintBytes, " bytes, is ", size));
  violations->Check(!request.stopping().ignore_eos(), "stopping.ignore_eos",
                    "must not be set with a constraint, which the end-of-sequence token ends");
}

void CheckResponse(const v1::ResponseOptions& response, Violations* violations) {
  violations->Check(
      response.top_logprobs() <= kMaxTopLogprobs, "response.top_logprobs",
      absl::StrCat("must be at most ", kMaxTopLogprobs, ", is ", response.top_logprobs()));
  violations->Check(
      response.top_logprobs() == 0 || response.logprobs() || response.prompt_logprobs(),
      "response.top_logprobs", "needs logprobs or prompt_logprobs");
  switch (response.logprob_mode()) {
    case v1::LOGPROB_MODE_UNSPECIFIED:
    case v1::LOGPROB_MODE_MODEL:
    case v1::LOGPROB_MODE_SAMPLING:
      break;
    default:
      violations->Add("response.logprob_mode", "must be a value of LogprobMode");
  }
  if (!v1::StateDtype_IsValid(response.state_dtype())) {
    violations->Add("response.state_dtype", "must be a value of StateDtype");
  } else {
    violations->Check(
        response.return_state() || response.state_dtype() == v1::STATE_DTYPE_UNSPECIFIED,
        "response.state_dtype", "needs return_state");
  }
}

void CheckPriority(v1::Priority priority, Violations* violations) {
  switch (priority) {
    case v1::PRIORITY_UNSPECIFIED:
    case v1::PRIORITY_LOW:
    case v1::PRIORITY_NORMAL:
    case v1::PRIORITY_HIGH:
      return;
    default:
      violations->Add("priority", "must be a value of Priority");
  }
}

void CheckCandidates(const v1::GenerateRequest& request, const RequestLimits& limits,
                     Violations* violations) {
  const uint32_t candidates = request.has_candidates() ? request.candidates() : 1;
  violations->CheckRange<int64_t>("candidates", candidates, 1, kMaxCandidates);
  if (!request.has_best_of()) return;
  violations->CheckRange<int64_t>("best_of", request.best_of(), candidates, kMaxCandidates);
  if (request.best_of() <= candidates || request.best_of() > kMaxCandidates) return;
  const v1::StoppingOptions& stopping = request.stopping();
  const int64_t tokens = std::min(
      stopping.has_max_new_tokens() ? stopping.max_new_tokens() : limits.default_max_new_tokens,
      limits.max_new_tokens);
  const int64_t kept = tokens * request.best_of() *
                       (1 + std::min<int64_t>(request.response().top_logprobs(), kMaxTopLogprobs));
  violations->Check(kept <= kMaxBestOfTokens, "best_of",
                    absl::StrCat("times max_new_tokens times (1 + top_logprobs) must be at most ",
                                 kMaxBestOfTokens, ", is ", kept));
}

void CheckCacheSalt(absl::string_view salt, Violations* violations) {
  violations->Check(
      salt.size() <= kMaxCacheSaltBytes, "cache_salt",
      absl::StrCat("must be at most ", kMaxCacheSaltBytes, " bytes, is ", salt.size()));
}

}  // namespace

absl::Status ValidateGenerate(const v1::GenerateRequest& request, const ModelConfig& config,
                              const RequestLimits& limits) {
  Violations violations;
  CheckRequestId(request.request_id(), &violations);
  CheckInput(request, config, limits, &violations);
  CheckTurn(request, &violations);
  CheckSampling(request.sampling(), config, &violations);
  if (request.has_constraint()) CheckConstraint(request, &violations);
  CheckStopping(request.stopping(), config, limits, &violations);
  if (!violations.invalid()) CheckChoices(request, config, &violations);
  CheckResponse(request.response(), &violations);
  CheckCandidates(request, limits, &violations);
  CheckPriority(request.priority(), &violations);
  CheckCacheSalt(request.cache_salt(), &violations);
  violations.Check(request.speculative_tokens() <= kMaxSpeculativeTokens, "speculative_tokens",
                   absl::StrCat("must be at most ", kMaxSpeculativeTokens, ", is ",
                                request.speculative_tokens()));
  return violations.ToStatus();
}

absl::Status ValidateCreateSession(const v1::CreateSessionRequest& request,
                                   const ModelConfig& config, const RequestLimits& limits) {
  Violations violations;
  if (request.has_token_ids()) {
    CheckInputIds("token_ids", request.token_ids(), /*may_be_empty=*/false, config, limits,
                  &violations);
  }
  CheckCacheSalt(request.cache_salt(), &violations);
  return violations.ToStatus();
}

absl::Status ValidateScore(const v1::ScoreRequest& request, const ModelConfig& config,
                           const RequestLimits& limits) {
  Violations violations;
  CheckRequestId(request.request_id(), &violations);
  violations.CheckRange("inputs", request.inputs_size(), 1, kMaxScoreInputs);
  for (int i = 0; i < std::min(request.inputs_size(), kMaxScoreInputs); ++i) {
    const v1::ScoreInput& input = request.inputs(i);
    const std::string field = absl::StrCat("inputs[", i, "]");
    switch (input.input_case()) {
      case v1::ScoreInput::kText:
        break;
      case v1::ScoreInput::kTokenIds:
        CheckInputIds(absl::StrCat(field, ".token_ids"), input.token_ids(), false, config, limits,
                      &violations);
        break;
      case v1::ScoreInput::INPUT_NOT_SET:
        violations.Add(field, "set text or token_ids");
        break;
    }
  }
  CheckPriority(request.priority(), &violations);
  return violations.ToStatus();
}

absl::Status ValidateTokenize(const v1::TokenizeRequest& request) {
  Violations violations;
  violations.Check(!(request.continuation() && request.bos()), "bos",
                   "must not be set with continuation");
  return violations.ToStatus();
}

absl::Status ValidateDetokenize(const v1::DetokenizeRequest& request, const ModelConfig& config) {
  Violations violations;
  CheckTokenIds("token_ids", request.token_ids(), config.vocab_size, &violations);
  return violations.ToStatus();
}

}  // namespace mmfree

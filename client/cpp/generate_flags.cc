#include "client/cpp/generate_flags.h"

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace mmfree {
namespace {

using Ids = std::vector<int32_t>;
using Biases = std::vector<std::pair<int32_t, float>>;

void AddSamplingFlags(v1::SamplingOptions* s, FlagSet* flags) {
  flags->AddHeading("Sampling:");
  flags->AddSetter<float>("temperature", "T", "0 takes the likeliest token (default 1)",
                          [s](float v) { s->set_temperature(v); });
  flags->AddSetter<uint64_t>("seed", "N", "same seed, same text (default: random)",
                             [s](uint64_t v) { s->set_seed(v); });
  flags->AddSetter<uint32_t>("top_k", "K", "keep the K likeliest tokens",
                             [s](uint32_t v) { s->set_top_k(v); });
  flags->AddSetter<float>("top_p", "P", "keep the likeliest tokens up to probability P",
                          [s](float v) { s->set_top_p(v); });
  flags->AddSetter<float>("min_p", "P", "drop tokens below P times the likeliest",
                          [s](float v) { s->set_min_p(v); });
  flags->AddSetter<float>("typical_p", "P", "keep locally typical tokens up to probability P",
                          [s](float v) { s->set_typical_p(v); });
  flags->AddSetter<float>("repetition_penalty", "X", "above 1 discourages repeats",
                          [s](float v) { s->set_repetition_penalty(v); });
  flags->AddSetter<uint32_t>("repetition_window", "N", "tokens it looks back over",
                             [s](uint32_t v) { s->set_repetition_window(v); });
  flags->AddSetter<float>("frequency_penalty", "X", "for each time a token was emitted",
                          [s](float v) { s->set_frequency_penalty(v); });
  flags->AddSetter<float>("presence_penalty", "X", "for a token that was emitted",
                          [s](float v) { s->set_presence_penalty(v); });
  flags->AddSetter<Biases>(
      "logit_bias", "ID:BIAS,...", "added to the logits of tokens",
      [s](const Biases& v) { s->mutable_logit_bias()->insert(v.begin(), v.end()); });
  flags->AddSetter<Ids>("allowed_token_ids", "IDS", "sample only these", [s](const Ids& v) {
    s->mutable_allowed_token_ids()->Add(v.begin(), v.end());
  });
  flags->AddSetter<Ids>("banned_token_ids", "IDS", "never sample these", [s](const Ids& v) {
    s->mutable_banned_token_ids()->Add(v.begin(), v.end());
  });
}

void AddConstraintFlags(v1::GenerateRequest* r, FlagSet* flags) {
  using Text = std::string;
  flags->AddHeading("Constraint, one of:");
  flags->AddSetter<Text>("json_schema", "SCHEMA", "the output is JSON that validates",
                         [r](const Text& v) { r->mutable_constraint()->set_json_schema(v); });
  flags->AddSetter<Text>("regex", "REGEX", "the output matches",
                         [r](const Text& v) { r->mutable_constraint()->set_regex(v); });
  flags->AddSetter<Text>("grammar", "GBNF", "the output is a sentence of the grammar",
                         [r](const Text& v) { r->mutable_constraint()->set_grammar(v); });
}

void AddStoppingFlags(v1::StoppingOptions* s, FlagSet* flags) {
  flags->AddHeading("Stopping:");
  const auto set_max = [s](uint32_t v) { s->set_max_new_tokens(v); };
  flags->AddSetter<uint32_t>("max_tokens", "N", "tokens to make at most (default 256)", set_max);
  flags->AddSetter<uint32_t>("max_new_tokens", "N", "the same", set_max);
  flags->AddSetter<uint32_t>("min_new_tokens", "N", "tokens to make at least",
                             [s](uint32_t v) { s->set_min_new_tokens(v); });
  flags->AddSetter<std::string>("stop_strings", "TEXT", "stop before this text; repeat for more",
                                [s](const std::string& v) { s->add_stop_strings(v); });
  flags->AddSetter<Ids>("stop_token_ids", "IDS", "stop at these tokens", [s](const Ids& v) {
    s->mutable_stop_token_ids()->Add(v.begin(), v.end());
  });
  flags->AddSetter<bool>("ignore_eos", "", "go on after the end-of-sequence token",
                         [s](bool v) { s->set_ignore_eos(v); });
  flags->AddSetter<bool>("include_stop", "", "leave the stop string in the text",
                         [s](bool v) { s->set_include_stop(v); });
}

void AddResponseFlags(v1::ResponseOptions* o, FlagSet* flags) {
  flags->AddHeading("Response (all but --echo need --json):");
  flags->AddSetter<bool>("echo", "", "print the input too", [o](bool v) { o->set_echo(v); });
  flags->AddSetter<bool>("logprobs", "", "log-probability of each token",
                         [o](bool v) { o->set_logprobs(v); });
  flags->AddSetter<uint32_t>("top_logprobs", "N", "likeliest alternatives of each token",
                             [o](uint32_t v) { o->set_top_logprobs(v); });
  flags->AddChoice<v1::LogprobMode>(
      "logprob_mode", {{"model", v1::LOGPROB_MODE_MODEL}, {"sampling", v1::LOGPROB_MODE_SAMPLING}},
      "MODE", "of the model's distribution, or of the one sampled from",
      [o](v1::LogprobMode v) { o->set_logprob_mode(v); });
  flags->AddSetter<bool>("prompt_logprobs", "", "log-probability of each input token",
                         [o](bool v) { o->set_prompt_logprobs(v); });
  flags->AddSetter<bool>("return_state", "", "the state after the turn",
                         [o](bool v) { o->set_return_state(v); });
  flags->AddChoice<v1::StateDtype>(
      "state_dtype",
      {{"f32", v1::STATE_DTYPE_F32}, {"f16", v1::STATE_DTYPE_F16}, {"bf16", v1::STATE_DTYPE_BF16}},
      "TYPE", "number format of that state: f32, f16 or bf16",
      [o](v1::StateDtype v) { o->set_state_dtype(v); });
}

void AddRequestFlags(v1::GenerateRequest* r, FlagSet* flags) {
  using Text = std::string;
  flags->AddHeading("Request:");
  flags->AddSetter<Text>("model", "NAME", "the model (default: the only one)",
                         [r](const Text& v) { r->set_model(v); });
  flags->AddSetter<Text>("request_id", "ID", "name in the server's logs",
                         [r](const Text& v) { r->set_request_id(v); });
  flags->AddSetter<Text>("session", "ID", "continue a session",
                         [r](const Text& v) { r->set_session_id(v); });
  flags->AddSetter<uint64_t>("expected_turn", "N", "fail when the session has moved on from N",
                             [r](uint64_t v) { r->set_expected_turn(v); });
  flags->AddSetter<uint32_t>("candidates", "N",
                             "continuations to make; printed one after the other",
                             [r](uint32_t v) { r->set_candidates(v); });
  flags->AddSetter<uint32_t>("best_of", "N",
                             "make this many, print the likeliest --candidates of them (default 1)",
                             [r](uint32_t v) { r->set_best_of(v); });
  flags->AddChoice<v1::Priority>(
      "priority",
      {{"low", v1::PRIORITY_LOW}, {"normal", v1::PRIORITY_NORMAL}, {"high", v1::PRIORITY_HIGH}},
      "CLASS", "low, normal or high", [r](v1::Priority v) { r->set_priority(v); });
  flags->AddSetter<Text>("cache_salt", "SALT", "share cached prefixes only with this salt",
                         [r](const Text& v) { r->set_cache_salt(v); });
  flags->AddSetter<uint32_t>("speculative_tokens", "N", "tokens to propose and verify a step",
                             [r](uint32_t v) { r->set_speculative_tokens(v); });
}

}  // namespace

void AddGenerateFlags(v1::GenerateRequest* request, FlagSet* flags) {
  AddSamplingFlags(request->mutable_sampling(), flags);
  AddStoppingFlags(request->mutable_stopping(), flags);
  AddConstraintFlags(request, flags);
  AddResponseFlags(request->mutable_response(), flags);
  AddRequestFlags(request, flags);
}

}  // namespace mmfree

#include "client/cpp/json.h"

#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>

#include "absl/strings/ascii.h"
#include "absl/strings/strip.h"
#include "google/protobuf/duration.pb.h"

namespace mmfree {
namespace {

// Objects keep the order of insertion; numbers with a fraction are binary32, so that they print as
// such: 0.1, not 0.10000000149011612.
using Json = nlohmann::basic_json<nlohmann::ordered_map, std::vector, std::string, bool, int64_t,
                                  uint64_t, float>;

template <typename Repeated>
Json Array(const Repeated& values) {
  Json array = Json::array();
  for (const auto& value : values) array.push_back(value);
  return array;
}

float Seconds(const google::protobuf::Duration& duration) {
  return static_cast<float>(static_cast<double>(duration.seconds()) +
                            static_cast<double>(duration.nanos()) * 1e-9);
}

// FINISH_REASON_STOP_TOKEN -> "STOP_TOKEN".
std::string WithoutPrefix(absl::string_view name, absl::string_view prefix) {
  return std::string(absl::StripPrefix(name, prefix));
}

template <typename Repeated>
Json Logprobs(const Repeated& logprobs) {
  Json array = Json::array();
  for (const v1::TokenLogprob& logprob : logprobs) {
    Json entry = {{"token_id", logprob.token_id()}, {"logprob", logprob.logprob()}};
    if (logprob.top_size() > 0) {
      Json& top = entry["top"] = Json::array();
      for (const auto& alternative : logprob.top()) {
        top.push_back({{"token_id", alternative.token_id()}, {"logprob", alternative.logprob()}});
      }
    }
    array.push_back(std::move(entry));
  }
  return array;
}

Json Started(const v1::GenerationStarted& started) {
  return {{"request_id", started.request_id()},
          {"model", started.model()},
          {"prompt_tokens", started.prompt_tokens()},
          {"cached_tokens", started.cached_tokens()},
          {"seed", started.seed()}};
}

Json Prompt(const v1::GenerationPrompt& prompt) {
  Json json = {{"text", prompt.text()}};
  if (prompt.token_ids_size() > 0) json["token_ids"] = Array(prompt.token_ids());
  if (prompt.logprobs_size() > 0) json["logprobs"] = Logprobs(prompt.logprobs());
  return json;
}

Json Delta(const v1::GenerationDelta& delta) {
  Json json = {{"candidate", delta.candidate()}, {"text", delta.text()}};
  if (delta.token_ids_size() > 0) json["token_ids"] = Array(delta.token_ids());
  if (delta.logprobs_size() > 0) json["logprobs"] = Logprobs(delta.logprobs());
  return json;
}

Json Finished(const v1::GenerationFinished& finished) {
  Json json = {{"candidate", finished.candidate()},
               {"finish_reason",
                WithoutPrefix(v1::FinishReason_Name(finished.finish_reason()), "FINISH_REASON_")}};
  if (finished.has_stop_string()) json["stop_string"] = finished.stop_string();
  if (finished.has_stop_token_id()) json["stop_token_id"] = finished.stop_token_id();
  json["usage"] = {{"prompt_tokens", finished.usage().prompt_tokens()},
                   {"cached_tokens", finished.usage().cached_tokens()},
                   {"context_tokens", finished.usage().context_tokens()},
                   {"completion_tokens", finished.usage().completion_tokens()}};
  if (finished.usage().discarded_tokens() > 0) {
    json["usage"]["discarded_tokens"] = finished.usage().discarded_tokens();
  }
  json["timings"] = {{"queued", Seconds(finished.timings().queued())},
                     {"prefill", Seconds(finished.timings().prefill())},
                     {"decode", Seconds(finished.timings().decode())}};
  if (finished.has_cumulative_logprob()) {
    json["cumulative_logprob"] = static_cast<float>(finished.cumulative_logprob());
  }
  if (finished.has_session_turn()) json["session_turn"] = finished.session_turn();
  return json;
}

// Seconds since the Unix epoch, as a whole number: a binary32 would lose them.
Json SessionJson(const v1::Session& session) {
  Json json = {{"id", session.id()},
               {"owner", session.owner()},
               {"model", session.model()},
               {"model_digest", session.model_digest()},
               {"token_count", session.token_count()},
               {"turn", session.turn()},
               {"oldest_turn", session.oldest_turn()},
               {"busy", session.busy()},
               {"tier", WithoutPrefix(v1::SessionTier_Name(session.tier()), "SESSION_TIER_")},
               {"bytes", session.bytes()},
               {"create_time", session.create_time().seconds()},
               {"last_use_time", session.last_use_time().seconds()}};
  if (session.has_expire_time()) json["expire_time"] = session.expire_time().seconds();
  return json;
}

Json ModelJson(const v1::Model& model) {
  return {{"name", model.name()},
          {"digest", model.digest()},
          {"state", WithoutPrefix(v1::ModelState_Name(model.state()), "MODEL_STATE_")},
          {"vocab_size", model.vocab_size()},
          {"hidden_size", model.hidden_size()},
          {"intermediate_size", model.intermediate_size()},
          {"num_layers", model.num_layers()},
          {"parameters", model.parameters()},
          {"weight_bytes", model.weight_bytes()},
          {"state_bytes", model.state_bytes()},
          {"bos_token_id", model.bos_token_id()},
          {"eos_token_id", model.eos_token_id()},
          {"backend", model.backend()},
          {"device", model.device()},
          {"limits",
           {{"max_prompt_tokens", model.limits().max_prompt_tokens()},
            {"max_new_tokens", model.limits().max_new_tokens()},
            {"default_max_new_tokens", model.limits().default_max_new_tokens()},
            {"max_queue", model.limits().max_queue()}}}};
}

}  // namespace

std::string ToJson(const v1::GenerateResponse& event) {
  Json json = Json::object();
  switch (event.event_case()) {
    case v1::GenerateResponse::kStarted:
      json["started"] = Started(event.started());
      break;
    case v1::GenerateResponse::kPrompt:
      json["prompt"] = Prompt(event.prompt());
      break;
    case v1::GenerateResponse::kDelta:
      json["delta"] = Delta(event.delta());
      break;
    case v1::GenerateResponse::kFinished:
      json["finished"] = Finished(event.finished());
      break;
    case v1::GenerateResponse::EVENT_NOT_SET:
      break;  // an event of a newer server
  }
  return json.dump();
}

std::string ToJson(const v1::ScoreResult& result) {
  Json json = {{"token_ids", Array(result.token_ids())},
               {"logprobs", Array(result.logprobs())},
               {"argmax", Array(result.argmax())}};
  if (result.last_logits_size() > 0) json["last_logits"] = Array(result.last_logits());
  return json.dump();
}

std::string ToJson(const v1::TokenizeResponse& response) {
  const Json json = {{"token_ids", Array(response.token_ids())},
                     {"pieces", Array(response.pieces())}};
  return json.dump();
}

std::string ToJson(const v1::DetokenizeResponse& response) {
  const Json json = {{"text", response.text()}};
  return json.dump();
}

std::string ToJson(const v1::Model& model) { return ModelJson(model).dump(); }

std::string ToJson(const v1::ListModelsResponse& response) {
  Json models = Json::array();
  for (const v1::Model& model : response.models()) models.push_back(ModelJson(model));
  const Json json = {{"models", std::move(models)}};
  return json.dump();
}

std::string ToJson(const v1::GetLoadResponse& load) {
  Json json = {{"model", load.model()},
               {"accepting", load.accepting()},
               {"queued", load.queued()},
               {"queued_tokens", load.queued_tokens()},
               {"running", load.running()},
               {"slots_used", load.slots_used()},
               {"slots_total", load.slots_total()},
               {"estimated_wait", Seconds(load.estimated_wait())}};
  if (load.has_paused()) json["paused"] = load.paused();
  if (load.has_preempted()) json["preempted"] = load.preempted();
  if (load.has_tokens_in_flight()) json["tokens_in_flight"] = load.tokens_in_flight();
  if (load.has_step_time()) json["step_time"] = Seconds(load.step_time());
  return json.dump();
}

std::string ToJson(const v1::Session& session) { return SessionJson(session).dump(); }

std::string ToJson(const v1::ListSessionsResponse& response) {
  Json json = {{"sessions", Json::array()}};
  for (const v1::Session& session : response.sessions()) {
    json["sessions"].push_back(SessionJson(session));
  }
  json["next_page_token"] = response.next_page_token();
  return json.dump();
}

std::string HealthJson(const std::string& status) {
  const Json json = {{"status", status}};
  return json.dump();
}

}  // namespace mmfree

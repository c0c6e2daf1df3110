#include "server/base/status_macros.h"
#include "server/rpc/conversion.h"
#include "server/rpc/handlers.h"

namespace mmfree {
namespace {

void Describe(const RpcEnvironment& env, const Engine& engine, v1::Model* out) {
  const Model& model = engine.model();
  const ModelConfig& config = model.config();
  const BackendInfo& backend = engine.backend_info();
  out->set_name(engine.model_name());
  out->set_digest(model.digest());
  // A drain makes an engine unhealthy too, but on purpose.
  out->set_state(env.gate->closed() ? v1::MODEL_STATE_DRAINING
                 : engine.healthy() ? v1::MODEL_STATE_READY
                                    : v1::MODEL_STATE_FAILED);
  out->set_vocab_size(config.vocab_size);
  out->set_hidden_size(config.hidden_size);
  out->set_intermediate_size(config.intermediate_size);
  out->set_num_layers(config.num_layers);
  out->set_parameters(model.parameters());
  out->set_weight_bytes(backend.weight_bytes);
  out->set_state_bytes(backend.state_floats * static_cast<int64_t>(sizeof(float)));
  // What the tokenizer puts in front of a text; config.json may say otherwise, or nothing.
  out->set_bos_token_id(engine.tokenizer().bos_id());
  out->set_eos_token_id(config.eos_token_id);
  out->set_backend(backend.name);
  out->set_device(backend.description);
  v1::ModelLimits* const out_limits = out->mutable_limits();
  out_limits->set_max_prompt_tokens(env.limits.max_prompt_tokens);
  out_limits->set_max_new_tokens(env.limits.max_new_tokens);
  out_limits->set_default_max_new_tokens(env.limits.default_max_new_tokens);
  out_limits->set_max_queue(env.limits.max_queue);
}

}  // namespace

absl::Status HandleListModels(const RpcEnvironment& env, const v1::ListModelsRequest&,
                              v1::ListModelsResponse* response) {
  for (const Engine* engine : env.models->engines()) {
    Describe(env, *engine, response->add_models());
  }
  return absl::OkStatus();
}

absl::Status HandleGetModel(const RpcEnvironment& env, const v1::GetModelRequest& request,
                            v1::GetModelResponse* response) {
  MMFREE_ASSIGN_OR_RETURN(const Engine* const engine, env.models->Find(request.model()));
  Describe(env, *engine, response->mutable_model());
  return absl::OkStatus();
}

absl::Status HandleGetLoad(const RpcEnvironment& env, const v1::GetLoadRequest& request,
                           v1::GetLoadResponse* response) {
  MMFREE_ASSIGN_OR_RETURN(const Engine* const engine, env.models->Find(request.model()));
  const Engine::Load load = engine->load();
  response->set_model(engine->model_name());
  response->set_accepting(engine->healthy() && !env.gate->closed());
  response->set_queued(load.queued);
  response->set_queued_tokens(load.queued_tokens);
  response->set_running(load.running);
  response->set_slots_used(load.slots_used);
  response->set_slots_total(load.slots_total);
  response->set_paused(load.paused);
  response->set_preempted(load.preempted);
  response->set_tokens_in_flight(load.tokens_in_flight);
  ToProto(load.step_time, response->mutable_step_time());
  ToProto(load.estimated_wait, response->mutable_estimated_wait());
  return absl::OkStatus();
}

}  // namespace mmfree

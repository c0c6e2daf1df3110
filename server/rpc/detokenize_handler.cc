#include "server/base/status_macros.h"
#include "server/rpc/handlers.h"
#include "server/rpc/validation.h"

namespace mmfree {

absl::Status HandleDetokenize(const RpcEnvironment& env, const v1::DetokenizeRequest& request,
                              v1::DetokenizeResponse* response) {
  MMFREE_ASSIGN_OR_RETURN(Engine* const engine, env.models->Find(request.model()));
  MMFREE_RETURN_IF_ERROR(ValidateDetokenize(request, engine->model().config()));
  // The decoder that Generate streams through, so that both give the same text: also for ids
  // between the tokenizer's size and a padded vocabulary, which the model may sample and which add
  // nothing.
  StreamDecoder decoder(&engine->tokenizer(), /*starts_text=*/!request.continuation());
  std::string* const text = response->mutable_text();
  for (const int32_t id : request.token_ids()) text->append(decoder.Append(id));
  text->append(decoder.Finish());
  return absl::OkStatus();
}

}  // namespace mmfree

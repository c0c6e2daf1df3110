#include "server/base/status_macros.h"
#include "server/rpc/handlers.h"
#include "server/rpc/status.h"
#include "server/rpc/validation.h"

namespace mmfree {

absl::Status HandleTokenize(const RpcEnvironment& env, const v1::TokenizeRequest& request,
                            v1::TokenizeResponse* response) {
  MMFREE_ASSIGN_OR_RETURN(Engine* const engine, env.models->Find(request.model()));
  MMFREE_RETURN_IF_ERROR(ValidateTokenize(request));
  const Tokenizer& tokenizer = engine->tokenizer();
  const Tokenizer::EncodeOptions options = {.bos = request.has_bos() ? request.bos() : true,
                                            .continuation = request.continuation()};
  absl::StatusOr<std::vector<int32_t>> ids = tokenizer.Encode(request.text(), options);
  if (absl::IsInvalidArgument(ids.status())) return InvalidField("text", ids.status().message());
  MMFREE_RETURN_IF_ERROR(ids.status());
  response->mutable_token_ids()->Add(ids->begin(), ids->end());
  if (request.return_pieces()) {
    for (const int32_t id : *ids) {
      const absl::string_view piece = tokenizer.Piece(id);
      response->add_pieces(piece.data(), piece.size());
    }
  }
  return absl::OkStatus();
}

}  // namespace mmfree

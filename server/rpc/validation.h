// Checks requests before anything is done for them. Every rule of the protos' comments that does
// not need the tokenizer is here.
//
// All violations of a request are reported together: INVALID_ARGUMENT when a value is wrong,
// otherwise UNIMPLEMENTED when a value asks for something this version does not do. No field is
// ignored in silence. A field that is set to its default is always accepted.
//
// Thread-safe.
#ifndef MMFREE_SERVER_RPC_VALIDATION_H_
#define MMFREE_SERVER_RPC_VALIDATION_H_

#include "absl/status/status.h"
#include "mmfree/v1/inference.pb.h"
#include "mmfree/v1/session.pb.h"
#include "server/model/config.h"
#include "server/rpc/limits.h"

namespace mmfree {

absl::Status ValidateGenerate(const v1::GenerateRequest& request, const ModelConfig& config,
                              const RequestLimits& limits);
absl::Status ValidateCreateSession(const v1::CreateSessionRequest& request,
                                   const ModelConfig& config, const RequestLimits& limits);
absl::Status ValidateScore(const v1::ScoreRequest& request, const ModelConfig& config,
                           const RequestLimits& limits);
absl::Status ValidateTokenize(const v1::TokenizeRequest& request);
absl::Status ValidateDetokenize(const v1::DetokenizeRequest& request, const ModelConfig& config);

}  // namespace mmfree

#endif  // MMFREE_SERVER_RPC_VALIDATION_H_

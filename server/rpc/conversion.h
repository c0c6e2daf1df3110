// From validated protos to the scheduler's requests, and back.
#ifndef MMFREE_SERVER_RPC_CONVERSION_H_
#define MMFREE_SERVER_RPC_CONVERSION_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "google/protobuf/duration.pb.h"
#include "mmfree/v1/inference.pb.h"
#include "server/engine/engine.h"
#include "server/rpc/limits.h"
#include "server/rpc/output_text.h"
#include "server/scheduler/request.h"
#include "server/sessions/session.h"

namespace mmfree {

// Texts longer than this are tokenized on the worker pool: a gRPC thread is never held for more
// than a fraction of a millisecond.
inline constexpr size_t kInlineTextBytes = 4096;

// Token ids of a text that starts a context. `field` names the text in errors. INVALID_ARGUMENT
// when there are none or more than `max_tokens`.
absl::StatusOr<std::vector<int32_t>> EncodeInput(const Tokenizer& tokenizer, absl::string_view text,
                                                 absl::string_view field, int64_t max_tokens);

// Compiles the stop strings.
OutputText::Options ToTextOptions(const v1::StoppingOptions& stopping);

// Tokenizes the input, behind the context's pending tokens, and fills in the defaults; the deadline
// and the stop condition are left to the caller. `request` has passed ValidateGenerate.
// INVALID_ARGUMENT: as EncodeInput, and when there is nothing to feed.
absl::StatusOr<GenerationRequest> ToGenerationRequest(const v1::GenerateRequest& request,
                                                      const Engine& engine,
                                                      const RequestLimits& limits,
                                                      const SessionState& context = {});

// Tokenizes one input. `index` is its place in the request, which has passed ValidateScore.
absl::StatusOr<ScoreRequest> ToScoreRequest(const v1::ScoreRequest& request, int index,
                                            const Engine& engine, const RequestLimits& limits);

void ToProto(absl::Duration duration, google::protobuf::Duration* out);
void ToProto(const Timings& timings, v1::Timings* out);
void ToProto(const Usage& usage, v1::Usage* out);
void ToProto(const GenerationResult& result, v1::GenerationFinished* out);
void ToProto(const SampledToken& token, v1::TokenLogprob* out);

// `request_id` when given, otherwise a random one.
std::string RequestIdOr(absl::string_view request_id);

// The field of a request's constraint, as errors name it.
std::string ConstraintField(const v1::Constraint& constraint);

// Gives an engine's error of a draw without choices the fields that left none.
absl::Status WithExcludingFields(absl::Status status, absl::string_view constraint_field);

// Gives an engine's RESOURCE_EXHAUSTED and UNAVAILABLE their RetryInfo.
absl::Status WithEngineRetryDelay(absl::Status status, const Engine& engine);

}  // namespace mmfree

#endif  // MMFREE_SERVER_RPC_CONVERSION_H_

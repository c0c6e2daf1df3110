// Requests that the engine could not admit even if it had nothing else to do.
#ifndef MMFREE_SERVER_RPC_ADMISSIBLE_H_
#define MMFREE_SERVER_RPC_ADMISSIBLE_H_

#include <cstdint>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "server/engine/engine.h"

namespace mmfree {

// INVALID_ARGUMENT for `field`, with the limit: RESOURCE_EXHAUSTED would promise that a retry
// helps.

// `count` requests of the engine, admitted together.
absl::Status CheckAdmissible(const Engine& engine, absl::string_view field, int64_t count);
// One with a prompt of so many tokens.
absl::Status CheckPromptAdmissible(const Engine& engine, absl::string_view field, int64_t tokens);
// Several such, of one RPC: each, and all together. A single one's field has its index appended.
absl::Status CheckPromptsAdmissible(const Engine& engine, absl::string_view field,
                                    absl::Span<const ScoreRequest> prompts);

}  // namespace mmfree

#endif  // MMFREE_SERVER_RPC_ADMISSIBLE_H_

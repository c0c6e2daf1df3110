// What a server accepts in one request.
#ifndef MMFREE_SERVER_RPC_LIMITS_H_
#define MMFREE_SERVER_RPC_LIMITS_H_

#include <cstddef>
#include <cstdint>

namespace mmfree {

struct RequestLimits {
  int64_t max_prompt_tokens = 1'000'000;
  int64_t max_new_tokens = 65'536;
  int64_t default_max_new_tokens = 256;     // what an absent stopping.max_new_tokens means
  uint32_t default_speculative_tokens = 0;  // what an absent speculative_tokens means
  int64_t max_queue = 0;                    // reported by GetModel; the engine enforces it
};

// Fixed by the protocol.
inline constexpr int kMaxRequestIdBytes = 128;
inline constexpr int kMaxStopStrings = 64;
inline constexpr int kMaxStopStringBytes = 1024;
inline constexpr int kMaxStopTokenIds = 63;
inline constexpr int kMaxCandidates = 64;
// best_of * max_new_tokens * (1 + top_logprobs): what is kept until the candidates are ranked, at
// most some 70 bytes for each.
inline constexpr int64_t kMaxBestOfTokens = 262'144;
inline constexpr int kMaxTopLogprobs = 20;
inline constexpr int kMaxScoreInputs = 64;
inline constexpr int kMaxLogitBias = 1024;
inline constexpr int kMaxPenaltyWindow = 1024;
inline constexpr int kMaxSpeculativeTokens = 16;
inline constexpr int kMaxCacheSaltBytes = 128;
inline constexpr size_t kMaxConstraintBytes = 65'536;

}  // namespace mmfree

#endif  // MMFREE_SERVER_RPC_LIMITS_H_

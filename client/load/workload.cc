#include "client/load/workload.h"

#include <algorithm>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"

namespace mmfree {
namespace {

constexpr int64_t kMost = 1'000'000'000;
constexpr int kFirstOrdinaryToken = 3;  // after unknown, BOS and EOS

bool ParseCount(absl::string_view text, int64_t* value) {
  return absl::SimpleAtoi(text, value) && *value >= 1 && *value <= kMost;
}

// Random ordinary tokens.
void AddTokens(int64_t count, int64_t vocab_size, std::mt19937_64& random, v1::TokenIds* out) {
  std::uniform_int_distribution<int32_t> token(kFirstOrdinaryToken,
                                               static_cast<int32_t>(vocab_size - 1));
  for (; count > 0; --count) out->add_ids(token(random));
}

bool Chance(double share, std::mt19937_64& random) {
  return std::uniform_real_distribution<double>(0, 1)(random) < share;
}

}  // namespace

absl::StatusOr<Distribution> Distribution::Parse(absl::string_view text) {
  Distribution distribution;
  absl::string_view rest = text;
  int64_t mean = 0;
  if (absl::ConsumePrefix(&rest, "exp:")) {
    if (ParseCount(rest, &mean)) {
      distribution.kind_ = Kind::kExponential;
      distribution.mean_ = static_cast<double>(mean);
      return distribution;
    }
  } else {
    const std::vector<absl::string_view> ends = absl::StrSplit(text, absl::MaxSplits('-', 1));
    if (ParseCount(ends.front(), &distribution.low_) &&
        ParseCount(ends.back(), &distribution.high_) && distribution.low_ <= distribution.high_) {
      return distribution;
    }
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "\"", text, "\": expected N, LOW-HIGH or exp:MEAN with whole numbers from 1 to ", kMost));
}

int64_t Distribution::Draw(std::mt19937_64& random) const {
  if (kind_ == Kind::kUniform) return std::uniform_int_distribution<int64_t>(low_, high_)(random);
  const double value = std::exponential_distribution<double>(1 / mean_)(random);
  return 1 + static_cast<int64_t>(std::min(value, 20 * mean_));
}

std::string SessionId(int64_t index) { return absl::StrCat("load-", index); }

PlannedRequest PlanRequest(const WorkloadOptions& options, int64_t index) {
  std::seed_seq seeds{static_cast<uint32_t>(options.seed),
                      static_cast<uint32_t>(options.seed >> 32), static_cast<uint32_t>(index),
                      static_cast<uint32_t>(index >> 32)};
  std::mt19937_64 random(seeds);
  PlannedRequest planned;
  v1::GenerateRequest& request = planned.request;
  request.set_model(options.model);
  request.set_request_id(absl::StrCat("load-", options.seed, "-", index));
  std::mt19937_64 of_prefix(options.seed);
  AddTokens(options.shared_prefix, options.vocab_size, of_prefix, request.mutable_token_ids());
  AddTokens(options.prompt_tokens.Draw(random), options.vocab_size, random,
            request.mutable_token_ids());
  if (options.sessions > 0) {
    // A prime, so each is met once before any is again.
    constexpr uint64_t kStride = 2'654'435'761;
    const uint64_t place = static_cast<uint64_t>(index) * kStride + options.seed;
    request.set_session_id(
        SessionId(static_cast<int64_t>(place % static_cast<uint64_t>(options.sessions))));
  }
  const int64_t max_tokens = options.max_tokens.Draw(random);
  request.mutable_stopping()->set_max_new_tokens(static_cast<uint32_t>(max_tokens));
  request.mutable_stopping()->set_ignore_eos(true);
  request.mutable_sampling()->set_temperature(options.temperature);
  request.mutable_sampling()->set_seed(random() >> 11);
  request.mutable_response()->set_return_token_ids(true);
  const double priority = std::uniform_real_distribution<double>(0, 1)(random);
  if (priority < options.high) {
    request.set_priority(v1::PRIORITY_HIGH);
  } else if (priority < options.high + options.low) {
    request.set_priority(v1::PRIORITY_LOW);
  }
  if (Chance(options.cancel, random)) {
    planned.cancel_after = std::uniform_int_distribution<int64_t>(1, max_tokens)(random);
  }
  planned.slow = Chance(options.slow, random);
  return planned;
}

}  // namespace mmfree

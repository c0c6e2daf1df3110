#include "client/load/histogram.h"

#include <algorithm>
#include <cmath>

namespace mmfree {
namespace {

constexpr int kBuckets = 2320;  // 1.01^2320 us is 2.9 hours
constexpr double kGrowth = 1.01;

}  // namespace

Histogram::Histogram() : buckets_(kBuckets, 0) {}

void Histogram::Add(absl::Duration value, int64_t count) {
  const double us = std::max(absl::ToDoubleMicroseconds(value), 1.0);
  const int bucket = static_cast<int>(std::ceil(std::log(us) / std::log(kGrowth)));
  buckets_[std::clamp(bucket, 0, kBuckets - 1)] += count;
  count_ += count;
  max_ = std::max(max_, value);
}

absl::Duration Histogram::Quantile(double quantile) const {
  if (count_ == 0) return absl::ZeroDuration();
  const int64_t rank = static_cast<int64_t>(std::ceil(quantile * static_cast<double>(count_)));
  int64_t below = 0;
  for (int i = 0; i < kBuckets; ++i) {
    below += buckets_[i];
    if (below >= rank) return std::min(max_, absl::Microseconds(std::pow(kGrowth, i)));
  }
  return max_;
}

}  // namespace mmfree

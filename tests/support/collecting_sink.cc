#include "tests/support/collecting_sink.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <utility>

namespace mmfree {

void CollectingSink::OnTokens(absl::Span<const SampledToken> tokens) {
  EXPECT_FALSE(in_call_.exchange(true)) << "two calls at once";
  EXPECT_FALSE(tokens.empty());
  {
    absl::MutexLock lock(&mutex_);
    EXPECT_FALSE(result_.has_value()) << "tokens after the end";
    tokens_.insert(tokens_.end(), tokens.begin(), tokens.end());
    if (reading_) taken_ = tokens_.size();
    ++deliveries_;
  }
  in_call_ = false;
}

void CollectingSink::OnFinished(const absl::StatusOr<GenerationResult>& result) {
  EXPECT_FALSE(in_call_.exchange(true)) << "two calls at once";
  {
    absl::MutexLock lock(&mutex_);
    EXPECT_FALSE(result_.has_value()) << "ended twice";
    result_ = result;
  }
  in_call_ = false;
}

size_t CollectingSink::backlog() const {
  absl::MutexLock lock(&mutex_);
  return tokens_.size() - taken_;
}

void CollectingSink::StartReading() {
  absl::MutexLock lock(&mutex_);
  reading_ = true;
  taken_ = tokens_.size();
}

void CollectingSink::Read(size_t tokens) {
  absl::MutexLock lock(&mutex_);
  taken_ = std::min(tokens_.size(), taken_ + tokens);
}

const absl::StatusOr<GenerationResult>& CollectingSink::WaitForEnd() {
  const auto ended = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return result_.has_value(); };
  absl::MutexLock lock(&mutex_, absl::Condition(&ended));
  return *result_;
}

void CollectingSink::WaitForTokens(size_t tokens) {
  const auto enough = [this, tokens]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return tokens_.size() >= tokens;
  };
  absl::MutexLock lock(&mutex_, absl::Condition(&enough));
}

bool CollectingSink::ended() const {
  absl::MutexLock lock(&mutex_);
  return result_.has_value();
}

std::vector<SampledToken> CollectingSink::tokens() const {
  absl::MutexLock lock(&mutex_);
  return tokens_;
}

std::vector<int32_t> CollectingSink::ids() const {
  std::vector<int32_t> ids;
  for (const SampledToken& token : tokens()) ids.push_back(token.token);
  return ids;
}

int CollectingSink::deliveries() const {
  absl::MutexLock lock(&mutex_);
  return deliveries_;
}

void CollectingScoreSink::OnScored(absl::StatusOr<ScoreResult> result) {
  absl::MutexLock lock(&mutex_);
  EXPECT_FALSE(result_.has_value()) << "ended twice";
  result_ = std::move(result);
}

const absl::StatusOr<ScoreResult>& CollectingScoreSink::WaitForEnd() {
  const auto ended = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return result_.has_value(); };
  absl::MutexLock lock(&mutex_, absl::Condition(&ended));
  return *result_;
}

}  // namespace mmfree

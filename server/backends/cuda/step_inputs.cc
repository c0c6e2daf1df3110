#include "server/backends/cuda/step_inputs.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/base/status_macros.h"

namespace mmfree::cuda {
namespace {

// A head after every token, or only after the last.
bool HeadsForAll(const StepRow& row) {
  return !row.targets.empty() || row.logits == LogitsMode::kAll;
}
bool HasHead(const StepRow& row) {
  return HeadsForAll(row) || row.sampling != nullptr || row.logits == LogitsMode::kLast;
}

bool IsShort(const StepRow& row) { return row.tokens.size() <= size_t{kShortRowTokens}; }

absl::Status CheckSampling(const SamplingParams& params, int64_t vocab_size) {
  if (!(params.temperature >= 0.0f) || std::isinf(params.temperature)) {
    return absl::InvalidArgumentError(
        absl::StrCat("temperature must be finite and not negative, got ", params.temperature));
  }
  if (params.banned.size() > static_cast<size_t>(kMaxBannedTokens)) {
    return absl::InvalidArgumentError(absl::StrCat(params.banned.size(), " banned tokens, at most ",
                                                   kMaxBannedTokens, " are allowed"));
  }
  for (const int32_t id : params.banned) {
    if (id < 0 || id >= vocab_size) {
      return absl::InvalidArgumentError(
          absl::StrCat("banned token id ", id, " is outside [0, ", vocab_size, ")"));
    }
  }
  // Repeats are harmless, so only a small vocabulary needs the count of distinct ids.
  if (static_cast<int64_t>(params.banned.size()) >= vocab_size) {
    std::vector<int32_t> ids(params.banned.begin(), params.banned.end());
    std::sort(ids.begin(), ids.end());
    ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
    if (static_cast<int64_t>(ids.size()) >= vocab_size) {
      return absl::InvalidArgumentError("every token is banned");
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status StepPlanner::CheckRow(const StepRow& row) {
  if (row.slot < 0 || row.slot >= static_cast<int32_t>(last_use_.size())) {
    return absl::InvalidArgumentError(
        absl::StrCat("slot ", row.slot, " is outside [0, ", last_use_.size(), ")"));
  }
  if (last_use_[row.slot] == step_) {
    return absl::InvalidArgumentError(absl::StrCat("slot ", row.slot, " is used by two rows"));
  }
  last_use_[row.slot] = step_;
  if (row.tokens.empty()) return absl::InvalidArgumentError("no tokens");
  for (const int32_t token : row.tokens) {
    if (token < 0 || token >= vocab_size_) {
      return absl::InvalidArgumentError(
          absl::StrCat("token id ", token, " is outside [0, ", vocab_size_, ")"));
    }
  }
  if (!row.inner.empty() || row.rewindable) {
    return absl::InvalidArgumentError("inner samples are not supported by this backend");
  }
  if (!row.targets.empty() && row.targets.size() != row.tokens.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat(row.targets.size(), " targets for ", row.tokens.size(), " tokens"));
  }
  for (const int32_t target : row.targets) {
    if (target < -1 || target >= vocab_size_) {
      return absl::InvalidArgumentError(
          absl::StrCat("target ", target, " is outside [-1, ", vocab_size_, ")"));
    }
  }
  if (row.sampling != nullptr) return CheckSampling(*row.sampling, vocab_size_);
  return absl::OkStatus();
}

absl::Status StepPlanner::Check(absl::Span<const StepRow> rows) {
  ++step_;
  size_t tokens = 0;
  for (size_t n = 0; n < rows.size(); ++n) {
    if (absl::Status status = CheckRow(rows[n]); !status.ok()) {
      return absl::InvalidArgumentError(absl::StrCat("row ", n, ": ", status.message()));
    }
    tokens += rows[n].tokens.size();
  }
  if (tokens > static_cast<size_t>(max_step_tokens_)) {
    return absl::InvalidArgumentError(absl::StrCat("the step has ", tokens, " tokens, at most ",
                                                   max_step_tokens_, " are allowed"));
  }
  return absl::OkStatus();
}

void StepPlanner::FillSampling(const SamplingParams& params, const StepInputs& in,
                               HeadInput* head) {
  head->temperature = params.temperature;
  head->seed = params.seed;
  head->candidate = params.candidate;
  head->banned_begin = banned_;
  head->banned_count = static_cast<int32_t>(params.banned.size());
  std::copy(params.banned.begin(), params.banned.end(), in.banned + banned_);
  banned_ += head->banned_count;
}

void StepPlanner::Fill(absl::Span<const StepRow> rows, const StepInputs& in) {
  tokens_ = 0;
  heads_ = 0;
  banned_ = 0;
  decode_ = true;
  short_rows_ = static_cast<int32_t>(
      std::count_if(rows.begin(), rows.end(), [](const StepRow& row) { return IsShort(row); }));
  int32_t next_short = 0;
  int32_t next_long = short_rows_;
  logit_heads_.clear();
  sampler_heads_.clear();
  for (size_t n = 0; n < rows.size(); ++n) {
    const StepRow& row = rows[n];
    const int32_t count = static_cast<int32_t>(row.tokens.size());
    decode_ = decode_ && count == 1;
    std::copy(row.tokens.begin(), row.tokens.end(), in.tokens + tokens_);
    in.rows[IsShort(row) ? next_short++ : next_long++] = {row.slot, tokens_, count, 0};
    const int32_t first_head = HeadsForAll(row) ? 0 : HasHead(row) ? count - 1 : count;
    for (int32_t i = first_head; i < count; ++i) {
      HeadInput head = {};
      head.token = tokens_ + i;
      head.target = row.targets.empty() ? -1 : row.targets[i];
      head.temperature = -1.0f;
      if (i == count - 1 && row.sampling != nullptr) {
        const SamplingParams& params = *row.sampling;
        head.position = row.position + static_cast<uint64_t>(count);
        if (params.sampler != nullptr) {
          sampler_heads_.push_back({heads_, n, head.position});
        } else {
          FillSampling(params, in, &head);
        }
      }
      if (row.logits == LogitsMode::kAll || (row.logits == LogitsMode::kLast && i == count - 1)) {
        logit_heads_.push_back(heads_);
      }
      in.heads[heads_++] = head;
    }
    tokens_ += count;
  }
  *in.counts = {tokens_, static_cast<int32_t>(rows.size()), heads_, short_rows_};
}

void StepPlanner::Collect(absl::Span<const StepRow> rows, const HeadOutput* heads,
                          StepOutput* out) const {
  out->samples.clear();
  out->scores.clear();
  int32_t head = 0;
  for (const StepRow& row : rows) {
    const int32_t count = !HasHead(row)      ? 0
                          : HeadsForAll(row) ? static_cast<int32_t>(row.tokens.size())
                                             : 1;
    if (!row.targets.empty()) {
      for (int32_t i = 0; i < count; ++i) {
        out->scores.push_back({heads[head + i].target_logprob, heads[head + i].argmax});
      }
    }
    head += count;
    SampledToken sample;
    if (row.sampling != nullptr) {
      sample.token = heads[head - 1].sampled;
      sample.logprob = heads[head - 1].sampled_logprob;
    }
    out->samples.push_back(std::move(sample));
  }
}

}  // namespace mmfree::cuda

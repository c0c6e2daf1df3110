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
  return !row.targets.empty() || !row.inner.empty() || row.logits == LogitsMode::kAll;
}
bool HasHead(const StepRow& row) {
  return HeadsForAll(row) || row.sampling != nullptr || row.logits == LogitsMode::kLast;
}

bool IsShort(const StepRow& row) {
  return row.rewindable || row.tokens.size() <= size_t{kShortRowTokens};
}

// How the token after the row's token `i` is drawn; null: it is not.
const SamplingParams* SamplingAfter(const StepRow& row, size_t i) {
  if (i + 1 == row.tokens.size()) return row.sampling;
  return row.inner.empty() ? nullptr : &row.inner[i];
}

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
  if (!row.inner.empty() && row.inner.size() + 1 != row.tokens.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat(row.inner.size(), " inner samples for ", row.tokens.size(), " tokens"));
  }
  for (const SamplingParams& params : row.inner) {
    MMFREE_RETURN_IF_ERROR(CheckSampling(params, vocab_size_));
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
  size_t kept = 0;
  for (size_t n = 0; n < rows.size(); ++n) {
    if (absl::Status status = CheckRow(rows[n]); !status.ok()) {
      return absl::InvalidArgumentError(absl::StrCat("row ", n, ": ", status.message()));
    }
    tokens += rows[n].tokens.size();
    if (rows[n].rewindable) kept += rows[n].tokens.size() - 1;
  }
  if (tokens > static_cast<size_t>(max_step_tokens_)) {
    return absl::InvalidArgumentError(absl::StrCat("the step has ", tokens, " tokens, at most ",
                                                   max_step_tokens_, " are allowed"));
  }
  if (kept > size_t{kMaxKeptStates}) {
    return absl::InvalidArgumentError(absl::StrCat(
        "rewindable rows would keep ", kept, " states, at most ", kMaxKeptStates, " are allowed"));
  }
  return absl::OkStatus();
}

// Gives a row places for its states; returns the first one, -1 when it needs none.
int32_t StepPlanner::KeepStates(const StepRow& row) {
  if (!row.rewindable) return -1;
  const auto count = static_cast<int32_t>(row.tokens.size());
  kept_rows_.push_back({row.slot, count, kept_states_});
  kept_states_ += count - 1;
  return count == 1 ? -1 : kept_rows_.back().first;
}

absl::StatusOr<int32_t> StepPlanner::KeptState(int32_t slot, int32_t tokens) const {
  for (const KeptRow& row : kept_rows_) {
    if (row.slot != slot) continue;
    if (tokens < 1 || tokens > row.tokens) {
      return absl::InvalidArgumentError(
          absl::StrCat("rewind to ", tokens, " of a row's ", row.tokens, " tokens"));
    }
    return tokens == row.tokens ? -1 : row.first + tokens - 1;
  }
  return absl::InvalidArgumentError(
      absl::StrCat("slot ", slot, " had no rewindable row in the last step"));
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
  kept_states_ = 0;
  kept_rows_.clear();
  logit_heads_.clear();
  sampler_heads_.clear();
  size_t inner = 0;
  for (size_t n = 0; n < rows.size(); ++n) {
    const StepRow& row = rows[n];
    const int32_t count = static_cast<int32_t>(row.tokens.size());
    decode_ = decode_ && count == 1;
    std::copy(row.tokens.begin(), row.tokens.end(), in.tokens + tokens_);
    in.rows[IsShort(row) ? next_short++ : next_long++] = {row.slot, tokens_, count,
                                                          KeepStates(row)};
    const int32_t first_head = HeadsForAll(row) ? 0 : HasHead(row) ? count - 1 : count;
    for (int32_t i = first_head; i < count; ++i) {
      HeadInput head = {};
      head.token = tokens_ + i;
      head.target = row.targets.empty() ? -1 : row.targets[i];
      head.temperature = -1.0f;
      const bool last = i == count - 1;
      if (const SamplingParams* const params = SamplingAfter(row, i); params != nullptr) {
        head.position = row.position + static_cast<uint64_t>(i) + 1;
        if (params->sampler != nullptr) {
          sampler_heads_.push_back({heads_, params, head.position, !last, last ? n : inner + i});
        } else {
          FillSampling(*params, in, &head);
        }
      }
      if (row.logits == LogitsMode::kAll || (row.logits == LogitsMode::kLast && last)) {
        logit_heads_.push_back(heads_);
      }
      in.heads[heads_++] = head;
    }
    tokens_ += count;
    inner += row.inner.size();
  }
  *in.counts = {tokens_, static_cast<int32_t>(rows.size()), heads_, short_rows_};
}

void StepPlanner::Collect(absl::Span<const StepRow> rows, const HeadOutput* heads,
                          StepOutput* out) const {
  const auto sample_of = [](const HeadOutput& head) {
    SampledToken sample;
    sample.token = head.sampled;
    sample.logprob = head.sampled_logprob;
    return sample;
  };
  out->samples.clear();
  out->inner_samples.clear();
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
    for (size_t i = 0; i < row.inner.size(); ++i) {
      out->inner_samples.push_back(sample_of(heads[head + static_cast<int32_t>(i)]));
    }
    head += count;
    out->samples.push_back(row.sampling != nullptr ? sample_of(heads[head - 1]) : SampledToken());
  }
}

}  // namespace mmfree::cuda

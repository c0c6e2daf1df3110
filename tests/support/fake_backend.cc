#include "tests/support/fake_backend.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"

namespace mmfree {
namespace {

// What a slot has been fed.
struct State {
  uint64_t hash = 0;
  uint64_t count = 0;
};

// As floats that are finite, as those of a model: 16 bits each.
constexpr size_t kStateFloats = sizeof(State) / sizeof(uint16_t);
void ToFloats(const State& state, absl::Span<float> floats) {
  std::array<uint16_t, kStateFloats> halves;
  memcpy(halves.data(), &state, sizeof(State));
  std::copy(halves.begin(), halves.end(), floats.begin());
}
State FromFloats(absl::Span<const float> floats) {
  std::array<uint16_t, kStateFloats> halves;
  std::transform(floats.begin(), floats.begin() + kStateFloats, halves.begin(),
                 [](float value) { return static_cast<uint16_t>(value); });
  State state;
  memcpy(static_cast<void*>(&state), halves.data(), sizeof(State));
  return state;
}

uint64_t Mix(uint64_t x) {  // the finalizer of splitmix64
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

void Feed(State* state, int32_t token) {
  state->hash = Mix(state->hash ^ static_cast<uint64_t>(token));
  ++state->count;
}

float LogprobOf(const State& state, int32_t token) {
  return -static_cast<float>(Mix(state.hash + static_cast<uint64_t>(token)) % 1000) / 100.0f;
}

SampledToken SampleFrom(const State& state, const SamplingParams& params, int32_t vocab_size) {
  uint64_t draw = state.hash;
  if (params.temperature > 0) draw = Mix(draw ^ params.seed ^ (state.count << 32));
  int32_t token = static_cast<int32_t>(draw % static_cast<uint64_t>(vocab_size));
  for (size_t i = 0; i < params.banned.size();) {
    if (params.banned[i] == token) {
      token = (token + 1) % vocab_size;
      i = 0;
    } else {
      ++i;
    }
  }
  return {token, LogprobOf(state, token)};
}

TokenScore ScoreFrom(const State& state, int32_t target, int32_t vocab_size) {
  TokenScore score;
  score.argmax = SampleFrom(state, SamplingParams(), vocab_size).token;
  if (target >= 0) score.logprob = LogprobOf(state, target);
  return score;
}

float LogitOf(const State& state, int32_t token) { return 10.0f + LogprobOf(state, token); }

State FeedAll(absl::Span<const int32_t> tokens) {
  State state;
  for (int32_t token : tokens) Feed(&state, token);
  return state;
}

}  // namespace

class FakeBackend final : public Backend {
 public:
  explicit FakeBackend(std::shared_ptr<FakeDevice> device)
      : device_(std::move(device)),
        states_(device_->options().num_slots + device_->options().resident_slots) {
    info_.name = "fake";
    info_.description = "fake";
    info_.num_slots = device_->options().num_slots;
    info_.resident_slots = device_->options().resident_slots;
    info_.state_floats = kStateFloats;
    info_.max_step_tokens = device_->options().max_step_tokens;
  }

  const BackendInfo& info() const override { return info_; }

  absl::Status Step(absl::Span<const StepRow> rows, StepOutput* out) override {
    if (absl::Status status = Enter(); !status.ok()) return status;
    if (absl::Status status = Check(rows); !status.ok()) return status;
    const int32_t vocab_size = device_->options().vocab_size;
    FakeDevice::StepRecord record;
    out->samples.assign(rows.size(), SampledToken());
    out->inner_samples.clear();
    kept_.clear();
    out->scores.clear();
    out->logits.clear();
    for (size_t r = 0; r < rows.size(); ++r) {
      const StepRow& row = rows[r];
      State& state = states_[row.slot];
      record.push_back({row.slot, row.position, static_cast<int32_t>(row.tokens.size()),
                        row.sampling != nullptr, !row.targets.empty(),
                        row.sampling != nullptr && !row.sampling->banned.empty()});
      for (size_t i = 0; i < row.tokens.size(); ++i) {
        Feed(&state, row.tokens[i]);
        if (row.rewindable) kept_[row.slot].push_back(state);
        if (i < row.inner.size()) out->inner_samples.push_back(Draw(state, row.inner[i]));
        if (!row.targets.empty()) {
          out->scores.push_back(ScoreFrom(state, row.targets[i], vocab_size));
        }
        if (row.logits == LogitsMode::kAll ||
            (row.logits == LogitsMode::kLast && i + 1 == row.tokens.size())) {
          for (int32_t id = 0; id < vocab_size; ++id) out->logits.push_back(LogitOf(state, id));
        }
      }
      if (row.sampling != nullptr) out->samples[r] = Draw(state, *row.sampling);
    }
    if (device_->options().clock != nullptr) {
      int64_t tokens = 0;
      for (const StepRow& row : rows) tokens += static_cast<int64_t>(row.tokens.size());
      device_->options().clock->Advance(device_->options().step_time +
                                        device_->options().token_time * tokens);
    }
    absl::MutexLock lock(&device_->mutex_);
    device_->steps_.push_back(std::move(record));
    return absl::OkStatus();
  }

  absl::Status Rewind(int32_t slot, int32_t tokens) override {
    const std::vector<State>& kept = kept_[slot];
    if (tokens < 1 || tokens > static_cast<int32_t>(kept.size())) {
      return Violation(absl::StrCat("rewind of slot ", slot, " to ", tokens, " of ", kept.size()));
    }
    states_[slot] = kept[tokens - 1];
    return absl::OkStatus();
  }

  absl::Status ZeroSlot(int32_t slot) override {
    absl::MutexLock lock(&device_->mutex_);
    states_[slot] = State();
    return std::exchange(device_->next_zero_, absl::OkStatus());
  }

  absl::Status CopySlot(int32_t from, int32_t to) override {
    for (const int32_t slot : {from, to}) {
      if (slot < 0 || slot >= static_cast<int32_t>(states_.size())) {
        return Violation(absl::StrCat("copy of slot ", from, " to ", to));
      }
    }
    states_[to] = states_[from];
    return absl::OkStatus();
  }
  absl::Status ReadSlot(int32_t slot, absl::Span<float> state) override {
    ToFloats(states_[slot], state);
    return absl::OkStatus();
  }
  absl::Status WriteSlot(int32_t slot, absl::Span<const float> state) override {
    states_[slot] = FromFloats(state);
    return absl::OkStatus();
  }
  absl::Status ReadResident(int32_t slot, absl::Span<float> state) override {
    if (slot < info_.num_slots || slot >= static_cast<int32_t>(states_.size())) {
      return Violation(absl::StrCat("read of resident slot ", slot));
    }
    ToFloats(states_[slot], state);
    absl::MutexLock lock(&device_->mutex_);
    if (device_->fail_reads_ > 0 && ++device_->reads_ % device_->fail_reads_ == 0) {
      return absl::DataLossError("a read of the device failed");
    }
    return absl::OkStatus();
  }

 private:
  // Waits at the gate, then takes the failure a test has set.
  absl::Status Enter() {
    absl::MutexLock lock(&device_->mutex_);
    const auto may_pass = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(device_->mutex_) {
      return !device_->gate_closed_ || device_->permits_ > 0;
    };
    device_->held_up_ = true;
    device_->mutex_.Await(absl::Condition(&may_pass));
    device_->held_up_ = false;
    if (device_->gate_closed_) --device_->permits_;
    return std::exchange(device_->next_step_, absl::OkStatus());
  }

  absl::Status Check(absl::Span<const StepRow> rows) {
    std::set<int32_t> slots;
    int64_t tokens = 0;
    int64_t kept = 0;
    std::string wrong;
    for (const StepRow& row : rows) {
      tokens += static_cast<int64_t>(row.tokens.size());
      if (row.slot < 0 || row.slot >= info_.num_slots) {
        wrong = absl::StrCat("slot ", row.slot, " does not exist");
      } else if (!slots.insert(row.slot).second) {
        wrong = absl::StrCat("slot ", row.slot, " is in two rows");
      } else if (states_[row.slot].count != row.position) {
        wrong = absl::StrCat("slot ", row.slot, " was fed ", states_[row.slot].count,
                             " tokens, the row is at position ", row.position);
      } else if (row.tokens.empty()) {
        wrong = "a row without tokens";
      } else if (!row.targets.empty() && row.targets.size() != row.tokens.size()) {
        wrong = "targets and tokens differ in number";
      } else if (!row.inner.empty() && row.inner.size() + 1 != row.tokens.size()) {
        wrong = "inner samples are not one fewer than tokens";
      }
      if (row.rewindable) kept += static_cast<int64_t>(row.tokens.size()) - 1;
      for (int32_t token : row.tokens) {
        if (token < 0 || token >= device_->options().vocab_size) {
          wrong = absl::StrCat("token ", token, " does not exist");
        }
      }
    }
    if (rows.empty()) wrong = "a step without rows";
    if (kept > kMaxKeptStates) wrong = absl::StrCat("rows that keep ", kept, " states");
    if (tokens > info_.max_step_tokens) wrong = absl::StrCat("a step of ", tokens, " tokens");
    return wrong.empty() ? absl::OkStatus() : Violation(wrong);
  }

  absl::Status Violation(const std::string& wrong) {
    absl::MutexLock lock(&device_->mutex_);
    device_->violations_.push_back(wrong);
    return absl::InvalidArgumentError(wrong);
  }

  SampledToken Draw(const State& state, const SamplingParams& params) const {
    const int32_t vocab_size = device_->options().vocab_size;
    if (params.sampler == nullptr) return SampleFrom(state, params, vocab_size);
    std::vector<float> logits;
    for (int32_t id = 0; id < vocab_size; ++id) logits.push_back(LogitOf(state, id));
    return params.sampler->Sample(logits, params, state.count);
  }

  const std::shared_ptr<FakeDevice> device_;
  BackendInfo info_;
  std::vector<State> states_;
  std::map<int32_t, std::vector<State>> kept_;  // by slot: after each token of a rewindable row
};

FakeDevice::FakeDevice(const FakeBackendOptions& options) : options_(options) {}

std::unique_ptr<Backend> FakeDevice::MakeBackend(std::shared_ptr<FakeDevice> device) {
  return std::make_unique<FakeBackend>(std::move(device));
}

void FakeDevice::CloseGate() {
  absl::MutexLock lock(&mutex_);
  gate_closed_ = true;
  permits_ = 0;
}

void FakeDevice::ReleaseSteps(int steps) {
  absl::MutexLock lock(&mutex_);
  permits_ += steps;
}

void FakeDevice::OpenGate() {
  absl::MutexLock lock(&mutex_);
  gate_closed_ = false;
}

void FakeDevice::WaitUntilHeldUp() {
  const auto held_up = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return held_up_ && gate_closed_ && permits_ == 0;
  };
  absl::MutexLock lock(&mutex_, absl::Condition(&held_up));
}

void FakeDevice::FailNextStep(absl::Status status) {
  absl::MutexLock lock(&mutex_);
  next_step_ = std::move(status);
}

void FakeDevice::FailNextZeroSlot(absl::Status status) {
  absl::MutexLock lock(&mutex_);
  next_zero_ = std::move(status);
}

std::vector<FakeDevice::StepRecord> FakeDevice::steps() const {
  absl::MutexLock lock(&mutex_);
  return steps_;
}

int64_t FakeDevice::num_steps() const {
  absl::MutexLock lock(&mutex_);
  return static_cast<int64_t>(steps_.size());
}

void FakeDevice::WaitForSteps(int64_t steps) {
  const auto done = [this, steps]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return static_cast<int64_t>(steps_.size()) >= steps;
  };
  absl::MutexLock lock(&mutex_, absl::Condition(&done));
}

std::vector<std::string> FakeDevice::violations() const {
  absl::MutexLock lock(&mutex_);
  return violations_;
}

std::vector<SampledToken> FakeDevice::Expected(absl::Span<const int32_t> prompt,
                                               SamplingParams sampling, int count) const {
  State state = FeedAll(prompt);
  std::vector<SampledToken> tokens;
  for (int i = 0; i < count; ++i) {
    tokens.push_back(SampleFrom(state, sampling, options_.vocab_size));
    Feed(&state, tokens.back().token);
  }
  return tokens;
}

TokenScore FakeDevice::ExpectedScore(absl::Span<const int32_t> tokens, int32_t target) const {
  return ScoreFrom(FeedAll(tokens), target, options_.vocab_size);
}

std::vector<float> FakeDevice::ExpectedLogits(absl::Span<const int32_t> tokens) const {
  const State state = FeedAll(tokens);
  std::vector<float> logits;
  for (int32_t id = 0; id < options_.vocab_size; ++id) logits.push_back(LogitOf(state, id));
  return logits;
}

void FakeDevice::FailResidentReads(int period) {
  absl::MutexLock lock(&mutex_);
  fail_reads_ = period;
  reads_ = 0;
}

std::vector<float> FakeDevice::ExpectedState(absl::Span<const int32_t> tokens) {
  std::vector<float> floats(kStateFloats);
  ToFloats(FeedAll(tokens), absl::MakeSpan(floats));
  return floats;
}

}  // namespace mmfree

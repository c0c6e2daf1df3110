#include "client/load/generator.h"

#include <grpcpp/alarm.h>
#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <cstdio>
#include <random>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_format.h"

namespace mmfree {

// One call. Owns itself: gRPC calls OnDone last.
class Generator::Stream final : public grpc::ClientReadReactor<v1::GenerateResponse> {
 public:
  Stream(Generator* generator, PlannedRequest planned)
      : generator_(generator), planned_(std::move(planned)) {}

  void Start(v1::InferenceService::Stub* stub, absl::Duration delay) {
    stub_ = stub;
    if (delay <= absl::ZeroDuration()) {
      Begin();
      return;
    }
    alarm_.Set(absl::ToChronoTime(absl::Now() + delay), [this](bool) { Begin(); });
  }

  void OnReadDone(bool ok) override {
    if (!ok) {
      RemoveHold();
      return;
    }
    if (event_.has_delta()) OnDelta(event_.delta().token_ids_size());
    if (event_.has_finished()) usage_ = event_.finished().usage();
    if (!planned_.slow) {
      StartRead(&event_);
      return;
    }
    alarm_.Set(absl::ToChronoTime(absl::Now() + generator_->options_.slow_read_delay),
               [this](bool) { StartRead(&event_); });
  }

  void OnDone(const grpc::Status& status) override {
    generator_->Ended(*this, status);
    delete this;
  }

  absl::Time start() const { return start_; }
  int64_t tokens() const { return tokens_; }
  const v1::Usage& usage() const { return usage_; }
  bool cancelled() const { return cancelled_; }

 private:
  void Begin() {
    start_ = absl::Now();
    if (generator_->options_.timeout != absl::InfiniteDuration()) {
      context_.set_deadline(absl::ToChronoTime(start_ + generator_->options_.timeout));
    }
    stub_->async()->Generate(&context_, &planned_.request, this);
    // While a slow reader waits to read on, nothing else keeps the call.
    AddHold();
    StartRead(&event_);
    StartCall();
  }

  void OnDelta(int64_t tokens) {
    if (tokens == 0) return;
    const absl::Time now = absl::Now();
    {
      absl::MutexLock lock(&generator_->mutex_);
      Report& report = generator_->report_;
      report.tokens += tokens;
      if (tokens_ == 0) {
        report.first_token.Add(now - start_);
      } else if (!planned_.slow) {
        report.inter_token.Add((now - latest_) / tokens, tokens);
        report.longest_silence = std::max(report.longest_silence, now - latest_);
      }
    }
    latest_ = now;
    tokens_ += tokens;
    if (planned_.cancel_after > 0 && tokens_ >= planned_.cancel_after && !cancelled_) {
      cancelled_ = true;
      context_.TryCancel();
    }
  }

  Generator* const generator_;
  const PlannedRequest planned_;
  v1::InferenceService::Stub* stub_ = nullptr;
  grpc::ClientContext context_;
  grpc::Alarm alarm_;
  v1::GenerateResponse event_;
  absl::Time start_;
  absl::Time latest_;
  int64_t tokens_ = 0;
  v1::Usage usage_;  // when it finished
  bool cancelled_ = false;
};

Generator::Generator(const GeneratorOptions& options, const WorkloadOptions& workload,
                     std::vector<std::unique_ptr<v1::InferenceService::Stub>> stubs)
    : options_(options), workload_(workload), stubs_(std::move(stubs)) {}

Generator::~Generator() = default;

bool Generator::MayStart() const {
  return report_.started < options_.requests && absl::Now() - begin_ < options_.duration;
}

int64_t Generator::TakeNext() {
  if (!MayStart()) return -1;
  ++running_;
  report_.most_concurrent = std::max(report_.most_concurrent, running_);
  return report_.started++;
}

void Generator::StartNext() {
  int64_t index;
  {
    absl::MutexLock lock(&mutex_);
    index = TakeNext();
  }
  Start(index, absl::ZeroDuration());
}

void Generator::Start(int64_t index, absl::Duration delay) {
  if (index < 0) return;
  auto* const stream = new Stream(this, PlanRequest(workload_, index));
  stream->Start(stubs_[static_cast<size_t>(index) % stubs_.size()].get(), delay);
}

void Generator::Ended(const Stream& stream, const grpc::Status& status) {
  const absl::StatusCode code = static_cast<absl::StatusCode>(status.error_code());
  const bool as_planned =
      status.ok() || (stream.cancelled() && code == absl::StatusCode::kCancelled);
  int64_t next = -1;
  {
    absl::MutexLock lock(&mutex_);
    if (status.ok()) {
      ++report_.finished;
      report_.finished_tokens += stream.tokens();
      report_.prompt_tokens += stream.usage().prompt_tokens();
      report_.cached_tokens += stream.usage().cached_tokens();
      report_.end_to_end.Add(absl::Now() - stream.start());
    } else if (as_planned) {
      ++report_.cancelled;
    } else {
      ++report_.errors[absl::StatusCodeToString(code)];
    }
    --running_;
    if (options_.rate <= 0) next = TakeNext();
  }
  // Unless another was taken, the run may be over: this object is not touched any more.
  if (next >= 0) Start(next, as_planned ? absl::ZeroDuration() : options_.failure_delay);
}

void Generator::PrintProgress(absl::Duration since_last, int64_t tokens_before) {
  absl::MutexLock lock(&mutex_);
  absl::FPrintF(
      stderr, "%6.1f s: %d started, %d running, %d finished, %d failed, %.0f tokens/s\n",
      absl::ToDoubleSeconds(absl::Now() - begin_), report_.started, running_, report_.finished,
      report_.failed(),
      static_cast<double>(report_.tokens - tokens_before) / absl::ToDoubleSeconds(since_last));
}

Report Generator::Run() {
  std::mt19937_64 random(workload_.seed);
  std::exponential_distribution<double> gap(options_.rate > 0 ? options_.rate : 1);
  const absl::Time begin = absl::Now();
  {
    absl::MutexLock lock(&mutex_);
    begin_ = begin;
  }
  absl::Time next_start = options_.rate > 0 ? begin : absl::InfiniteFuture();
  if (options_.rate <= 0) {
    for (int64_t i = 0; i < options_.concurrency; ++i) StartNext();
  }
  absl::Time last_progress = begin;
  int64_t tokens_before = 0;
  const auto idle = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return running_ == 0; };
  while (true) {
    {
      absl::MutexLock lock(&mutex_);
      if (!MayStart()) next_start = absl::InfiniteFuture();
      const absl::Time wake = std::min(next_start, last_progress + absl::Seconds(1));
      if (next_start == absl::InfiniteFuture()) {
        if (mutex_.AwaitWithDeadline(absl::Condition(&idle), wake)) break;
      } else {
        const bool never = false;
        mutex_.AwaitWithDeadline(absl::Condition(&never), wake);
      }
    }
    const absl::Time now = absl::Now();
    for (; next_start <= now; next_start += absl::Seconds(gap(random))) {
      StartNext();
    }
    if (now - last_progress < absl::Seconds(1)) continue;
    if (options_.progress) PrintProgress(now - last_progress, tokens_before);
    last_progress = now;
    absl::MutexLock lock(&mutex_);
    tokens_before = report_.tokens;
  }
  absl::MutexLock lock(&mutex_);
  report_.elapsed = absl::Now() - begin;
  return report_;
}

}  // namespace mmfree

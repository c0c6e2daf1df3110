#include "server/rpc/best_of.h"

#include <algorithm>
#include <numeric>
#include <string>
#include <utility>

namespace mmfree {
namespace {

// Deltas that become one event: messages of a moderate size, and few of them.
constexpr int kMergedDeltas = 64;

void Append(v1::GenerationDelta* delta, v1::GenerationDelta next) {
  delta->mutable_text()->append(next.text());
  next.clear_text();
  delta->MergeFrom(next);
}

}  // namespace

BestOf::BestOf(uint32_t made, uint32_t sent, EventWriter* writer)
    : sent_(sent), writer_(writer), candidates_(made) {}

void BestOf::Write(const v1::GenerateResponse& event) {
  const std::shared_ptr<BestOf> self = shared_from_this();
  if (event.has_delta() || event.has_finished()) {
    Keep(event);
    Acknowledge();
  } else {
    writer_->Write(event);
  }
}

void BestOf::WriteLast(const v1::GenerateResponse& event) {
  const std::shared_ptr<BestOf> self = shared_from_this();
  Keep(event);
  {
    absl::MutexLock lock(&mu_);
    Rank();
    ranked_ = true;
  }
  Send(/*client_gone=*/false);
}

void BestOf::Finish(const absl::Status& status) { writer_->Finish(status); }

void BestOf::OnWriteDone(bool ok) {
  const std::shared_ptr<BestOf> self = shared_from_this();
  bool ranked;
  {
    absl::MutexLock lock(&mu_);
    ranked = ranked_;
  }
  if (ranked) {
    Send(/*client_gone=*/!ok);
  } else {
    source_->OnWriteDone(ok);
  }
}

void BestOf::OnCancel(bool deadline_passed) {
  {
    absl::MutexLock lock(&mu_);
    deadline_passed_ = deadline_passed;
  }
  source_->OnCancel(deadline_passed);
}

void BestOf::Keep(const v1::GenerateResponse& event) {
  absl::MutexLock lock(&mu_);
  if (event.has_finished()) {
    candidates_[event.finished().candidate()].finished = event;
    return;
  }
  Candidate& candidate = candidates_[event.delta().candidate()];
  if (candidate.deltas.empty() || candidate.merged == kMergedDeltas) {
    candidate.deltas.push_back(event);
    candidate.merged = 1;
    return;
  }
  Append(candidate.deltas.back().mutable_delta(), event.delta());
  ++candidate.merged;
}

// The group answers with the next event, so a call from within a call would go as deep as there
// are events; the outermost one makes all of them instead.
void BestOf::Acknowledge() {
  {
    absl::MutexLock lock(&mu_);
    unacknowledged_ = true;
    if (acknowledging_) return;
    acknowledging_ = true;
  }
  for (;;) {
    {
      absl::MutexLock lock(&mu_);
      if (!unacknowledged_) {
        acknowledging_ = false;
        return;
      }
      unacknowledged_ = false;
    }
    source_->OnWriteDone(true);
  }
}

void BestOf::Rank() {
  std::vector<uint32_t> order(candidates_.size());
  std::iota(order.begin(), order.end(), 0u);
  const auto logprob = [this](uint32_t number) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return candidates_[number].finished.finished().cumulative_logprob();
  };
  std::stable_sort(order.begin(), order.end(),
                   [&](uint32_t a, uint32_t b)
                       ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return logprob(a) > logprob(b); });
  int64_t discarded = 0;
  for (size_t rank = sent_; rank < order.size(); ++rank) {
    discarded += candidates_[order[rank]].finished.finished().usage().completion_tokens();
  }
  for (uint32_t rank = 0; rank < sent_; ++rank) {
    Candidate& candidate = candidates_[order[rank]];
    for (v1::GenerateResponse& delta : candidate.deltas) {
      delta.mutable_delta()->set_candidate(rank);
      output_.push_back(std::move(delta));
    }
    v1::GenerationFinished* const finished = candidate.finished.mutable_finished();
    finished->set_candidate(rank);
    if (rank == 0) finished->mutable_usage()->set_discarded_tokens(discarded);
    output_.push_back(std::move(candidate.finished));
  }
  candidates_.clear();
}

void BestOf::Send(bool client_gone) {
  absl::Status gone;
  bool last;
  {
    absl::MutexLock lock(&mu_);
    if (output_.empty()) return;  // the write that ended the RPC
    last = output_.size() == 1;
    if (client_gone) {
      gone = deadline_passed_ ? absl::DeadlineExceededError("the deadline passed")
                              : absl::CancelledError("the client is gone");
      output_.clear();
    } else {
      in_flight_ = std::move(output_.front());
      output_.pop_front();
    }
  }
  if (client_gone) {
    writer_->Finish(gone);
  } else if (last) {
    writer_->WriteLast(in_flight_);
  } else {
    writer_->Write(in_flight_);
  }
}

}  // namespace mmfree

#include "server/rpc/candidate_group.h"

#include <utility>

#include "google/protobuf/util/time_util.h"

namespace mmfree {
namespace {

// Sends `started` and what is asked of the prompt, and nothing else.
GenerationStream::Options PromptOptions(GenerationStream::Options options) {
  options.text = OutputText::Options();
  return options;
}

// Sends deltas and `finished`.
GenerationStream::Options CandidateOptions(GenerationStream::Options options, uint32_t candidate) {
  options.candidate = candidate;
  options.announce = false;
  options.prompt_logprobs = false;
  options.echo = false;
  return options;
}

// The candidate's own request saw only the prompt's last token.
void AddPrompt(const v1::GenerationFinished& prompt, v1::GenerationFinished* finished) {
  v1::Usage* const usage = finished->mutable_usage();
  usage->set_prompt_tokens(prompt.usage().prompt_tokens());
  usage->set_cached_tokens(prompt.usage().cached_tokens());
  v1::Timings* const timings = finished->mutable_timings();
  *timings->mutable_queued() += prompt.timings().queued();
  *timings->mutable_prefill() += prompt.timings().prefill();
}

}  // namespace

void CandidateGroup::Lane::Write(const v1::GenerateResponse& event) {
  group_->Enqueue(this, event, /*last=*/false);
}

void CandidateGroup::Lane::WriteLast(const v1::GenerateResponse& event) {
  if (this == &group_->prompt_lane_) {
    group_->StartCandidates(event.finished());
    return;
  }
  finished_ = event;
  AddPrompt(group_->prompt_finished_, finished_.mutable_finished());
  group_->Enqueue(this, finished_, /*last=*/true);
}

void CandidateGroup::Lane::Finish(const absl::Status& status) { group_->Fail(status); }

CandidateGroup::CandidateGroup(uint32_t candidates, GenerationStream::Options options,
                               Engine* engine, GenerationRequest request, EventWriter* writer,
                               Prepare prepare)
    : candidates_(candidates),
      options_(std::move(options)),
      engine_(engine),
      request_(std::move(request)),
      writer_(writer),
      prepare_(std::move(prepare)),
      prompt_lane_(this) {
  prompt_lane_.stream = std::make_shared<GenerationStream>(PromptOptions(options_), engine_,
                                                           request_.prompt, &prompt_lane_);
}

void CandidateGroup::Start() {
  // A refusal ends the RPC, and with it the transport's hold.
  const std::shared_ptr<CandidateGroup> self = shared_from_this();
  GenerationStream::Start(prompt_lane_.stream, PromptRequest());
}

GenerationRequest CandidateGroup::PromptRequest() const {
  GenerationRequest out = request_;
  out.max_new_tokens = 0;
  out.min_new_tokens = 0;
  out.eos_token_ids.clear();
  out.stop_token_ids.clear();
  out.sampler = nullptr;
  out.stop_condition = nullptr;
  out.final_state = prompt_state_;
  out.final_on_device = false;
  return out;
}

GenerationRequest CandidateGroup::CandidateRequest(uint32_t candidate) const {
  GenerationRequest out = request_;
  out.prompt = prompt_state_->pending;
  if (out.speculative_tokens > 0) {
    out.lookup_context.insert(out.lookup_context.end(), request_.prompt.begin(),
                              request_.prompt.begin() + prompt_state_->fed);
  }
  out.first_position += static_cast<uint64_t>(prompt_state_->fed);
  out.initial_state =
      std::shared_ptr<const std::vector<float>>(prompt_state_, &prompt_state_->state);
  out.final_state = nullptr;
  out.prompt_logprobs = false;
  out.prompt_top_logprobs = 0;
  out.sampling.candidate = candidate;
  if (out.sampler != nullptr) out.sampler = out.sampler->Clone();
  if (out.stop_condition != nullptr) out.stop_condition = out.stop_condition->Clone();
  return out;
}

void CandidateGroup::StartCandidates(const v1::GenerationFinished& prompt) {
  const std::shared_ptr<CandidateGroup> self = shared_from_this();
  prompt_finished_ = prompt;
  std::vector<std::unique_ptr<Lane>> lanes;
  std::vector<GenerationRequest> requests;
  for (uint32_t i = 0; i < candidates_; ++i) {
    lanes.push_back(std::make_unique<Lane>(this));
    requests.push_back(CandidateRequest(i));
    Lane& lane = *lanes.back();
    if (prepare_ != nullptr) lane.before = prepare_(*prompt_state_, &requests.back(), &lane);
    EventWriter* const writer = lane.before != nullptr ? lane.before.get() : &lane;
    lane.stream = std::make_shared<GenerationStream>(CandidateOptions(options_, i), engine_,
                                                     absl::Span<const int32_t>(), writer);
  }
  std::vector<std::shared_ptr<GenerationStream>> streams;
  {
    absl::MutexLock lock(&mu_);
    lanes_ = std::move(lanes);
    open_ = candidates_;
    streams = Streams();
  }
  for (uint32_t i = 0; i < candidates_; ++i) {
    {
      absl::MutexLock lock(&mu_);
      if (!status_.ok()) {
        open_ -= candidates_ - i;
        break;
      }
    }
    GenerationStream::Start(streams[i], std::move(requests[i]));
  }
  EndIfAllEnded();
}

void CandidateGroup::Enqueue(Lane* lane, const v1::GenerateResponse& event, bool last) {
  const std::shared_ptr<CandidateGroup> self = shared_from_this();
  {
    absl::MutexLock lock(&mu_);
    lane->event = &event;
    lane->last = last;
    waiting_.push_back(lane);
  }
  Send();
}

void CandidateGroup::Send() {
  for (;;) {
    Lane* lane;
    bool lost;
    bool ends;
    {
      absl::MutexLock lock(&mu_);
      if (writing_ != nullptr || waiting_.empty()) return;
      lane = writing_ = waiting_.front();
      waiting_.pop_front();
      lost = client_gone_;
      ends = lane->last && open_ == 1 && status_.ok() && !lost;
      ended_ |= ends;
    }
    if (ends) {
      writer_->WriteLast(*lane->event);
      return;
    }
    if (!lost) {
      writer_->Write(*lane->event);
      return;
    }
    Complete(lane, /*ok=*/false);
  }
}

void CandidateGroup::Complete(Lane* lane, bool ok) {
  const bool last = lane->last;
  {
    absl::MutexLock lock(&mu_);
    writing_ = nullptr;
    client_gone_ |= !ok;
    if (last) --open_;
  }
  if (last) {
    EndIfAllEnded();
  } else {
    lane->stream->OnWriteDone(ok);
  }
}

void CandidateGroup::OnWriteDone(bool ok) {
  const std::shared_ptr<CandidateGroup> self = shared_from_this();
  Lane* lane;
  {
    absl::MutexLock lock(&mu_);
    if (ended_) return;
    lane = writing_;
  }
  Complete(lane, ok);
  Send();
}

void CandidateGroup::OnCancel(bool deadline_passed) {
  std::vector<std::shared_ptr<GenerationStream>> streams;
  {
    absl::MutexLock lock(&mu_);
    client_gone_ = true;
    // With a deadline the engine's answer is the status.
    if (!deadline_passed && status_.ok()) status_ = absl::CancelledError("the client is gone");
    streams = Streams();
  }
  for (const auto& stream : streams) stream->OnCancel(deadline_passed);
}

void CandidateGroup::Fail(const absl::Status& status) {
  const std::shared_ptr<CandidateGroup> self = shared_from_this();
  std::vector<std::shared_ptr<GenerationStream>> others;
  {
    absl::MutexLock lock(&mu_);
    --open_;
    if (status_.ok()) {
      status_ = status;
      others = Streams();
    }
  }
  for (const auto& stream : others) stream->OnCancel(/*deadline_passed=*/false);
  EndIfAllEnded();
}

void CandidateGroup::EndIfAllEnded() {
  absl::Status status;
  {
    absl::MutexLock lock(&mu_);
    if (open_ > 0 || ended_) return;
    ended_ = true;
    status = status_.ok() ? absl::CancelledError("the client is gone") : status_;
  }
  writer_->Finish(status);
}

std::vector<std::shared_ptr<GenerationStream>> CandidateGroup::Streams() const {
  std::vector<std::shared_ptr<GenerationStream>> streams;
  if (lanes_.empty()) return {prompt_lane_.stream};
  for (const std::unique_ptr<Lane>& lane : lanes_) streams.push_back(lane->stream);
  return streams;
}

}  // namespace mmfree

#include "server/scheduler/policy.h"

#include <algorithm>
#include <utility>

#include "absl/base/internal/raw_logging.h"
#include "absl/strings/str_cat.h"

namespace mmfree {

int32_t Policy::Capacity(const Options& options) {
  ABSL_RAW_CHECK(options.num_slots >= 1 && options.max_batch >= 0 && options.prefill_chunk >= 1 &&
                     options.step_token_budget >= 1,
                 "scheduler options out of range");
  int32_t rows = options.max_batch;
  if (rows == 0) {
    const int32_t for_prompts = std::min(options.prefill_chunk, options.step_token_budget / 4);
    rows = options.step_token_budget - for_prompts;
  }
  return std::min({rows, options.step_token_budget, options.num_slots});
}

Policy::Policy(const Options& options, Prepare prepare)
    : options_(options), capacity_(Capacity(options)), prepare_(std::move(prepare)) {
  free_slots_.reserve(options.num_slots);
  // Low slots first, so that a lightly loaded backend touches little memory.
  for (int32_t slot = options.num_slots - 1; slot >= 0; --slot) free_slots_.push_back(slot);
}

void Policy::Append(std::vector<SchedulerEntry*>* list, SchedulerEntry* entry) {
  entry->index = list->size();
  list->push_back(entry);
}

void Policy::EraseAt(std::vector<SchedulerEntry*>* list, SchedulerEntry* entry) {
  SchedulerEntry* const last = list->back();
  (*list)[entry->index] = last;
  last->index = entry->index;
  list->pop_back();
}

void Policy::Enqueue(SchedulerEntry* entry) {
  ABSL_RAW_CHECK(
      entry->phase == Phase::kNone && entry->fed >= 0 && entry->fed < entry->prompt_tokens,
      "bad entry");
  entry->phase = Phase::kWaiting;
  entry->slot = -1;
  waiting_.PushBack(entry);
  if (entry->deadline != absl::InfiniteFuture()) deadlines_.insert(entry);
}

void Policy::Remove(SchedulerEntry* entry) {
  switch (entry->phase) {
    case Phase::kNone:
      ABSL_RAW_CHECK(false, "removed an entry that is not held");
      break;
    case Phase::kWaiting:
      waiting_.Erase(entry);
      break;
    case Phase::kPrefill:
      prefilling_.Erase(entry);
      break;
    case Phase::kDecode:
      EraseAt(&decoding_, entry);
      break;
    case Phase::kPaused:
      EraseAt(&paused_, entry);
      break;
  }
  if (entry->slot >= 0) free_slots_.push_back(entry->slot);
  entry->slot = -1;
  entry->phase = Phase::kNone;
  if (entry->deadline != absl::InfiniteFuture()) deadlines_.erase(entry);
}

void Policy::CollectExpired(absl::Time now, std::vector<SchedulerEntry*>* expired) const {
  for (SchedulerEntry* entry : deadlines_) {
    if (entry->deadline > now) break;
    expired->push_back(entry);
  }
}

void Policy::AddPrefillRow(SchedulerEntry* entry, Plan* plan) const {
  int64_t tokens = std::min<int64_t>({options_.prefill_chunk, entry->prompt_tokens - entry->fed,
                                      options_.step_token_budget - plan->tokens});
  if (entry->chunk_boundary > entry->fed) {
    tokens = std::min(tokens, entry->chunk_boundary - entry->fed);
  }
  plan->rows.push_back({entry, static_cast<int32_t>(tokens)});
  plan->tokens += tokens;
}

void Policy::PlanStep(Plan* plan) {
  plan->rows.clear();
  plan->admitted.clear();
  for (SchedulerEntry* entry : decoding_) plan->rows.push_back({entry, 1});
  plan->decode_rows = static_cast<int32_t>(decoding_.size());
  plan->tokens = plan->decode_rows;

  for (SchedulerEntry* entry = prefilling_.front();
       entry != nullptr && plan->tokens < options_.step_token_budget;
       entry = prefilling_.After(entry)) {
    AddPrefillRow(entry, plan);
  }
  while (!waiting_.empty() && running() < static_cast<size_t>(capacity_) &&
         plan->tokens < options_.step_token_budget) {
    SchedulerEntry* const entry = waiting_.front();
    waiting_.Erase(entry);
    entry->phase = Phase::kPrefill;
    entry->slot = free_slots_.back();
    free_slots_.pop_back();
    if (prepare_ != nullptr) {
      prepare_(entry);
      ABSL_RAW_CHECK(entry->fed < entry->prompt_tokens, "a prompt without a token to feed");
    }
    prefilling_.PushBack(entry);
    plan->admitted.push_back(entry);
    AddPrefillRow(entry, plan);
  }
}

void Policy::CompleteStep(const Plan& plan) {
  for (size_t i = plan.decode_rows; i < plan.rows.size(); ++i) {
    SchedulerEntry* const entry = plan.rows[i].entry;
    entry->fed += plan.rows[i].tokens;
    if (entry->fed < entry->prompt_tokens) continue;
    prefilling_.Erase(entry);
    entry->phase = Phase::kDecode;
    Append(&decoding_, entry);
  }
}

void Policy::Pause(SchedulerEntry* entry) {
  ABSL_RAW_CHECK(entry->phase == Phase::kDecode, "only a decoding entry can pause");
  EraseAt(&decoding_, entry);
  entry->phase = Phase::kPaused;
  Append(&paused_, entry);
}

void Policy::Resume(SchedulerEntry* entry) {
  ABSL_RAW_CHECK(entry->phase == Phase::kPaused, "only a paused entry can resume");
  EraseAt(&paused_, entry);
  entry->phase = Phase::kDecode;
  Append(&decoding_, entry);
}

absl::Status AdmissionControl::Admit(int64_t prompt_tokens) {
  if (waiting_ + running_ >= int64_t{options_.capacity} + options_.max_queue) {
    return absl::ResourceExhaustedError(
        absl::StrCat("the queue is full: ", running_, " requests run and ", waiting_, " wait"));
  }
  if (waiting_tokens_ + prompt_tokens > options_.max_queue_tokens) {
    return absl::ResourceExhaustedError(
        absl::StrCat("the queue is full: ", waiting_tokens_, " prompt tokens wait, a request of ",
                     prompt_tokens, " would exceed the limit of ", options_.max_queue_tokens));
  }
  ++waiting_;
  waiting_tokens_ += prompt_tokens;
  return absl::OkStatus();
}

void AdmissionControl::Started(int64_t requests, int64_t prompt_tokens) {
  waiting_ -= requests;
  waiting_tokens_ -= prompt_tokens;
  running_ += requests;
}

void AdmissionControl::EndedWaiting(int64_t requests, int64_t prompt_tokens) {
  waiting_ -= requests;
  waiting_tokens_ -= prompt_tokens;
}

void AdmissionControl::EndedRunning(int64_t requests) { running_ -= requests; }

int64_t AdmissionControl::departures_before_next() const {
  return std::max<int64_t>(0, waiting_ + running_ + 1 - options_.capacity);
}

}  // namespace mmfree

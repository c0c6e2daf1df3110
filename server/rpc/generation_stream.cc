#include "server/rpc/generation_stream.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "server/rpc/conversion.h"

namespace mmfree {
namespace {

// Tokens of one prompt event: some tens of kilobytes, with everything asked for.
constexpr size_t kPromptEventTokens = 1024;

}  // namespace

GenerationStream::GenerationStream(Options options, Engine* engine,
                                   absl::Span<const int32_t> prompt, EventWriter* writer)
    : options_(std::move(options)),
      engine_(engine),
      writer_(writer),
      prompt_tokens_(static_cast<int64_t>(prompt.size())),
      prompt_(options_.echo || options_.prompt_logprobs
                  ? std::vector<int32_t>(prompt.begin(), prompt.end())
                  : std::vector<int32_t>()),
      started_sent_(!options_.announce),
      prompt_sent_(std::min(options_.input_begin, prompt_.size())),
      prompt_decoder_(&engine->tokenizer(), options_.input_starts_text),
      text_(&engine->tokenizer(), options_.starts_text, options_.text) {}

void GenerationStream::Start(const std::shared_ptr<GenerationStream>& self,
                             GenerationRequest request) {
  self->cached_tokens_ = self->engine_->CachedTokens(request);
  absl::StatusOr<RequestHandle> handle = self->engine_->Submit(std::move(request), self);
  if (!handle.ok()) {
    // The engine will never call; nothing was written. The client may be gone, which changes
    // nothing.
    {
      absl::MutexLock lock(&self->mu_);
      self->busy_ = true;
    }
    self->writer_->Finish(WithEngineRetryDelay(handle.status(), *self->engine_));
    return;
  }
  bool cancel;
  {
    absl::MutexLock lock(&self->mu_);
    self->admitted_ = true;
    self->handle_ = *handle;
    cancel = self->cancel_engine_;
  }
  if (cancel) self->engine_->Cancel(*handle);
  self->Pump();
}

void GenerationStream::OnPromptLogprobs(absl::Span<const float> logprobs,
                                        absl::Span<const TokenAlternatives> top) {
  {
    absl::MutexLock lock(&mu_);
    if (client_gone_) return;
    prompt_logprobs_.assign(logprobs.begin(), logprobs.end());
    prompt_top_.assign(top.begin(), top.end());
    has_prompt_logprobs_ = true;
  }
  Pump();
}

void GenerationStream::OnTokens(absl::Span<const SampledToken> tokens) {
  {
    absl::MutexLock lock(&mu_);
    if (client_gone_) return;
    pending_.insert(pending_.end(), tokens.begin(), tokens.end());
    backlog_.fetch_add(tokens.size(), std::memory_order_relaxed);
  }
  Pump();
}

void GenerationStream::OnFinished(const absl::StatusOr<GenerationResult>& result) {
  {
    absl::MutexLock lock(&mu_);
    result_ = result;
  }
  Pump();
}

void GenerationStream::OnWriteDone(bool ok) {
  // A failed write is followed by OnCancel, which knows whether the deadline passed and tells the
  // engine.
  Release(!ok);
  Pump();
}

void GenerationStream::OnCancel(bool deadline_passed) {
  std::optional<RequestHandle> cancel;
  {
    absl::MutexLock lock(&mu_);
    client_gone_ = true;
    if (!deadline_passed) {
      cancel_engine_ = true;
      if (admitted_ && !result_.has_value()) cancel = handle_;
    }
  }
  if (cancel.has_value()) engine_->Cancel(*cancel);
  Pump();
}

void GenerationStream::Release(bool client_gone) {
  absl::MutexLock lock(&mu_);
  client_gone_ |= client_gone;
  backlog_.fetch_sub(in_flight_.size(), std::memory_order_relaxed);
  in_flight_.clear();
  busy_ = false;
}

void GenerationStream::Pump() {
  for (;;) {
    bool client_gone;
    bool prompt_is_next = false;
    std::optional<absl::StatusOr<GenerationResult>> result;
    {
      absl::MutexLock lock(&mu_);
      if (busy_ || !admitted_) return;
      client_gone = client_gone_;
      if (client_gone) {
        backlog_.fetch_sub(pending_.size(), std::memory_order_relaxed);
        pending_.clear();
      }
      prompt_is_next = !client_gone && PromptIsNext();
      const bool tokens_are_next = started_sent_ && !prompt_is_next;
      if (client_gone || (tokens_are_next && pending_.empty())) {
        if (!result_.has_value()) return;
        result = result_;
      } else if (tokens_are_next) {
        in_flight_.swap(pending_);
      }
      busy_ = true;
    }
    if (result.has_value()) {
      End(*result, client_gone);
      return;
    }
    if (!started_sent_) {
      started_sent_ = true;
      MakeStarted();
      writer_->Write(event_);
      return;
    }
    if (prompt_is_next) {
      MakePrompt();
      writer_->Write(event_);
      return;
    }
    if (MakeDelta()) {
      writer_->Write(event_);
      return;
    }
    Release(false);
  }
}

void GenerationStream::End(const absl::StatusOr<GenerationResult>& result, bool client_gone) {
  if (!result.ok()) {
    writer_->Finish(WithEngineRetryDelay(
        WithExcludingFields(result.status(), options_.constraint_field), *engine_));
    return;
  }
  if (client_gone) {
    writer_->Finish(absl::CancelledError("the client is gone"));
    return;
  }
  // Text that was held back goes out before `finished`; nothing is held back then.
  if (std::string tail = text_.Finish(); !tail.empty()) {
    event_.Clear();
    event_.mutable_delta()->set_candidate(options_.candidate);
    event_.mutable_delta()->set_text(std::move(tail));
    writer_->Write(event_);
    return;
  }
  event_.Clear();
  v1::GenerationFinished* finished = event_.mutable_finished();
  finished->set_candidate(options_.candidate);
  ToProto(*result, finished);
  finished->mutable_usage()->set_context_tokens(options_.context_tokens);
  if (result->reason == FinishReason::kStopString && text_.matched() != nullptr) {
    finished->set_stop_string(*text_.matched());
  }
  if (options_.logprobs || options_.cumulative_logprob) {
    finished->set_cumulative_logprob(cumulative_logprob_);
  }
  writer_->WriteLast(event_);
}

void GenerationStream::MakeStarted() {
  event_.Clear();
  v1::GenerationStarted* started = event_.mutable_started();
  started->set_request_id(options_.request_id);
  started->set_model(engine_->model_name());
  started->set_prompt_tokens(prompt_tokens_);
  started->set_cached_tokens(cached_tokens_);
  started->set_seed(options_.seed);
}

bool GenerationStream::PromptIsNext() const {
  if (!started_sent_ || prompt_sent_ == prompt_.size()) return false;
  return !options_.prompt_logprobs || has_prompt_logprobs_;
}

void GenerationStream::MakePrompt() {
  event_.Clear();
  v1::GenerationPrompt* prompt = event_.mutable_prompt();
  const size_t end = std::min(prompt_sent_ + kPromptEventTokens, prompt_.size());
  for (; prompt_sent_ < end; ++prompt_sent_) {
    const int32_t token = prompt_[prompt_sent_];
    if (options_.echo) prompt->mutable_text()->append(prompt_decoder_.Append(token));
    if (options_.echo && options_.return_token_ids) prompt->add_token_ids(token);
    if (options_.prompt_logprobs) {
      SampledToken scored = {token};
      if (prompt_sent_ > 0) {
        scored.logprob = prompt_logprobs_[prompt_sent_ - 1];
        if (!prompt_top_.empty()) scored.top = prompt_top_[prompt_sent_ - 1];
      }
      ToProto(scored, prompt->add_logprobs());
    }
  }
  if (options_.echo && end == prompt_.size()) {
    prompt->mutable_text()->append(prompt_decoder_.Finish());
  }
}

bool GenerationStream::MakeDelta() {
  event_.Clear();
  v1::GenerationDelta* delta = event_.mutable_delta();
  delta->set_candidate(options_.candidate);
  for (const SampledToken& token : in_flight_) {
    delta->mutable_text()->append(text_.Append(token.token));
    if (options_.return_token_ids) delta->add_token_ids(token.token);
    if (options_.logprobs) ToProto(token, delta->add_logprobs());
    cumulative_logprob_ += token.logprob;
  }
  return !delta->text().empty() || options_.return_token_ids || options_.logprobs;
}

}  // namespace mmfree

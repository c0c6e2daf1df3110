#include "server/scheduler/delivery.h"

#include <pthread.h>

#include <utility>

namespace mmfree {
namespace {

// The sink's last call; destroys the request.
void Finish(std::unique_ptr<RequestState> request) {
  if (request->generation_sink != nullptr) {
    if (request->status.ok()) {
      request->generation_sink->OnFinished(request->generation);
    } else {
      request->generation_sink->OnFinished(request->status);
    }
  } else if (request->status.ok()) {
    request->score_sink->OnScored(std::move(request->score));
  } else {
    request->score_sink->OnScored(request->status);
  }
}

}  // namespace

Delivery::Delivery(int num_threads) : outgoing_(num_threads) {
  for (int i = 0; i < num_threads; ++i) {
    shards_.push_back(std::make_unique<Shard>());
    Shard* const shard = shards_.back().get();
    shard->thread = std::thread([this, shard] {
      pthread_setname_np(pthread_self(), "mmfree-deliver");
      Run(shard);
    });
  }
}

Delivery::~Delivery() {
  for (const std::unique_ptr<Shard>& shard : shards_) {
    {
      absl::MutexLock lock(&shard->mutex);
      shard->stopping = true;
    }
    shard->thread.join();
  }
}

void Delivery::AddEnd(std::unique_ptr<RequestState> request) {
  std::vector<Event>& batch = outgoing_[request->id % outgoing_.size()];
  batch.push_back({request.release(), SampledToken(), /*end=*/true});
}

void Delivery::Publish() {
  for (size_t i = 0; i < shards_.size(); ++i) {
    std::vector<Event>& batch = outgoing_[i];
    if (batch.empty()) continue;
    absl::MutexLock lock(&shards_[i]->mutex);
    std::vector<Event>& pending = shards_[i]->pending;
    if (pending.empty()) {
      pending.swap(batch);
    } else {
      pending.insert(pending.end(), batch.begin(), batch.end());
      batch.clear();
    }
  }
}

void Delivery::WaitForEnds(int64_t count) {
  const auto all_delivered = [this, count]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(ends_mutex_) {
    return ends_ >= count;
  };
  absl::MutexLock lock(&ends_mutex_, absl::Condition(&all_delivered));
}

void Delivery::Run(Shard* shard) {
  const auto something_to_do = [shard]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(shard->mutex) {
    return !shard->pending.empty() || shard->stopping;
  };
  std::vector<Event> batch;
  std::vector<RequestState*> touched;
  while (true) {
    {
      absl::MutexLock lock(&shard->mutex);
      shard->mutex.Await(absl::Condition(&something_to_do));
      if (shard->pending.empty()) return;
      batch.swap(shard->pending);
    }
    for (const Event& event : batch) {
      RequestState* const request = event.request;
      if (request->undelivered.empty() && !request->ended) touched.push_back(request);
      if (event.end) {
        request->ended = true;
      } else {
        request->undelivered.push_back(event.token);
      }
    }
    int64_t ends = 0;
    for (RequestState* request : touched) {
      // Complete with the first token, or with an end without one.
      if (request->prompt_logprobs && !request->prompt_delivered &&
          (!request->undelivered.empty() || request->status.ok())) {
        request->prompt_delivered = true;
        request->generation_sink->OnPromptLogprobs(request->score.logprobs, request->prompt_top);
      }
      if (!request->undelivered.empty()) {
        request->generation_sink->OnTokens(request->undelivered);
        request->delivered.fetch_add(static_cast<int64_t>(request->undelivered.size()),
                                     std::memory_order_relaxed);
        request->undelivered.clear();
      }
      if (request->ended) {
        Finish(std::unique_ptr<RequestState>(request));
        ++ends;
      }
    }
    if (ends > 0) {
      absl::MutexLock lock(&ends_mutex_);
      ends_ += ends;
    }
    batch.clear();
    touched.clear();
  }
}

}  // namespace mmfree

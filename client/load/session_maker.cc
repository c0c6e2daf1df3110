#include "client/load/session_maker.h"

#include <grpcpp/grpcpp.h>
#include <unistd.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"

namespace mmfree {

struct SessionMaker::Call {
  grpc::ClientContext context;
  v1::CreateSessionRequest request;
  v1::CreateSessionResponse response;
  absl::Time start;
};

SessionMaker::SessionMaker(const WorkloadOptions& workload, int64_t count, int64_t concurrency,
                           std::vector<std::unique_ptr<v1::SessionService::Stub>> stubs)
    : workload_(workload), count_(count), concurrency_(concurrency), stubs_(std::move(stubs)) {}

SessionReport SessionMaker::Run() {
  const absl::Time begin = absl::Now();
  for (int64_t i = 0; i < concurrency_; ++i) StartNext();
  absl::MutexLock lock(&mutex_);
  const auto done = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return running_ == 0; };
  mutex_.Await(absl::Condition(&done));
  report_.elapsed = absl::Now() - begin;
  return report_;
}

void SessionMaker::StartNext() {
  int64_t index;
  {
    absl::MutexLock lock(&mutex_);
    if (started_ == count_) return;
    index = started_++;
    ++running_;
  }
  auto* const call = new Call;
  PlannedRequest planned = PlanRequest(workload_, index);
  call->request.set_model(workload_.model);
  call->request.set_session_id(SessionId(index));
  *call->request.mutable_token_ids() = std::move(*planned.request.mutable_token_ids());
  call->start = absl::Now();
  stubs_[static_cast<size_t>(index) % stubs_.size()]->async()->CreateSession(
      &call->context, &call->request, &call->response, [this, call](const grpc::Status& status) {
        Ended(*call, status);
        delete call;
      });
}

void SessionMaker::Ended(const Call& call, const grpc::Status& status) {
  {
    absl::MutexLock lock(&mutex_);
    if (status.ok()) {
      ++report_.created;
      report_.create.Add(absl::Now() - call.start);
      report_.checkpoint_bytes = call.response.session().bytes();
    } else {
      const auto code = static_cast<absl::StatusCode>(status.error_code());
      ++report_.errors[absl::StatusCodeToString(code)];
    }
  }
  // The next one first: when none runs any more the run is over, and this object may go.
  StartNext();
  absl::MutexLock lock(&mutex_);
  --running_;
}

std::string ToText(const SessionReport& report) {
  const auto ms = [&](double quantile) {
    return absl::ToDoubleMilliseconds(report.create.Quantile(quantile));
  };
  const double seconds = absl::ToDoubleSeconds(report.elapsed);
  std::string text = absl::StrFormat(
      "%d sessions made in %.2f s, %.0f a second; ms: p50 %.2f, p90 %.2f, p99 %.2f, max %.2f\n"
      "kept of each: %d bytes for a state of %d\n",
      report.created, seconds, static_cast<double>(report.created) / seconds, ms(0.5), ms(0.9),
      ms(0.99), absl::ToDoubleMilliseconds(report.create.max()), report.checkpoint_bytes,
      report.state_bytes);
  if (report.memory_before > 0) {
    absl::StrAppendFormat(&text,
                          "the server's memory: %d bytes before, %d after: %d for each session\n",
                          report.memory_before, report.memory_after, report.memory_per_session());
  }
  for (const auto& [code, count] : report.errors) absl::StrAppend(&text, code, ": ", count, "\n");
  return text;
}

std::string ToJson(const SessionReport& report) {
  nlohmann::ordered_json json = {{"elapsed", absl::ToDoubleSeconds(report.elapsed)},
                                 {"created", report.created},
                                 {"create",
                                  {{"p50", absl::ToDoubleSeconds(report.create.Quantile(0.5))},
                                   {"p90", absl::ToDoubleSeconds(report.create.Quantile(0.9))},
                                   {"p99", absl::ToDoubleSeconds(report.create.Quantile(0.99))},
                                   {"max", absl::ToDoubleSeconds(report.create.max())}}},
                                 {"checkpoint_bytes", report.checkpoint_bytes},
                                 {"state_bytes", report.state_bytes},
                                 {"memory_before", report.memory_before},
                                 {"memory_after", report.memory_after},
                                 {"memory_per_session", report.memory_per_session()},
                                 {"errors", nlohmann::ordered_json::object()}};
  for (const auto& [code, count] : report.errors) json["errors"][code] = count;
  return json.dump();
}

int64_t ResidentBytes(int64_t pid) {
  std::ifstream file(absl::StrCat("/proc/", pid, "/statm"));
  int64_t all = 0;
  int64_t resident = 0;
  int64_t shared = 0;
  file >> all >> resident >> shared;
  return file.good() ? (resident - shared) * sysconf(_SC_PAGESIZE) : 0;
}

}  // namespace mmfree

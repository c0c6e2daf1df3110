// Fixture of tests against a real mmfree-server on the demo model.
#ifndef MMFREE_TESTS_INTEGRATION_LIVE_SERVER_H_
#define MMFREE_TESTS_INTEGRATION_LIVE_SERVER_H_

#include <grpcpp/grpcpp.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "gtest/gtest.h"
#include "mmfree/v1/inference.grpc.pb.h"
#include "mmfree/v1/model.grpc.pb.h"
#include "tests/support/patience.h"
#include "tests/support/process.h"

namespace mmfree {

// What one Generate call gave.
struct Generation {
  grpc::Status status;
  v1::GenerationStarted started;
  std::string text;
  std::vector<int32_t> token_ids;
  v1::GenerationFinished finished;
  std::vector<v1::GenerateResponse> events;
};

class LiveServer : public testing::Test {
 protected:
  void StartServer(const std::vector<std::string>& flags = {});

  Generation Generate(const v1::GenerateRequest& request,
                      absl::Duration timeout = Patience(absl::Minutes(2))) const;
  v1::TokenizeResponse Tokenize(const v1::TokenizeRequest& request) const;
  std::string Detokenize(const std::vector<int32_t>& ids, bool continuation) const;
  v1::GetLoadResponse Load() const;

  // Polls GetLoad until `reached` holds; false after `timeout`.
  bool AwaitLoad(const std::function<bool(const v1::GetLoadResponse&)>& reached,
                 absl::Duration timeout = Patience(absl::Minutes(1))) const;
  // Nothing runs or waits and every slot is free, in GetLoad and in the metrics.
  void ExpectIdle() const;

  // The metrics page.
  std::string Scrape() const;
  // Value of the first series that starts with `series`, e.g. "mmfree_num_requests_running{"; NaN
  // when there is none.
  double Metric(const std::string& series) const;

  std::unique_ptr<ServerProcess> server_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::InferenceService::Stub> inference_;
  std::unique_ptr<v1::ModelService::Stub> models_;
};

// A request for `max_new_tokens` tokens after `text`.
v1::GenerateRequest GreedyRequest(const std::string& text, uint32_t max_new_tokens);

// One that goes on until it is ended from outside.
v1::GenerateRequest EndlessRequest();

// Of a server whose endless streams keep their slots although nobody reads them: without it, one
// that has filled its connection makes room for others.
inline constexpr char kKeepsSlots[] = "--max_stream_backlog=100000";

// Path of a program of this build.
std::string BuiltProgram(const std::string& name);

}  // namespace mmfree

#endif  // MMFREE_TESTS_INTEGRATION_LIVE_SERVER_H_

// Fixture of the tests that exercise the fields of InferenceService's requests.
#ifndef MMFREE_TESTS_INTEGRATION_FIELDS_FIXTURE_H_
#define MMFREE_TESTS_INTEGRATION_FIELDS_FIXTURE_H_

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "tests/integration/live_server.h"
#include "tests/integration/proto_fields.h"

namespace mmfree {

class FieldsTest : public LiveServer {
 protected:
  using Request = v1::GenerateRequest;
  using Set = std::function<void(Request*)>;

  static constexpr char kText[] = "Once upon a time there was an old woman who lived with her son";

  void SetUp() override { StartServer(); }

  // 24 tokens after kText: drawn with a seed, or the likeliest.
  static Request Sampled();
  static Request Greedy();

  // The result of a request that must end well, after `set` has changed it.
  Generation With(
      const Request& request, const Set& set = [](Request*) {}) const;
  std::vector<int32_t> Ids(
      const Request& request, const Set& set = [](Request*) {}) const;
  grpc::StatusCode CodeWith(const Request& request, const Set& set) const;

  // A state to go on from.
  v1::SessionCheckpoint State() const;

  // On a server with one slot, which a request of normal priority holds, what `high` does comes
  // first.
  void ExpectPreempts(const std::function<void(v1::InferenceService::Stub*)>& high) const;

  // Of GenerateRequest: its own fields; those of its messages.
  Exercises GenerateInputs();
  Exercises GenerateSampling() const;
  Exercises GenerateStopping() const;
  Exercises GenerateResponse() const;
};

}  // namespace mmfree

#endif  // MMFREE_TESTS_INTEGRATION_FIELDS_FIXTURE_H_

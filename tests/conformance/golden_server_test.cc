// A real server behind a real client against the reference implementation, on every instruction
// set and on a GPU.
#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <ostream>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "server/base/cpu_features.h"
#include "server/base/status_macros.h"
#include "tests/conformance/golden.h"
#include "tests/support/process.h"
#ifdef MMFREE_HAVE_CUDA
#include "server/backends/cuda/cuda_backend.h"
#endif

namespace mmfree {
namespace {

using Json = nlohmann::json;

// Runs the client and returns what it printed.
absl::StatusOr<std::string> Client(const ServerProcess& server,
                                   const std::vector<std::string>& arguments) {
  MMFREE_ASSIGN_OR_RETURN(const ProgramResult result, server.Client(arguments));
  if (result.exit_code != 0) return absl::InternalError(result.err);
  return result.out;
}

class GoldenServer final : public GoldenSubject {
 public:
  explicit GoldenServer(const ServerProcess* server) : server_(server) {}

  absl::StatusOr<Scored> Score(absl::Span<const int32_t> ids) override {
    MMFREE_ASSIGN_OR_RETURN(
        const std::string out,
        Client(*server_, {"score", absl::StrCat("--token_ids=", absl::StrJoin(ids, ",")),
                          "--last_logits", "--json"}));
    const Json json = Json::parse(out);
    Scored scored;
    json.at("logprobs").get_to(scored.logprobs);
    json.at("argmax").get_to(scored.argmax);
    json.at("last_logits").get_to(scored.last_logits);
    return scored;
  }

  absl::StatusOr<std::vector<int32_t>> Greedy(absl::Span<const int32_t> ids, int count) override {
    MMFREE_ASSIGN_OR_RETURN(
        const std::string out,
        Client(*server_, {"generate", absl::StrCat("--token_ids=", absl::StrJoin(ids, ",")),
                          "--temperature=0", "--ignore_eos", absl::StrCat("--max_tokens=", count),
                          "--json"}));
    std::vector<int32_t> tokens;
    for (const absl::string_view line : absl::StrSplit(out, '\n', absl::SkipEmpty())) {
      const Json event = Json::parse(line.begin(), line.end());
      if (!event.contains("delta")) continue;
      for (const Json& id : event["delta"].at("token_ids")) tokens.push_back(id.get<int32_t>());
    }
    return tokens;
  }

 private:
  const ServerProcess* const server_;
};

// On what the server computes.
struct Device {
  std::string name;
  std::vector<std::string> flags;
  std::function<absl::Status()> usable;  // when not OK, the message says why it is not there
};

void PrintTo(const Device& device, std::ostream* out) { *out << device.name; }

Device OfProcessor(CpuIsa isa) {
  Device device;
  device.name = std::string(CpuIsaName(isa));
  device.flags = {"--backend=cpu", absl::StrCat("--cpu_isa=", device.name)};
  device.usable = [isa] {
    if (CpuSupports(isa)) return absl::OkStatus();
    return absl::UnavailableError(absl::StrCat("this processor has no ", CpuIsaName(isa)));
  };
  return device;
}

Device OfGpu() {
#ifdef MMFREE_HAVE_CUDA
  return {"cuda", {"--backend=cuda"}, [] { return CheckCudaDevice(0); }};
#else
  return {"cuda", {}, [] { return absl::UnavailableError("built without the CUDA backend"); }};
#endif
}

class GoldenServerTest : public testing::TestWithParam<Device> {
 protected:
  void SetUp() override {
    const absl::Status usable = GetParam().usable();
    if (!usable.ok()) GTEST_SKIP() << usable.message();
    absl::StatusOr<std::vector<GoldenCase>> cases =
        LoadGolden(std::string(MMFREE_SOURCE_DIR) + "/tests/golden/tales.safetensors");
    ASSERT_TRUE(cases.ok()) << cases.status();
    cases_ = *std::move(cases);
    absl::StatusOr<std::unique_ptr<ServerProcess>> server = ServerProcess::Start(GetParam().flags);
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
  }

  std::vector<GoldenCase> cases_;
  std::unique_ptr<ServerProcess> server_;
};

TEST_P(GoldenServerTest, ScoresStayWithinTheBoundsOfTheReference) {
  GoldenServer subject(server_.get());
  ExpectScoresConform(cases_, subject);
}

TEST_P(GoldenServerTest, GreedyContinuationsFollowTheReference) {
  GoldenServer subject(server_.get());
  ExpectGreedyConforms(cases_, subject);
}

TEST_P(GoldenServerTest, TextsBecomeTheReferenceTokens) {
  for (const GoldenCase& golden : cases_) {
    // The last case is a long text whose metadata does not hold it.
    if (golden.greedy.empty()) continue;
    const absl::StatusOr<std::string> out =
        Client(*server_, {"tokenize", absl::StrCat("--text=", golden.text), "--json"});
    ASSERT_TRUE(out.ok()) << out.status();
    EXPECT_EQ(Json::parse(*out).at("token_ids").get<std::vector<int32_t>>(), golden.ids)
        << golden.text;
  }
}

INSTANTIATE_TEST_SUITE_P(Device, GoldenServerTest,
                         testing::Values(OfProcessor(CpuIsa::kScalar), OfProcessor(CpuIsa::kAvx2),
                                         OfProcessor(CpuIsa::kAvx512), OfGpu()),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace mmfree

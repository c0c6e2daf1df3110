// A real server behind a real client against the reference implementation, on every instruction
// set.
#include <gtest/gtest.h>

#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "server/base/cpu_features.h"
#include "server/base/status_macros.h"
#include "tests/conformance/golden.h"
#include "tests/support/process.h"

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

class GoldenServerTest : public testing::TestWithParam<CpuIsa> {
 protected:
  void SetUp() override {
    const std::string isa(CpuIsaName(GetParam()));
    if (!CpuSupports(GetParam())) GTEST_SKIP() << "this processor has no " << isa;
    absl::StatusOr<std::vector<GoldenCase>> cases =
        LoadGolden(std::string(MMFREE_SOURCE_DIR) + "/tests/golden/tales.safetensors");
    ASSERT_TRUE(cases.ok()) << cases.status();
    cases_ = *std::move(cases);
    absl::StatusOr<std::unique_ptr<ServerProcess>> server =
        ServerProcess::Start({absl::StrCat("--cpu_isa=", isa)});
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

INSTANTIATE_TEST_SUITE_P(Isa, GoldenServerTest,
                         testing::Values(CpuIsa::kScalar, CpuIsa::kAvx2, CpuIsa::kAvx512),
                         [](const auto& info) { return std::string(CpuIsaName(info.param)); });

}  // namespace
}  // namespace mmfree

// Callers with certificates of their own on one server: they share neither prefixes nor sessions.
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "gmock/gmock.h"
#include "tests/integration/live_server.h"
#include "tests/support/status_is.h"
#include "tests/support/temp_directory.h"

namespace mmfree {
namespace {

using ::testing::HasSubstr;

class CallersTest : public testing::Test {
 protected:
  void SetUp() override {
    for (const char* name : {"server", "alice", "bob"}) {
      const absl::StatusOr<ProgramResult> made = RunProgram(
          {"openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
           "-nodes", "-days", "2", "-subj", absl::StrCat("/CN=", name), "-addext",
           "subjectAltName=IP:127.0.0.1,DNS:" + std::string(name), "-keyout", Key(name), "-out",
           Cert(name)});
      if (!made.ok() || made->exit_code != 0) {
        GTEST_SKIP() << "the openssl program is not installed";
      }
    }
    // Each client certificate signs itself.
    ASSERT_THAT(RunProgram({"sh", "-c",
                            absl::StrCat("cat ", Cert("alice"), " ", Cert("bob"), " > ",
                                         directory_.File("callers.pem"))}),
                IsOk());
    absl::StatusOr<std::unique_ptr<ServerProcess>> server =
        ServerProcess::Start({"--tls_cert=" + Cert("server"), "--tls_key=" + Key("server"),
                              "--tls_client_ca=" + directory_.File("callers.pem")});
    ASSERT_THAT(server, IsOk());
    server_ = *std::move(server);
  }

  std::string Cert(const std::string& name) const { return directory_.File(name + ".cert"); }
  std::string Key(const std::string& name) const { return directory_.File(name + ".key"); }

  // Runs the client as this caller.
  ProgramResult As(const std::string& caller, std::vector<std::string> arguments) const {
    arguments.insert(arguments.begin(), {"--tls", "--tls_ca=" + Cert("server"),
                                         "--tls_cert=" + Cert(caller), "--tls_key=" + Key(caller)});
    const absl::StatusOr<ProgramResult> result = server_->Client(arguments);
    EXPECT_THAT(result, IsOk());
    return result.ok() ? *result : ProgramResult();
  }

  static constexpr char kPrompt[] =
      "Once upon a time, in the middle of a dark forest, there lived an old man who had three "
      "sons, and the youngest of them was called the simpleton.";

  struct Answer {
    int64_t cached = -1;  // tokens of the prompt
    std::string text;
  };
  Answer Generate(const std::string& caller, std::vector<std::string> flags = {}) const {
    std::vector<std::string> arguments = {"generate", absl::StrCat("--prompt=", kPrompt),
                                          "--max_tokens=4", "--temperature=0", "--json"};
    arguments.insert(arguments.end(), flags.begin(), flags.end());
    const ProgramResult result = As(caller, arguments);
    EXPECT_EQ(result.exit_code, 0) << result.err;
    Answer answer;
    for (const absl::string_view line : absl::StrSplit(result.out, '\n', absl::SkipEmpty())) {
      const nlohmann::json event = nlohmann::json::parse(line.begin(), line.end());
      if (event.contains("delta")) answer.text += event["delta"]["text"].get<std::string>();
      if (event.contains("finished")) {
        answer.cached = event["finished"]["usage"]["cached_tokens"].get<int64_t>();
      }
    }
    return answer;
  }

  const TempDirectory directory_;
  std::unique_ptr<ServerProcess> server_;
};

TEST_F(CallersTest, NeverShareAPrefix) {
  const Answer first = Generate("alice");
  EXPECT_EQ(first.cached, 0);
  EXPECT_GT(Generate("alice").cached, 16);
  const Answer other = Generate("bob");
  EXPECT_EQ(other.cached, 0) << "bob can tell what alice sent";
  EXPECT_EQ(other.text, first.text);
  EXPECT_GT(Generate("bob").cached, 16);
  EXPECT_EQ(Generate("bob", {"--cache_salt=x"}).cached, 0);
}

TEST_F(CallersTest, NeverSeeEachOthersSessions) {
  EXPECT_EQ(As("alice", {"sessions", "create", "--session=talk"}).exit_code, 0);
  EXPECT_EQ(Generate("alice", {"--session=talk"}).cached, 0);
  for (const std::vector<std::string>& attempt :
       std::vector<std::vector<std::string>>{{"sessions", "get", "--session=talk"},
                                             {"sessions", "fork", "--session=talk"},
                                             {"sessions", "delete", "--session=talk"},
                                             {"generate", "--session=talk", "--prompt=x"}}) {
    const ProgramResult result = As("bob", attempt);
    EXPECT_EQ(result.exit_code, 1) << attempt[0] << " " << attempt[1];
    EXPECT_THAT(result.err, HasSubstr("NOT_FOUND"));
  }
  // The name is free for bob, and stays another session.
  EXPECT_EQ(As("bob", {"sessions", "create", "--session=talk"}).exit_code, 0);
  EXPECT_THAT(As("bob", {"sessions", "get", "--session=talk"}).out, HasSubstr("turn 0"));
  EXPECT_THAT(As("alice", {"sessions", "get", "--session=talk"}).out, HasSubstr("turn 1"));
}

}  // namespace
}  // namespace mmfree

// `mmfree chat` and `mmfree sessions` against real servers. What chat prints is what turns without
// interruption give.
#include <signal.h>

#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "tests/integration/session_fixture.h"
#include "tests/support/holding_proxy.h"
#include "tests/support/status_is.h"
#include "tests/support/temp_directory.h"

namespace mmfree {
namespace {

using ::testing::HasSubstr;

class ChatTest : public SessionFixture {
 protected:
  // Through the proxy, which outlives servers.
  std::unique_ptr<InteractiveProgram> Chat(const std::vector<std::string>& flags) {
    std::vector<std::string> command = {BuiltProgram("mmfree"),
                                        absl::StrCat("--server=127.0.0.1:", proxy_->port()),
                                        "chat",
                                        "--seed=7",
                                        "--max_tokens=8",
                                        "--ignore_eos",
                                        "--stats",
                                        "--reconnect=10m"};
    command.insert(command.end(), flags.begin(), flags.end());
    absl::StatusOr<std::unique_ptr<InteractiveProgram>> chat = InteractiveProgram::Start(command);
    EXPECT_THAT(chat, IsOk());
    return chat.ok() ? *std::move(chat) : nullptr;
  }
  void Serve(const std::vector<std::string>& flags) {
    Start(flags);
    if (proxy_ == nullptr) {
      proxy_ = std::make_unique<HoldingProxy>(server_->port());
    } else {
      proxy_->SetTarget(server_->port());
    }
  }
  // The answer to a line, as it is printed.
  std::string Answer(Mirror* mirror, const std::string& line) {
    return Detokenize(Expect(mirror, line + "\n", 8), /*continuation=*/true) + "\n";
  }
  nlohmann::json Sessions(std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), "sessions");
    arguments.emplace_back("--json");
    const absl::StatusOr<ProgramResult> result = server_->Client(arguments);
    EXPECT_THAT(result, IsOk());
    EXPECT_EQ(result->exit_code, 0) << result->err;
    return nlohmann::json::parse(result->out, nullptr, /*allow_exceptions=*/false);
  }

  std::unique_ptr<HoldingProxy> proxy_;
};

TEST_F(ChatTest, GoesOnWhenItsServerWasKilledAndStartedAgain) {
  const TempDirectory directory;
  const std::vector<std::string> flags = {"--session_store=rocksdb:" + directory.File("sessions")};
  Serve(flags);
  Mirror mirror = {Create("talk"), {}, 0};
  std::string expected = Answer(&mirror, "Once upon a time");
  const auto chat = Chat({"--session=talk"});
  ASSERT_NE(chat, nullptr);
  ASSERT_TRUE(chat->AwaitError("session talk, turn 0"));
  chat->Say("Once upon a time");
  ASSERT_TRUE(chat->AwaitError("[turn 1: 0 tokens of the context reused"));
  const size_t fed = mirror.context.size() - 1;  // the last one is pending
  expected += Answer(&mirror, "there was a fox");

  server_->Signal(SIGKILL);
  ASSERT_THAT(server_->Wait(), IsOk());
  chat->Say("there was a fox");
  ASSERT_TRUE(chat->AwaitError("the server is away"));
  Serve(flags);
  ASSERT_TRUE(chat->AwaitError(absl::StrCat("[turn 2: ", fed, " tokens of the context reused")));
  const absl::StatusOr<ProgramResult> ended = chat->Finish();
  ASSERT_THAT(ended, IsOk());
  EXPECT_EQ(ended->exit_code, 0);
  // The first attempt at the turn printed nothing.
  EXPECT_EQ(ended->out, expected);
  EXPECT_EQ(Get("talk").turn(), 2u);
}

TEST_F(ChatTest, ForksAndRewinds) {
  Serve({});
  const auto chat = Chat({"--system_prompt=Once upon a time"});
  ASSERT_NE(chat, nullptr);
  ASSERT_TRUE(chat->AwaitError(", turn 0, "));
  v1::ListSessionsRequest list;
  v1::ListSessionsResponse listed;
  ASSERT_TRUE(Call(&v1::SessionService::Stub::ListSessions, list, &listed).ok());
  ASSERT_EQ(listed.sessions_size(), 1);
  Mirror mirror = {listed.sessions(0).id(), {}, 0};
  Expect(&mirror, "Once upon a time", 0);
  std::string expected = Answer(&mirror, " there was");
  expected += Answer(&mirror, " a king");
  Mirror fork = mirror;
  expected += Answer(&fork, " in a fork");
  Mirror rewound = mirror;
  expected += Answer(&rewound, " another way");

  chat->Say(" there was");
  ASSERT_TRUE(chat->AwaitError("[turn 1:"));
  chat->Say(" a king");
  ASSERT_TRUE(chat->AwaitError("[turn 2:"));
  chat->Say("/fork");
  ASSERT_TRUE(chat->AwaitError(", turn 2, "));
  chat->Say(" in a fork");
  ASSERT_TRUE(chat->AwaitError("[turn 3:"));
  chat->Say("/rewind 9");
  ASSERT_TRUE(chat->AwaitError("turn 9"));
  chat->Say("/nonsense");
  ASSERT_TRUE(chat->AwaitError("commands are"));
  chat->Say("/rewind 2");
  ASSERT_TRUE(chat->AwaitError(", turn 2, "));
  chat->Say(" another way");
  ASSERT_TRUE(chat->AwaitError("[turn 3:"));
  chat->Say("/session");
  ASSERT_TRUE(chat->AwaitError(", turn 3, "));
  chat->Say("/quit");
  const absl::StatusOr<ProgramResult> ended = chat->Finish();
  ASSERT_THAT(ended, IsOk());
  EXPECT_EQ(ended->exit_code, 0);
  EXPECT_EQ(ended->out, expected);
  EXPECT_EQ(Get(mirror.id).turn(), 2u) << "the fork's turns are its own";
  EXPECT_EQ(Get(mirror.id).token_count(), static_cast<int64_t>(mirror.context.size()));
}

TEST_F(ChatTest, SessionsCommandDoesAllThereIs) {
  const TempDirectory directory;
  Serve({});
  EXPECT_EQ(Sessions({"create", "--session=a", "--system_prompt=Once"})["id"], "a");
  const absl::StatusOr<ProgramResult> turn =
      server_->Client({"generate", "--session=a", "--prompt= upon", "--max_tokens=5", "--json"});
  ASSERT_THAT(turn, IsOk());
  EXPECT_THAT(turn->out, HasSubstr("\"session_turn\":1"));
  EXPECT_THAT(turn->out, HasSubstr("\"context_tokens\":1"));
  EXPECT_EQ(Sessions({"get", "--session=a"})["turn"], 1);
  EXPECT_EQ(Sessions({"fork", "--session=a", "--turn=0", "--new_session=b"})["turn"], 0);
  EXPECT_EQ(Sessions({"list"})["sessions"].size(), 2u);
  const std::string file = directory.File("a.session");
  ASSERT_THAT(server_->Client({"sessions", "export", "--session=a", "--output=" + file}), IsOk());
  EXPECT_EQ(Sessions({"import", "--input=" + file, "--session=c"})["id"], "c");
  EXPECT_EQ(Export("a").body(), Export("c").body());
  EXPECT_EQ(Sessions({"rewind", "--session=a", "--turn=0"})["turn"], 0);
  const absl::StatusOr<ProgramResult> gone = server_->Client({"sessions", "delete", "--session=a"});
  ASSERT_THAT(gone, IsOk());
  EXPECT_EQ(gone->exit_code, 0);
  const absl::StatusOr<ProgramResult> none = server_->Client({"sessions", "get", "--session=a"});
  ASSERT_THAT(none, IsOk());
  EXPECT_EQ(none->exit_code, 1);
  EXPECT_THAT(none->err, HasSubstr("NOT_FOUND"));
}

}  // namespace
}  // namespace mmfree

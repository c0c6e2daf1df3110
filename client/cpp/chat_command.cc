#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <iostream>
#include <string>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "absl/time/clock.h"
#include "client/cpp/command.h"
#include "client/cpp/generate_flags.h"
#include "server/base/status_macros.h"

namespace mmfree {
namespace {

constexpr char kIntro[] = R"(mmfree chat: a conversation in a session, which the server keeps.

  mmfree chat [--session=ID] [--system_prompt=TEXT] [flags]

Each line of the standard input is a turn; the answer is printed as it is made. With --session the
conversation of that session goes on, otherwise a new one starts, whose id is printed. When the server
goes away, chat waits for it (or for another replica with the same store) and sends the turn again;
a turn is never taken twice.

Lines that start with / are commands:
  /rewind N   forget the turns after turn N     /fork   go on in a copy, printing its id
  /session    print the session's id and turn   /quit   end (so does the end of the input)

)";

// At least so long between two attempts to reach a server; it may ask for more.
constexpr absl::Duration kRetryDelay = absl::Milliseconds(200);

class ChatCommand final : public Command {
 public:
  std::string Intro() const override { return kIntro; }

  void AddFlags(FlagSet* flags) override {
    AddGenerateFlags(&request_, flags);
    flags->AddHeading("Conversation:");
    flags->Add("system_prompt", &system_prompt_, "TEXT", "what a new conversation starts with");
    flags->Add("before", &before_, "TEXT", "put before each line");
    flags->Add("after", &after_, "TEXT", "put after each line (default: a newline)");
    flags->Add("stats", &stats_, "",
               "a line about each turn, to the standard error stream: tokens of\nthe context that "
               "were not computed again, fed and generated");
    flags->Add("reconnect", &reconnect_, "TIME",
               "wait so long for a server that went away (default 1m)");
  }

  absl::Status Check(const std::vector<std::string>& arguments, bool json) override {
    if (json) return absl::InvalidArgumentError("chat has no --json; use generate --session=ID");
    return ExpectNoArguments(arguments);
  }

  absl::Status Run(Client* client) override {
    MMFREE_RETURN_IF_ERROR(Open(client));
    std::string line;
    for (;;) {
      if (isatty(STDIN_FILENO) != 0) std::cerr << "> " << std::flush;
      if (!std::getline(std::cin, line)) return absl::OkStatus();
      if (line == "/quit") return absl::OkStatus();
      if (absl::StartsWith(line, "/")) {
        // A wrong command or a turn that is no longer kept does not end the conversation.
        const absl::Status status = RunCommand(client, line);
        if (!status.ok()) std::cerr << "mmfree: " << status.message() << "\n";
        continue;
      }
      MMFREE_RETURN_IF_ERROR(Say(client, absl::StrCat(before_, line, after_)));
    }
  }

 private:
  void PrintSession(const v1::Session& session) {
    request_.set_session_id(session.id());
    turn_ = session.turn();
    std::cerr << "session " << session.id() << ", turn " << session.turn() << ", "
              << session.token_count() << " tokens\n";
  }

  static void PrintStats(const v1::GenerationFinished& finished) {
    const v1::Usage& usage = finished.usage();
    std::cerr << "[turn " << finished.session_turn() << ": " << usage.context_tokens()
              << " tokens of the context reused, " << usage.prompt_tokens() << " fed, "
              << usage.completion_tokens() << " generated]\n";
  }

  absl::Status Open(Client* client) {
    if (!request_.session_id().empty()) return PrintPresent(client);
    v1::CreateSessionRequest create;
    create.set_model(request_.model());
    if (!system_prompt_.empty()) create.set_text(system_prompt_);
    MMFREE_ASSIGN_OR_RETURN(const v1::CreateSessionResponse created, client->CreateSession(create));
    PrintSession(created.session());
    return absl::OkStatus();
  }

  absl::Status PrintPresent(Client* client) {
    v1::GetSessionRequest get;
    get.set_session_id(request_.session_id());
    MMFREE_ASSIGN_OR_RETURN(const v1::GetSessionResponse got, client->GetSession(get));
    PrintSession(got.session());
    return absl::OkStatus();
  }

  absl::Status RunCommand(Client* client, absl::string_view line) {
    uint64_t turn = 0;
    if (line == "/session") return PrintPresent(client);
    if (line == "/fork") {
      v1::ForkSessionRequest fork;
      fork.set_session_id(request_.session_id());
      MMFREE_ASSIGN_OR_RETURN(const v1::ForkSessionResponse forked, client->ForkSession(fork));
      PrintSession(forked.session());
      return absl::OkStatus();
    }
    if (absl::ConsumePrefix(&line, "/rewind ") && absl::SimpleAtoi(line, &turn)) {
      v1::RewindSessionRequest rewind;
      rewind.set_session_id(request_.session_id());
      rewind.set_turn(turn);
      MMFREE_ASSIGN_OR_RETURN(const v1::RewindSessionResponse rewound,
                              client->RewindSession(rewind));
      PrintSession(rewound.session());
      return absl::OkStatus();
    }
    return absl::InvalidArgumentError("commands are /rewind N, /fork, /session and /quit");
  }

  // One turn, sent again while the server is away. expected_turn keeps one whose answer was lost
  // from being taken twice.
  absl::Status Say(Client* client, const std::string& text) {
    request_.set_text(text);
    request_.set_expected_turn(turn_);
    const absl::Time give_up = absl::Now() + reconnect_;
    bool sent_before = false;
    for (;;) {
      v1::GenerationFinished finished;
      absl::Status status = client->Generate(request_, [&](const v1::GenerateResponse& event) {
        fwrite(event.delta().text().data(), 1, event.delta().text().size(), stdout);
        fflush(stdout);
        if (event.has_finished()) finished = event.finished();
      });
      if (status.ok()) {
        PrintLine("");
        turn_ = finished.session_turn();
        if (stats_) PrintStats(finished);
        return absl::OkStatus();
      }
      if (sent_before && absl::IsAborted(status)) {
        // Either the turn was taken, or the server has not noticed yet that its client was gone.
        v1::GetSessionRequest get;
        get.set_session_id(request_.session_id());
        const absl::StatusOr<v1::GetSessionResponse> got = client->GetSession(get);
        if (got.ok() && got->session().turn() != request_.expected_turn()) {
          std::cerr << "(the server had taken the turn; the end of its answer was lost)\n";
          PrintSession(got->session());
          return absl::OkStatus();
        }
      } else if (!absl::IsUnavailable(status)) {
        return status;
      }
      if (absl::Now() >= give_up) return status;
      if (!sent_before) {
        std::cerr << "\n(the server is away: " << status.message() << "; trying again)\n";
      }
      sent_before = true;
      client->AwaitConnection(std::max(absl::ZeroDuration(), give_up - absl::Now()));
      absl::SleepFor(std::max(DetailsOf(status).retry_delay, kRetryDelay));
    }
  }

  v1::GenerateRequest request_;
  uint64_t turn_ = 0;
  bool stats_ = false;
  std::string system_prompt_;
  std::string before_;
  std::string after_ = "\n";
  absl::Duration reconnect_ = absl::Minutes(1);
};

}  // namespace

std::unique_ptr<Command> MakeChatCommand() { return std::make_unique<ChatCommand>(); }

}  // namespace mmfree

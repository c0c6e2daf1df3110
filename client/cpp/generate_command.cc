#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdio>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/strip.h"
#include "client/cpp/command.h"
#include "client/cpp/generate_flags.h"
#include "client/cpp/json.h"
#include "server/base/status_macros.h"

namespace mmfree {
namespace {

constexpr char kIntro[] =
    R"(mmfree generate: continues a text, printing it as it is made.

  mmfree generate --prompt=TEXT [flags]
  mmfree generate --prompt_file=FILE [flags]
  mmfree generate --token_ids=1,2,3 [flags]

Exactly the generated text goes to the standard output; everything else to the standard error
stream. With --candidates=N each text is printed whole, after a line "[candidate I]". With --json the
output is one object a line: {"started":{..}}, {"delta":{..}} for new tokens, {"finished":{..}}.
Ctrl-C cancels. A flag that is not given leaves its field unset; the server's default then holds.

Examples:
  mmfree generate --prompt="Once upon a time" --max_tokens=100 --temperature=0.8 --seed=7
  mmfree generate --prompt_file=- --temperature=0 --json < prompt.txt

)";

// Cancels on SIGINT, which must be blocked in every thread.
class InterruptWatcher {
 public:
  // Made before any other thread.
  InterruptWatcher() {
    sigemptyset(&signals_);
    sigaddset(&signals_, SIGINT);
    pthread_sigmask(SIG_BLOCK, &signals_, nullptr);
  }
  ~InterruptWatcher() {
    if (!thread_.joinable()) return;
    ending_ = true;
    pthread_kill(thread_.native_handle(), SIGINT);
    thread_.join();
  }
  // At most once.
  void Start() {
    thread_ = std::thread([this] {
      if (!AwaitInterrupt()) return;
      interrupted_ = true;
      token_.Cancel();
      // A second one does not wait for the server.
      if (AwaitInterrupt()) _exit(kExitInterrupted);
    });
  }
  CancelToken* token() { return &token_; }
  bool interrupted() const { return interrupted_; }

 private:
  // False when there is nothing left to interrupt.
  bool AwaitInterrupt() {
    int signal = 0;
    sigwait(&signals_, &signal);
    return !ending_;
  }

  sigset_t signals_;
  CancelToken token_;
  std::atomic<bool> interrupted_{false};
  std::atomic<bool> ending_{false};
  std::thread thread_;
};

class GenerateCommand final : public Command {
 public:
  std::string Intro() const override { return kIntro; }

  void AddFlags(FlagSet* flags) override {
    flags->AddHeading("Input, one of:");
    flags->Add("prompt", &prompt_, "TEXT", "the text to continue; may be empty");
    flags->Add("prompt_file", &prompt_file_, "FILE",
               "read the text from a file; - is the standard input");
    flags->Add("token_ids", &token_ids_, "IDS", "token ids, taken as given: 1,2,3");
    AddGenerateFlags(&request_, flags);
    flags->AddHeading("Output:");
    flags->Add("return_token_ids", &return_token_ids_, "",
               "ids in the deltas of --json (default true)");
    flags->Add("stats", &stats_, "", "a line about the run, to the standard error stream");
  }

  absl::Status Check(const std::vector<std::string>& arguments, bool json) override {
    MMFREE_RETURN_IF_ERROR(ExpectNoArguments(arguments));
    json_ = json;
    const int inputs = (prompt_.has_value() ? 1 : 0) + (prompt_file_.has_value() ? 1 : 0) +
                       (token_ids_.has_value() ? 1 : 0);
    if (inputs > 1) {
      return absl::InvalidArgumentError("give one of --prompt, --prompt_file and --token_ids");
    }
    if (inputs == 0 && request_.session_id().empty()) {
      return absl::InvalidArgumentError(
          "no input: give --prompt=TEXT, --prompt_file=FILE or --token_ids=1,2,3");
    }
    const v1::ResponseOptions& response = request_.response();
    if (!json && (response.logprobs() || response.prompt_logprobs() || response.return_state() ||
                  return_token_ids_.has_value())) {
      return absl::InvalidArgumentError(
          "what was asked for does not show in plain text; add --json");
    }
    if (prompt_.has_value()) request_.set_text(*prompt_);
    if (prompt_file_.has_value()) {
      MMFREE_ASSIGN_OR_RETURN(*request_.mutable_text(), ReadInput(*prompt_file_));
    }
    if (token_ids_.has_value()) {
      request_.mutable_token_ids()->mutable_ids()->Add(token_ids_->begin(), token_ids_->end());
    }
    request_.mutable_response()->set_return_token_ids(json && return_token_ids_.value_or(true));
    return absl::OkStatus();
  }

  absl::Status Run(Client* client) override {
    interrupts_.Start();
    const absl::Status status = client->Generate(
        request_, [this](const v1::GenerateResponse& event) { OnEvent(event); },
        interrupts_.token());
    // A prompt of the shell belongs on a line of its own; a file gets the text and nothing else.
    if (!json_ && isatty(STDOUT_FILENO) != 0) PrintLine("");
    if (interrupts_.interrupted() && absl::IsCancelled(status)) {
      exit_status_ = kExitInterrupted;
      return absl::OkStatus();
    }
    return status;
  }

  int exit_status() const override { return exit_status_; }

 private:
  void OnEvent(const v1::GenerateResponse& event) {
    if (json_) {
      PrintLine(ToJson(event));
    } else {
      Print(event.prompt().text());
      PrintOutput(event);
    }
    if (event.has_started()) seed_ = event.started().seed();
    if (stats_ && event.has_finished()) PrintStats(event.finished());
  }

  // Several candidates arrive interleaved: each is printed whole, under its number, once those
  // before it are.
  void PrintOutput(const v1::GenerateResponse& event) {
    if (request_.candidates() <= 1) {
      Print(event.delta().text());
      return;
    }
    candidates_.resize(request_.candidates());
    if (event.has_delta() && event.delta().candidate() < candidates_.size()) {
      candidates_[event.delta().candidate()].text += event.delta().text();
    }
    if (event.has_finished() && event.finished().candidate() < candidates_.size()) {
      candidates_[event.finished().candidate()].finished = true;
    }
    for (; printed_ < candidates_.size() && candidates_[printed_].finished; ++printed_) {
      Print(absl::StrCat("[candidate ", printed_, "]\n", candidates_[printed_].text, "\n"));
    }
  }

  static void Print(absl::string_view text) {
    if (text.empty()) return;
    fwrite(text.data(), 1, text.size(), stdout);
    fflush(stdout);
  }

  void PrintStats(const v1::GenerationFinished& finished) const {
    const google::protobuf::Duration& decode = finished.timings().decode();
    const google::protobuf::Duration& prefill = finished.timings().prefill();
    const double decode_seconds = static_cast<double>(decode.seconds()) + decode.nanos() * 1e-9;
    const double prefill_seconds = static_cast<double>(prefill.seconds()) + prefill.nanos() * 1e-9;
    const int64_t context = finished.usage().context_tokens();
    // The first token is prefill's.
    const int64_t decoded = finished.usage().completion_tokens() - 1;
    absl::FPrintF(
        stderr,
        "\n[%s; %sprompt %d tokens, %d cached, in %.3f s; %d tokens, %.1f tokens/s; seed %d]\n",
        absl::StripPrefix(v1::FinishReason_Name(finished.finish_reason()), "FINISH_REASON_"),
        context > 0 ? absl::StrCat("context of ", context, " tokens reused, ") : "",
        finished.usage().prompt_tokens(), finished.usage().cached_tokens(), prefill_seconds,
        finished.usage().completion_tokens(),
        decoded > 0 && decode_seconds > 0 ? decoded / decode_seconds : 0.0, seed_);
  }

  std::optional<std::string> prompt_;
  std::optional<std::string> prompt_file_;
  std::optional<std::vector<int32_t>> token_ids_;
  std::optional<bool> return_token_ids_;
  bool stats_ = false;
  bool json_ = false;
  uint64_t seed_ = 0;
  int exit_status_ = kExitOk;
  v1::GenerateRequest request_;
  struct Candidate {
    std::string text;
    bool finished = false;
  };
  std::vector<Candidate> candidates_;  // with several
  size_t printed_ = 0;                 // of them
  InterruptWatcher interrupts_;
};

}  // namespace

std::unique_ptr<Command> MakeGenerateCommand() { return std::make_unique<GenerateCommand>(); }

}  // namespace mmfree

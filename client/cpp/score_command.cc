#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "client/cpp/command.h"
#include "client/cpp/json.h"
#include "server/base/status_macros.h"

namespace mmfree {
namespace {

constexpr char kIntro[] =
    R"(mmfree score: the log-probability of every token of a text.

  mmfree score --text=TEXT [flags]
  mmfree score --text_file=FILE [flags]
  mmfree score --token_ids=1,2,3 [flags]
  mmfree score --file=FILE [flags]

Prints a line for each token: position, id, log-probability given the tokens before it (none for
the first), and the likeliest token after it; then the mean and the perplexity to the standard error
stream. --json prints one object: {"token_ids":[..],"logprobs":[..],"argmax":[..],"last_logits":[..]};
logprobs[i] is of token i+1, argmax[i] the likeliest token after token i. Text gets BOS in front;
token ids are taken as given.

--file scores each line of a file that is not empty as a text of its own, many at a time, and prints a
line for each: number of its line, tokens, mean log-probability and perplexity; with --json the object
above for each. The perplexity of all of them together goes to the standard error stream, as does the
progress when that is a terminal. A server that admits fewer texts at a time gets fewer, and one that is
full is asked again when it says, until it has refused for as long as --patience.

Examples:
  mmfree score --text="The cat sat on the mat." --json
  mmfree score --file=sentences.txt > scores.tsv

)";

// Texts of one call: what the server takes at most.
constexpr size_t kTextsPerCall = 64;

// What a server that is full asks to wait is kept to, within these.
constexpr absl::Duration kShortestPause = absl::Milliseconds(50);
constexpr absl::Duration kLongestPause = absl::Seconds(2);

// Log-probabilities added up.
struct Total {
  int64_t tokens = 0;  // that have one
  double sum = 0.0;

  void Add(const v1::ScoreResult& result) {
    tokens += result.logprobs_size();
    for (const float logprob : result.logprobs()) sum += logprob;
  }
  double mean() const { return tokens == 0 ? 0.0 : sum / static_cast<double>(tokens); }
  double perplexity() const { return std::exp(-mean()); }
};

class ScoreCommand final : public Command {
 public:
  std::string Intro() const override { return kIntro; }

  void AddFlags(FlagSet* flags) override {
    flags->AddHeading("Input, one of:");
    flags->Add("text", &text_, "TEXT", "the text; may be empty");
    flags->Add("text_file", &text_file_, "FILE",
               "read the text from a file; - is the standard input");
    flags->Add("token_ids", &token_ids_, "IDS", "token ids, taken as given: 1,2,3");
    flags->Add("file", &file_, "FILE", "many texts, one a line; - is the standard input");
    flags->Add("patience", &patience_, "TIME",
               "with --file: how long to keep asking a server that is full\n(default 10m; 0: not "
               "at all)");
    flags->AddHeading("Request:");
    flags->AddSetter<std::string>("model", "NAME", "the model (default: the only one)",
                                  [this](const std::string& v) { request_.set_model(v); });
    flags->AddSetter<std::string>("request_id", "ID", "name in the server's logs",
                                  [this](const std::string& v) { request_.set_request_id(v); });
    flags->AddSetter<bool>("last_logits", "", "the logits after the last token too (needs --json)",
                           [this](bool v) { request_.set_last_logits(v); });
  }

  absl::Status Check(const std::vector<std::string>& arguments, bool json) override {
    MMFREE_RETURN_IF_ERROR(ExpectNoArguments(arguments));
    json_ = json;
    if ((text_.has_value() ? 1 : 0) + (text_file_.has_value() ? 1 : 0) +
            (token_ids_.has_value() ? 1 : 0) + (file_.has_value() ? 1 : 0) !=
        1) {
      return absl::InvalidArgumentError("give one of --text, --text_file, --token_ids and --file");
    }
    if (request_.last_logits() && !json) {
      return absl::InvalidArgumentError("--last_logits needs --json");
    }
    if (file_.has_value()) return ReadTexts(*file_);
    v1::ScoreInput* const input = request_.add_inputs();
    if (text_.has_value()) input->set_text(*text_);
    if (text_file_.has_value()) {
      MMFREE_ASSIGN_OR_RETURN(*input->mutable_text(), ReadInput(*text_file_));
    }
    if (token_ids_.has_value()) {
      input->mutable_token_ids()->mutable_ids()->Add(token_ids_->begin(), token_ids_->end());
    }
    return absl::OkStatus();
  }

  absl::Status Run(Client* client) override {
    if (file_.has_value()) return ScoreTexts(client);
    MMFREE_ASSIGN_OR_RETURN(const v1::ScoreResponse response, client->Score(request_));
    if (response.results_size() != 1) {
      return absl::InternalError("the server gave another number of results than texts");
    }
    const v1::ScoreResult& result = response.results(0);
    if (json_) {
      PrintLine(ToJson(result));
      return absl::OkStatus();
    }
    Total total;
    total.Add(result);
    for (int i = 0; i < result.token_ids_size(); ++i) {
      const bool scored = i > 0 && i <= result.logprobs_size();
      PrintLine(absl::StrFormat("%d\t%d\t%s\t%d", i, result.token_ids(i),
                                scored ? absl::StrFormat("%.6f", result.logprobs(i - 1)) : "-",
                                i < result.argmax_size() ? result.argmax(i) : -1));
    }
    PrintTotal(total);
    return absl::OkStatus();
  }

 private:
  // A text and the number of its line.
  using Line = std::pair<int64_t, std::string>;

  absl::Status ReadTexts(const std::string& path) {
    MMFREE_ASSIGN_OR_RETURN(const std::string content, ReadInput(path));
    int64_t number = 0;
    for (absl::string_view line : absl::StrSplit(content, '\n')) {
      ++number;
      absl::ConsumeSuffix(&line, "\r");
      if (!line.empty()) texts_.emplace_back(number, line);
    }
    if (texts_.empty()) {
      return absl::InvalidArgumentError(absl::StrCat(path, ": no line has text"));
    }
    return absl::OkStatus();
  }

  absl::Status ScoreTexts(Client* client) {
    const bool progress = isatty(STDERR_FILENO) != 0;
    const auto show = [progress](const std::string& text) {
      // The results may share the terminal.
      if (progress) absl::FPrintF(stderr, "\r\033[K%s", text);
    };
    Total all;
    size_t most = kTextsPerCall;  // that the server admits at once, as far as is known
    size_t count = most;
    std::optional<absl::Time> full_since;
    for (size_t first = 0; first < texts_.size();) {
      count = std::min({count, most, texts_.size() - first});
      v1::ScoreRequest request = request_;
      for (size_t i = 0; i < count; ++i) request.add_inputs()->set_text(texts_[first + i].second);
      absl::StatusOr<v1::ScoreResponse> response = client->Score(request);
      show("");
      if (count > 1 && AreTooMany(response.status())) {
        most = count / 2;
        continue;
      }
      if (absl::IsResourceExhausted(response.status())) {
        const absl::Time now = absl::Now();
        if (!full_since.has_value()) full_since = now;
        const absl::Duration pause =
            std::clamp(DetailsOf(response.status()).retry_delay, kShortestPause, kLongestPause);
        if (now + pause - *full_since > patience_) return response.status();
        count = (count + 1) / 2;
        show(absl::StrCat(first, " of ", texts_.size(), " texts; the server is full, next try in ",
                          absl::FormatDuration(absl::Trunc(pause, absl::Milliseconds(10)))));
        absl::SleepFor(pause);
        continue;
      }
      if (!response.ok()) return response.status();
      if (response->results_size() != request.inputs_size()) {
        return absl::InternalError("the server gave another number of results than texts");
      }
      for (size_t i = 0; i < count; ++i) {
        const v1::ScoreResult& result = response->results(static_cast<int>(i));
        all.Add(result);
        PrintText(texts_[first + i].first, result);
      }
      first += count;
      count *= 2;
      full_since.reset();
      show(absl::StrCat(first, " of ", texts_.size(), " texts"));
    }
    show("");
    PrintTotal(all);
    return absl::OkStatus();
  }

  // The server says that it can never take so many texts, or so long ones, in one call.
  static bool AreTooMany(const absl::Status& status) {
    if (!absl::IsInvalidArgument(status)) return false;
    const ErrorDetails details = DetailsOf(status);
    return std::any_of(
        details.violations.begin(), details.violations.end(),
        [](const ErrorDetails::Violation& violation) { return violation.field == "inputs"; });
  }

  void PrintText(int64_t line, const v1::ScoreResult& result) const {
    if (json_) {
      PrintLine(ToJson(result));
      return;
    }
    Total total;
    total.Add(result);
    PrintLine(absl::StrFormat("%d\t%d\t%.6f\t%.4f", line, total.tokens, total.mean(),
                              total.perplexity()));
  }

  static void PrintTotal(const Total& total) {
    if (total.tokens == 0) return;
    absl::FPrintF(stderr, "%d tokens scored; mean log-probability %.6f; perplexity %.4f\n",
                  total.tokens, total.mean(), total.perplexity());
  }

  std::optional<std::string> file_;
  std::vector<Line> texts_;  // of file_
  std::optional<std::string> text_;
  std::optional<std::string> text_file_;
  std::optional<std::vector<int32_t>> token_ids_;
  absl::Duration patience_ = absl::Minutes(10);
  bool json_ = false;
  v1::ScoreRequest request_;
};

}  // namespace

std::unique_ptr<Command> MakeScoreCommand() { return std::make_unique<ScoreCommand>(); }

}  // namespace mmfree

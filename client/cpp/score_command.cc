#include <cmath>
#include <cstdio>
#include <optional>

#include "absl/strings/str_format.h"
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

Prints a line for each token: position, id, log-probability given the tokens before it (none for
the first), and the likeliest token after it; then the mean and the perplexity to the standard error
stream. --json prints one object: {"token_ids":[..],"logprobs":[..],"argmax":[..],"last_logits":[..]};
logprobs[i] is of token i+1, argmax[i] the likeliest token after token i. Text gets BOS in front;
token ids are taken as given.

Example:
  mmfree score --text="The cat sat on the mat." --json

)";

class ScoreCommand final : public Command {
 public:
  std::string Intro() const override { return kIntro; }

  void AddFlags(FlagSet* flags) override {
    flags->AddHeading("Input, one of:");
    flags->Add("text", &text_, "TEXT", "the text; may be empty");
    flags->Add("text_file", &text_file_, "FILE",
               "read the text from a file; - is the standard input");
    flags->Add("token_ids", &token_ids_, "IDS", "token ids, taken as given: 1,2,3");
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
            (token_ids_.has_value() ? 1 : 0) !=
        1) {
      return absl::InvalidArgumentError("give one of --text, --text_file and --token_ids");
    }
    if (request_.last_logits() && !json) {
      return absl::InvalidArgumentError("--last_logits needs --json");
    }
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
    MMFREE_ASSIGN_OR_RETURN(const v1::ScoreResponse response, client->Score(request_));
    if (response.results_size() != 1) {
      return absl::InternalError("the server gave another number of results than texts");
    }
    const v1::ScoreResult& result = response.results(0);
    if (json_) {
      PrintLine(ToJson(result));
      return absl::OkStatus();
    }
    double sum = 0.0;
    for (int i = 0; i < result.token_ids_size(); ++i) {
      const bool scored = i > 0 && i <= result.logprobs_size();
      if (scored) sum += result.logprobs(i - 1);
      PrintLine(absl::StrFormat("%d\t%d\t%s\t%d", i, result.token_ids(i),
                                scored ? absl::StrFormat("%.6f", result.logprobs(i - 1)) : "-",
                                i < result.argmax_size() ? result.argmax(i) : -1));
    }
    const int count = result.logprobs_size();
    if (count > 0) {
      absl::FPrintF(stderr, "%d tokens scored; mean log-probability %.6f; perplexity %.4f\n", count,
                    sum / count, std::exp(-sum / count));
    }
    return absl::OkStatus();
  }

 private:
  std::optional<std::string> text_;
  std::optional<std::string> text_file_;
  std::optional<std::vector<int32_t>> token_ids_;
  bool json_ = false;
  v1::ScoreRequest request_;
};

}  // namespace

std::unique_ptr<Command> MakeScoreCommand() { return std::make_unique<ScoreCommand>(); }

}  // namespace mmfree

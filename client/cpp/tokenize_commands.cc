#include <cstdio>
#include <optional>

#include "absl/strings/str_join.h"
#include "client/cpp/command.h"
#include "client/cpp/json.h"
#include "server/base/status_macros.h"

namespace mmfree {
namespace {

class TokenizeCommand final : public Command {
 public:
  std::string Intro() const override {
    return R"(mmfree tokenize: turns text into token ids.

  mmfree tokenize --text=TEXT [flags]
  mmfree tokenize --text_file=FILE [flags]

Prints the ids, separated by commas. --json prints {"token_ids":[..],"pieces":[..]}.

Example:
  mmfree tokenize --text="Once upon a time" --json

)";
  }

  void AddFlags(FlagSet* flags) override {
    flags->AddHeading("Flags:");
    flags->Add("text", &text_, "TEXT", "the text; may be empty");
    flags->Add("text_file", &text_file_, "FILE",
               "read the text from a file; - is the standard input");
    flags->AddSetter<std::string>("model", "NAME", "the model (default: the only one)",
                                  [this](const std::string& v) { request_.set_model(v); });
    flags->AddSetter<bool>("bos", "", "put BOS in front (default true)",
                           [this](bool v) { request_.set_bos(v); });
    flags->AddSetter<bool>("continuation", "", "as text of a later turn: no BOS, no prefix space",
                           [this](bool v) { request_.set_continuation(v); });
  }

  absl::Status Check(const std::vector<std::string>& arguments, bool json) override {
    MMFREE_RETURN_IF_ERROR(ExpectNoArguments(arguments));
    json_ = json;
    if (text_.has_value() == text_file_.has_value()) {
      return absl::InvalidArgumentError("give one of --text and --text_file");
    }
    if (text_.has_value()) request_.set_text(*text_);
    if (text_file_.has_value()) {
      MMFREE_ASSIGN_OR_RETURN(*request_.mutable_text(), ReadInput(*text_file_));
    }
    request_.set_return_pieces(json);
    return absl::OkStatus();
  }

  absl::Status Run(Client* client) override {
    MMFREE_ASSIGN_OR_RETURN(const v1::TokenizeResponse response, client->Tokenize(request_));
    PrintLine(json_ ? ToJson(response) : absl::StrJoin(response.token_ids(), ","));
    return absl::OkStatus();
  }

 private:
  std::optional<std::string> text_;
  std::optional<std::string> text_file_;
  bool json_ = false;
  v1::TokenizeRequest request_;
};

class DetokenizeCommand final : public Command {
 public:
  std::string Intro() const override {
    return R"(mmfree detokenize: turns token ids into text.

  mmfree detokenize --token_ids=1,2,3 [flags]

Prints exactly the text, without a line end. --json prints {"text":".."}.

)";
  }

  void AddFlags(FlagSet* flags) override {
    flags->AddHeading("Flags:");
    flags->Add("token_ids", &token_ids_, "IDS", "the ids");
    flags->AddSetter<std::string>("model", "NAME", "the model (default: the only one)",
                                  [this](const std::string& v) { request_.set_model(v); });
    flags->AddSetter<bool>("continuation", "", "they continue a text: keep the leading space",
                           [this](bool v) { request_.set_continuation(v); });
  }

  absl::Status Check(const std::vector<std::string>& arguments, bool json) override {
    MMFREE_RETURN_IF_ERROR(ExpectNoArguments(arguments));
    json_ = json;
    if (!token_ids_.has_value()) return absl::InvalidArgumentError("give --token_ids=1,2,3");
    request_.mutable_token_ids()->Add(token_ids_->begin(), token_ids_->end());
    return absl::OkStatus();
  }

  absl::Status Run(Client* client) override {
    MMFREE_ASSIGN_OR_RETURN(const v1::DetokenizeResponse response, client->Detokenize(request_));
    if (json_) {
      PrintLine(ToJson(response));
    } else {
      fwrite(response.text().data(), 1, response.text().size(), stdout);
      fflush(stdout);
    }
    return absl::OkStatus();
  }

 private:
  std::optional<std::vector<int32_t>> token_ids_;
  bool json_ = false;
  v1::DetokenizeRequest request_;
};

}  // namespace

std::unique_ptr<Command> MakeTokenizeCommand() { return std::make_unique<TokenizeCommand>(); }
std::unique_ptr<Command> MakeDetokenizeCommand() { return std::make_unique<DetokenizeCommand>(); }

}  // namespace mmfree

#include <fstream>
#include <functional>
#include <map>
#include <optional>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "client/cpp/command.h"
#include "client/cpp/json.h"
#include "server/base/status_macros.h"

namespace mmfree {
namespace {

constexpr char kIntro[] = R"(mmfree sessions: contexts that the server keeps between requests.

  mmfree sessions create [--session=ID] [--system_prompt=TEXT] [--ttl=TIME]
  mmfree sessions get    --session=ID
  mmfree sessions list   [--page_size=N] [--page_token=TOKEN]
  mmfree sessions fork   --session=ID [--turn=N] [--new_session=ID]
  mmfree sessions rewind --session=ID --turn=N
  mmfree sessions export --session=ID --output=FILE [--turn=N] [--dtype=f32|f16|bf16]
  mmfree sessions import --input=FILE [--session=ID]
  mmfree sessions delete --session=ID

Prints a line for each session: id, model, turn, tokens, bytes. --json prints everything. A turn of a
session is `mmfree generate --session=ID --prompt=TEXT`.

)";

std::string Describe(const v1::Session& session) {
  return absl::StrFormat("%s\t%s\tturn %d (kept from %d)\t%d tokens\t%d bytes%s", session.id(),
                         session.model(), session.turn(), session.oldest_turn(),
                         session.token_count(), session.bytes(), session.busy() ? "\tbusy" : "");
}

class SessionsCommand final : public Command {
 public:
  std::string Intro() const override { return kIntro; }

  void AddFlags(FlagSet* flags) override {
    flags->AddHeading("Flags:");
    flags->Add("session", &session_, "ID", "the session; for create and import: its new id");
    flags->Add("new_session", &new_session_, "ID", "fork: id of the copy (default: a random one)");
    flags->Add("turn", &turn_, "N", "fork, rewind, export: the turn (default: the last)");
    flags->Add("system_prompt", &system_prompt_, "TEXT", "create: what the context starts with");
    flags->Add("model", &model_, "NAME", "create, import, list: the model");
    flags->Add("ttl", &ttl_, "TIME", "create, fork, import: delete it when unused for this long");
    flags->Add("output", &output_, "FILE", "export: where to");
    flags->Add("input", &input_, "FILE", "import: where from");
    flags->AddChoice<v1::StateDtype>("dtype",
                                     {{"f32", v1::STATE_DTYPE_F32},
                                      {"f16", v1::STATE_DTYPE_F16},
                                      {"bf16", v1::STATE_DTYPE_BF16}},
                                     "NAME", "export: number format (default f32, which is exact)",
                                     [this](v1::StateDtype dtype) { dtype_ = dtype; });
    flags->Add("page_size", &page_size_, "N", "list: sessions of a page (default: all of them)");
    flags->Add("page_token", &page_token_, "TOKEN", "list: next_page_token of the page before");
  }

  absl::Status Check(const std::vector<std::string>& arguments, bool json) override {
    json_ = json;
    std::vector<std::string> names;
    for (const auto& [name, run] : kActions) names.push_back(name);
    if (arguments.size() != 1 || kActions.count(arguments[0]) == 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("say what to do: sessions ", absl::StrJoin(names, "|")));
    }
    action_ = arguments[0];
    const bool optional = action_ == "create" || action_ == "import" || action_ == "list";
    if (!optional && session_.empty()) {
      return absl::InvalidArgumentError(absl::StrCat("sessions ", action_, " needs --session=ID"));
    }
    if (action_ == "rewind" && !turn_.has_value()) {
      return absl::InvalidArgumentError("sessions rewind needs --turn=N");
    }
    if (action_ == "export" && output_.empty()) {
      return absl::InvalidArgumentError("sessions export needs --output=FILE");
    }
    if (action_ == "import" && input_.empty()) {
      return absl::InvalidArgumentError("sessions import needs --input=FILE");
    }
    return absl::OkStatus();
  }

  absl::Status Run(Client* client) override { return (this->*kActions.at(action_))(client); }

 private:
  using Action = absl::Status (SessionsCommand::*)(Client*);
  static const std::map<std::string, Action> kActions;

  void Print(const v1::Session& session) const {
    PrintLine(json_ ? ToJson(session) : Describe(session));
  }

  template <typename Request>
  void SetTtl(Request* request) const {
    if (!ttl_.has_value()) return;
    const int64_t seconds = absl::ToInt64Seconds(*ttl_);
    request->mutable_ttl()->set_seconds(seconds);
    request->mutable_ttl()->set_nanos(
        static_cast<int32_t>(absl::ToInt64Nanoseconds(*ttl_ - absl::Seconds(seconds))));
  }

  absl::Status Create(Client* client) {
    v1::CreateSessionRequest request;
    request.set_session_id(session_);
    request.set_model(model_);
    if (system_prompt_.has_value()) request.set_text(*system_prompt_);
    SetTtl(&request);
    MMFREE_ASSIGN_OR_RETURN(const v1::CreateSessionResponse response,
                            client->CreateSession(request));
    Print(response.session());
    return absl::OkStatus();
  }

  absl::Status Get(Client* client) {
    v1::GetSessionRequest request;
    request.set_session_id(session_);
    MMFREE_ASSIGN_OR_RETURN(const v1::GetSessionResponse response, client->GetSession(request));
    Print(response.session());
    return absl::OkStatus();
  }

  absl::Status List(Client* client) {
    v1::ListSessionsRequest request;
    request.set_model(model_);
    request.set_page_size(static_cast<int32_t>(page_size_.value_or(1000)));
    request.set_page_token(page_token_);
    for (;;) {
      MMFREE_ASSIGN_OR_RETURN(const v1::ListSessionsResponse response,
                              client->ListSessions(request));
      if (json_) PrintLine(ToJson(response));
      for (const v1::Session& session : response.sessions()) {
        if (!json_) PrintLine(Describe(session));
      }
      if (page_size_.has_value() || response.next_page_token().empty()) return absl::OkStatus();
      request.set_page_token(response.next_page_token());
    }
  }

  absl::Status Fork(Client* client) {
    v1::ForkSessionRequest request;
    request.set_session_id(session_);
    request.set_new_session_id(new_session_);
    if (turn_.has_value()) request.set_turn(*turn_);
    SetTtl(&request);
    MMFREE_ASSIGN_OR_RETURN(const v1::ForkSessionResponse response, client->ForkSession(request));
    Print(response.session());
    return absl::OkStatus();
  }

  absl::Status Rewind(Client* client) {
    v1::RewindSessionRequest request;
    request.set_session_id(session_);
    request.set_turn(*turn_);
    MMFREE_ASSIGN_OR_RETURN(const v1::RewindSessionResponse response,
                            client->RewindSession(request));
    Print(response.session());
    return absl::OkStatus();
  }

  absl::Status Export(Client* client) {
    v1::ExportSessionRequest request;
    request.set_session_id(session_);
    if (turn_.has_value()) request.set_turn(*turn_);
    request.set_dtype(dtype_);
    MMFREE_ASSIGN_OR_RETURN(const v1::ExportSessionResponse response,
                            client->ExportSession(request));
    std::ofstream file(output_, std::ios::binary | std::ios::trunc);
    file << response.checkpoint().SerializeAsString();
    file.close();
    if (!file) return absl::UnknownError(absl::StrCat("cannot write ", output_));
    Print(response.session());
    return absl::OkStatus();
  }

  absl::Status Import(Client* client) {
    MMFREE_ASSIGN_OR_RETURN(const std::string bytes, ReadCheckpointFile(input_));
    v1::ImportSessionRequest request;
    if (!request.mutable_checkpoint()->ParseFromString(bytes)) {
      return absl::InvalidArgumentError(absl::StrCat(input_, " is not an exported session"));
    }
    request.set_session_id(session_);
    request.set_model(model_);
    SetTtl(&request);
    MMFREE_ASSIGN_OR_RETURN(const v1::ImportSessionResponse response,
                            client->ImportSession(request));
    Print(response.session());
    return absl::OkStatus();
  }

  absl::Status Delete(Client* client) {
    v1::DeleteSessionRequest request;
    request.set_session_id(session_);
    return client->DeleteSession(request).status();
  }

  static absl::StatusOr<std::string> ReadCheckpointFile(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::string bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    if (!file) return absl::InvalidArgumentError(absl::StrCat("cannot read ", path));
    return bytes;
  }

  std::string action_;
  std::string session_;
  std::string new_session_;
  std::optional<uint64_t> turn_;
  std::optional<std::string> system_prompt_;
  std::string model_;
  std::optional<absl::Duration> ttl_;
  std::string output_;
  std::string input_;
  v1::StateDtype dtype_ = v1::STATE_DTYPE_F32;
  std::optional<uint32_t> page_size_;
  std::string page_token_;
  bool json_ = false;
};

const std::map<std::string, SessionsCommand::Action> SessionsCommand::kActions = {
    {"create", &SessionsCommand::Create}, {"get", &SessionsCommand::Get},
    {"list", &SessionsCommand::List},     {"fork", &SessionsCommand::Fork},
    {"rewind", &SessionsCommand::Rewind}, {"export", &SessionsCommand::Export},
    {"import", &SessionsCommand::Import}, {"delete", &SessionsCommand::Delete},
};

}  // namespace

std::unique_ptr<Command> MakeSessionsCommand() { return std::make_unique<SessionsCommand>(); }

}  // namespace mmfree

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/strip.h"
#include "client/cpp/command.h"
#include "client/cpp/json.h"
#include "server/base/status_macros.h"

namespace mmfree {
namespace {

std::string Describe(const v1::Model& model) {
  return absl::StrFormat("%s\t%s\t%.1f M parameters\t%s\t%s", model.name(),
                         absl::StripPrefix(v1::ModelState_Name(model.state()), "MODEL_STATE_"),
                         static_cast<double>(model.parameters()) / 1e6, model.backend(),
                         model.device());
}

class ModelsCommand final : public Command {
 public:
  std::string Intro() const override {
    return R"(mmfree models: the models a server has.

  mmfree models list
  mmfree models get [NAME]

Prints a line for each model: name, state, size, backend, device. --json prints everything.

)";
  }

  void AddFlags(FlagSet* flags) override {
    flags->AddHeading("Flags:");
    flags->Add("model", &model_, "NAME", "for get: the model (default: the only one)");
  }

  absl::Status Check(const std::vector<std::string>& arguments, bool json) override {
    json_ = json;
    if (arguments.empty() || (arguments[0] != "list" && arguments[0] != "get")) {
      return absl::InvalidArgumentError("say what to do: models list, or models get [NAME]");
    }
    list_ = arguments[0] == "list";
    if (arguments.size() > (list_ ? 1 : 2)) {
      return absl::InvalidArgumentError(
          absl::StrCat("unexpected argument \"", arguments.back(), "\""));
    }
    if (arguments.size() == 2) model_ = arguments[1];
    return absl::OkStatus();
  }

  absl::Status Run(Client* client) override {
    if (list_) {
      MMFREE_ASSIGN_OR_RETURN(const v1::ListModelsResponse response, client->ListModels());
      if (json_) PrintLine(ToJson(response));
      for (const v1::Model& model : response.models()) {
        if (!json_) PrintLine(Describe(model));
      }
      return absl::OkStatus();
    }
    MMFREE_ASSIGN_OR_RETURN(const v1::GetModelResponse response, client->GetModel(model_));
    PrintLine(json_ ? ToJson(response.model()) : Describe(response.model()));
    return absl::OkStatus();
  }

 private:
  std::string model_;
  bool list_ = false;
  bool json_ = false;
};

class LoadCommand final : public Command {
 public:
  std::string Intro() const override {
    return R"(mmfree load: how busy a model is.

  mmfree load [--model=NAME]

)";
  }

  void AddFlags(FlagSet* flags) override {
    flags->AddHeading("Flags:");
    flags->Add("model", &model_, "NAME", "the model (default: the only one)");
  }

  absl::Status Check(const std::vector<std::string>& arguments, bool json) override {
    json_ = json;
    return ExpectNoArguments(arguments);
  }

  absl::Status Run(Client* client) override {
    MMFREE_ASSIGN_OR_RETURN(const v1::GetLoadResponse load, client->GetLoad(model_));
    if (json_) {
      PrintLine(ToJson(load));
    } else {
      PrintLine(absl::StrFormat("%s: %s, %d running, %d queued, %d of %d slots used", load.model(),
                                load.accepting() ? "accepting" : "not accepting", load.running(),
                                load.queued(), load.slots_used(), load.slots_total()));
    }
    return absl::OkStatus();
  }

 private:
  std::string model_;
  bool json_ = false;
};

class HealthCommand final : public Command {
 public:
  std::string Intro() const override {
    return R"(mmfree health: asks grpc.health.v1 whether the server, or one model, is serving.

  mmfree health [--service=NAME]

Prints SERVING or NOT_SERVING. Exit status: 0 when it is serving, 1 otherwise.

)";
  }

  void AddFlags(FlagSet* flags) override {
    flags->AddHeading("Flags:");
    flags->Add("service", &service_, "NAME", "a model or a service (default: the whole server)");
  }

  absl::Status Check(const std::vector<std::string>& arguments, bool json) override {
    json_ = json;
    return ExpectNoArguments(arguments);
  }

  absl::Status Run(Client* client) override {
    MMFREE_ASSIGN_OR_RETURN(const std::string status, client->CheckHealth(service_));
    PrintLine(json_ ? HealthJson(status) : status);
    exit_status_ = status == "SERVING" ? kExitOk : kExitFailure;
    return absl::OkStatus();
  }

  int exit_status() const override { return exit_status_; }

 private:
  std::string service_;
  bool json_ = false;
  int exit_status_ = kExitFailure;
};

}  // namespace

std::unique_ptr<Command> MakeModelsCommand() { return std::make_unique<ModelsCommand>(); }
std::unique_ptr<Command> MakeLoadCommand() { return std::make_unique<LoadCommand>(); }
std::unique_ptr<Command> MakeHealthCommand() { return std::make_unique<HealthCommand>(); }

}  // namespace mmfree

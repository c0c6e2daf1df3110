// mmfree: the command-line client of mmfree-server.
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "client/cpp/client.h"
#include "client/cpp/command.h"
#include "server/base/flag_set.h"

namespace mmfree {
namespace {

struct CommandEntry {
  const char* name;
  const char* summary;
  std::unique_ptr<Command> (*make)();
};

constexpr CommandEntry kCommands[] = {
    {"generate", "continue a text, printing it as it is made", MakeGenerateCommand},
    {"score", "log-probability of every token of a text", MakeScoreCommand},
    {"tokenize", "text to token ids", MakeTokenizeCommand},
    {"detokenize", "token ids to text", MakeDetokenizeCommand},
    {"sessions", "contexts that the server keeps: create, get, list, fork, ...",
     MakeSessionsCommand},
    {"chat", "a conversation in a session", MakeChatCommand},
    {"models", "the models a server has: models {list,get}", MakeModelsCommand},
    {"load", "how busy a model is", MakeLoadCommand},
    {"health", "whether the server, or one model, is serving", MakeHealthCommand},
};

struct Globals {
  Client::Options client;
  bool json = false;

  void AddFlags(FlagSet* flags) {
    flags->AddHeading("Connection:");
    flags->Add("server", &client.server, "HOST:PORT",
               "the server (default $MMFREE_SERVER, or 127.0.0.1:50051)");
    flags->Add("timeout", &client.timeout, "TIME", "give up after, e.g. 30s (default: never)");
    flags->Add("json", &json, "", "machine-readable output");
    flags->Add("tls", &client.tls, "", "connect with TLS");
    flags->Add("tls_ca", &client.tls_ca_file, "FILE",
               "PEM certificates to trust (default: the system's)");
    flags->Add("tls_cert", &client.tls_cert_file, "FILE", "PEM certificate to show");
    flags->Add("tls_key", &client.tls_key_file, "FILE", "its PEM private key");
  }

  absl::Status Check() const {
    if (client.server.empty()) return absl::InvalidArgumentError("--server must not be empty");
    if (client.timeout <= absl::ZeroDuration()) {
      return absl::InvalidArgumentError("--timeout must be positive");
    }
    const bool tls_file = !client.tls_ca_file.empty() || !client.tls_cert_file.empty() ||
                          !client.tls_key_file.empty();
    if (tls_file && !client.tls) {
      return absl::InvalidArgumentError("--tls_ca, --tls_cert and --tls_key need --tls");
    }
    if (client.tls_cert_file.empty() != client.tls_key_file.empty()) {
      return absl::InvalidArgumentError("--tls_cert and --tls_key go together");
    }
    return absl::OkStatus();
  }
};

std::string Help(const FlagSet& globals) {
  std::string help =
      "mmfree: talks to an mmfree-server.\n\n"
      "  mmfree [--server=HOST:PORT] COMMAND [flags]\n\nCommands (mmfree COMMAND --help):\n";
  for (const CommandEntry& command : kCommands) {
    std::string line = absl::StrCat("  ", command.name);
    line.resize(16, ' ');
    absl::StrAppend(&help, line, command.summary, "\n");
  }
  absl::StrAppend(
      &help, "\n", globals.Help(),
      "\nExample:\n  mmfree generate --prompt=\"Once upon a time\" --max_tokens=100\n\n"
      "Exit status: 0 done; 1 the server refused or could not be reached, or the output\n"
      "could not be written; 2 wrong command line; 130 Ctrl-C.\n");
  return help;
}

int UsageError(const absl::Status& status, absl::string_view command) {
  std::cerr << "mmfree: " << status.message() << "\nTry: mmfree "
            << (command.empty() ? "" : absl::StrCat(command, " ")) << "--help\n";
  return kExitUsage;
}

int RpcError(const absl::Status& status, const std::string& server) {
  std::cerr << "mmfree: " << absl::StatusCodeToString(status.code()) << ": " << status.message()
            << "\n";
  const ErrorDetails details = DetailsOf(status);
  for (const ErrorDetails::Violation& violation : details.violations) {
    const std::string line = absl::StrCat(violation.field, ": ", violation.description);
    // This server's messages say them too, as far as they fit.
    if (!absl::StrContains(status.message(), line)) std::cerr << "  " << line << "\n";
  }
  if (details.retry_delay > absl::ZeroDuration()) {
    std::cerr << "  try again in " << absl::FormatDuration(details.retry_delay) << "\n";
  } else if (absl::IsUnavailable(status)) {
    std::cerr << "  is there a server on " << server << "? --server=HOST:PORT names another\n";
  }
  return kExitFailure;
}

// Output that did not arrive (a full disk) must not look like success.
int ExitStatus(int status) {
  if (fflush(stdout) == 0 && ferror(stdout) == 0) return status;
  std::cerr << "mmfree: cannot write the standard output\n";
  return status == kExitOk ? kExitFailure : status;
}

int Main(const std::vector<std::string>& arguments) {
  for (size_t i = 0; i < arguments.size(); ++i) {
    const absl::Status status = CheckUtf8(absl::StrCat("argument ", i + 1), arguments[i]);
    if (!status.ok()) return UsageError(status, "");
  }
  Globals globals;
  if (const char* server = std::getenv("MMFREE_SERVER"); server != nullptr && *server != '\0') {
    globals.client.server = server;
  }
  FlagSet global_flags;
  globals.AddFlags(&global_flags);
  absl::StatusOr<std::vector<std::string>> rest =
      global_flags.Parse(arguments, /*stop_at_first=*/true);
  if (!rest.ok()) return UsageError(rest.status(), "");
  if (global_flags.help_requested()) {
    std::cout << Help(global_flags);
    return kExitOk;
  }
  if (rest->empty()) return UsageError(absl::InvalidArgumentError("no command"), "");

  const std::string name = rest->front();
  std::unique_ptr<Command> command;
  for (const CommandEntry& entry : kCommands) {
    if (name == entry.name) command = entry.make();
  }
  if (command == nullptr) {
    return UsageError(absl::InvalidArgumentError(absl::StrCat("unknown command \"", name, "\"")),
                      "");
  }
  FlagSet flags;
  command->AddFlags(&flags);
  globals.AddFlags(&flags);
  rest->erase(rest->begin());
  rest = flags.Parse(*rest);
  if (!rest.ok()) return UsageError(rest.status(), name);
  if (flags.help_requested()) {
    std::cout << command->Intro() << flags.Help();
    return kExitOk;
  }
  absl::Status status = globals.Check();
  if (status.ok()) status = command->Check(*rest, globals.json);
  absl::StatusOr<std::unique_ptr<Client>> client =
      status.ok() ? Client::Create(globals.client) : status;
  if (!client.ok()) return UsageError(client.status(), name);
  status = command->Run(client->get());
  return status.ok() ? command->exit_status() : RpcError(status, globals.client.server);
}

}  // namespace
}  // namespace mmfree

int main(int argc, char** argv) {
  return mmfree::ExitStatus(mmfree::Main(std::vector<std::string>(argv + 1, argv + argc)));
}

// A subcommand of `mmfree`.
#ifndef MMFREE_CLIENT_CPP_COMMAND_H_
#define MMFREE_CLIENT_CPP_COMMAND_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "client/cpp/client.h"
#include "server/base/flag_set.h"

namespace mmfree {

// The program's exit statuses.
inline constexpr int kExitOk = 0;
inline constexpr int kExitFailure = 1;        // an RPC failed
inline constexpr int kExitUsage = 2;          // wrong command line
inline constexpr int kExitInterrupted = 130;  // Ctrl-C

class Command {
 public:
  virtual ~Command() = default;

  // What --help prints before the flags: a synopsis, what it does, examples.
  virtual std::string Intro() const = 0;
  virtual void AddFlags(FlagSet* flags) = 0;
  // Checks the command line after the flags were parsed. INVALID_ARGUMENT: a usage error.
  virtual absl::Status Check(const std::vector<std::string>& arguments, bool json) = 0;
  // Calls the server and prints to the standard output. An RPC's error is returned, to be printed.
  virtual absl::Status Run(Client* client) = 0;
  // What Run returning OK exits with.
  virtual int exit_status() const { return kExitOk; }
};

std::unique_ptr<Command> MakeGenerateCommand();
std::unique_ptr<Command> MakeScoreCommand();
std::unique_ptr<Command> MakeTokenizeCommand();
std::unique_ptr<Command> MakeDetokenizeCommand();
std::unique_ptr<Command> MakeModelsCommand();
std::unique_ptr<Command> MakeLoadCommand();
std::unique_ptr<Command> MakeHealthCommand();
std::unique_ptr<Command> MakeSessionsCommand();
std::unique_ptr<Command> MakeChatCommand();

// INVALID_ARGUMENT unless there are none.
absl::Status ExpectNoArguments(const std::vector<std::string>& arguments);

// INVALID_ARGUMENT unless `text`, which errors call `what`, is UTF-8: protobuf's strings are, and a
// server cannot even parse a request where one is not.
absl::Status CheckUtf8(absl::string_view what, absl::string_view text);

// The content of a file, of the standard input for "-". INVALID_ARGUMENT when it cannot be read or
// is not UTF-8.
absl::StatusOr<std::string> ReadInput(const std::string& path);

// One line to the standard output, written at once.
void PrintLine(absl::string_view line);

}  // namespace mmfree

#endif  // MMFREE_CLIENT_CPP_COMMAND_H_

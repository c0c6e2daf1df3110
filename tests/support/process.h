// Real processes for integration tests: the server on free ports, and programs run to their end.
#ifndef MMFREE_TESTS_SUPPORT_PROCESS_H_
#define MMFREE_TESTS_SUPPORT_PROCESS_H_

#include <sys/types.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "tests/support/patience.h"
#include "tests/support/temp_directory.h"

namespace mmfree {

// A program that was run to its end.
struct ProgramResult {
  int exit_code = -1;  // 128 + the signal when one ended it
  std::string out;     // standard output
  std::string err;     // standard error
};

// Runs `command` (program and arguments, no shell) and waits. DEADLINE_EXCEEDED, with the program
// killed, when it takes longer than `timeout`.
absl::StatusOr<ProgramResult> RunProgram(const std::vector<std::string>& command,
                                         absl::Duration timeout = Patience(absl::Minutes(2)));

// A program that is talked to. Killed and reaped when destroyed. Not thread-safe.
class InteractiveProgram {
 public:
  static absl::StatusOr<std::unique_ptr<InteractiveProgram>> Start(
      const std::vector<std::string>& command);
  ~InteractiveProgram();
  InteractiveProgram(const InteractiveProgram&) = delete;
  InteractiveProgram& operator=(const InteractiveProgram&) = delete;

  // Writes a line to its standard input.
  void Say(const std::string& line);
  // Waits until `text` is in its standard error, after what earlier calls waited for; false after
  // `timeout`.
  bool AwaitError(const std::string& text, absl::Duration timeout = Patience(absl::Minutes(2)));
  // Ends its standard input and waits for its end.
  absl::StatusOr<ProgramResult> Finish(absl::Duration timeout = Patience(absl::Minutes(2)));

 private:
  InteractiveProgram() = default;

  TempDirectory directory_;
  pid_t pid_ = -1;
  int input_ = -1;
  size_t awaited_ = 0;  // bytes of its standard error
};

// A mmfree-server of this build on the demo model, port 0 for RPCs and metrics. Killed and reaped
// when destroyed. Not thread-safe.
class ServerProcess {
 public:
  // Starts it with `flags` added and waits until it serves. The error holds what it printed.
  static absl::StatusOr<std::unique_ptr<ServerProcess>> Start(
      const std::vector<std::string>& flags = {});
  ~ServerProcess();
  ServerProcess(const ServerProcess&) = delete;
  ServerProcess& operator=(const ServerProcess&) = delete;

  std::string address() const;  // "127.0.0.1:PORT" of the RPCs
  int port() const { return grpc_port_; }
  int metrics_port() const { return metrics_port_; }
  pid_t pid() const { return pid_; }

  // Sends a signal. The process must not have been waited for.
  void Signal(int signal) const;
  // Waits for the end and returns the exit code, 128 + the signal when one ended it.
  // DEADLINE_EXCEEDED after `timeout`.
  absl::StatusOr<int> Wait(absl::Duration timeout = Patience(absl::Minutes(2)));
  // What it has printed to standard error so far.
  std::string Log() const;
  // Runs the `mmfree` client of this build against it.
  absl::StatusOr<ProgramResult> Client(const std::vector<std::string>& arguments,
                                       absl::Duration timeout = Patience(absl::Minutes(2))) const;

 private:
  ServerProcess() = default;

  TempDirectory directory_;
  pid_t pid_ = -1;
  bool reaped_ = false;
  int grpc_port_ = 0;
  int metrics_port_ = 0;
};

}  // namespace mmfree

#endif  // MMFREE_TESTS_SUPPORT_PROCESS_H_

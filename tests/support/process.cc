#include "tests/support/process.h"

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <cstring>
#include <filesystem>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/base/status_macros.h"

namespace mmfree {
namespace {

// A process can only be asked whether it has ended; nothing in a test depends on this interval.
constexpr absl::Duration kPoll = absl::Milliseconds(2);

std::string Binary(const std::string& name) {
  return absl::StrCat(MMFREE_BINARY_DIR, "/bin/", name);
}

// `input` becomes its standard input; -1: none.
absl::StatusOr<pid_t> Spawn(const std::vector<std::string>& command, const std::string& out,
                            const std::string& err, int input = -1) {
  std::vector<char*> arguments;
  for (const std::string& word : command) arguments.push_back(const_cast<char*>(word.c_str()));
  arguments.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  if (input >= 0) {
    posix_spawn_file_actions_adddup2(&actions, input, STDIN_FILENO);
  } else {
    posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
  }
  constexpr int kWrite = O_WRONLY | O_CREAT | O_TRUNC;
  posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, out.c_str(), kWrite, 0600);
  posix_spawn_file_actions_addopen(&actions, STDERR_FILENO, err.c_str(), kWrite, 0600);
  pid_t pid = -1;
  const int error = posix_spawnp(&pid, arguments[0], &actions, nullptr, arguments.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  if (error != 0) {
    return absl::NotFoundError(absl::StrCat("cannot run ", command[0], ": ", strerror(error)));
  }
  return pid;
}

// Exit code of a child, or DEADLINE_EXCEEDED while it still runs.
absl::StatusOr<int> WaitFor(pid_t pid, absl::Duration timeout) {
  const absl::Time deadline = absl::Now() + timeout;
  int status = 0;
  while (waitpid(pid, &status, WNOHANG) == 0) {
    if (absl::Now() >= deadline) {
      return absl::DeadlineExceededError(absl::StrCat("process ", pid, " still runs"));
    }
    absl::SleepFor(kPoll);
  }
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

}  // namespace

absl::StatusOr<ProgramResult> RunProgram(const std::vector<std::string>& command,
                                         absl::Duration timeout) {
  const TempDirectory directory;
  const std::string out = directory.File("out");
  const std::string err = directory.File("err");
  MMFREE_ASSIGN_OR_RETURN(const pid_t pid, Spawn(command, out, err));
  const absl::StatusOr<int> code = WaitFor(pid, timeout);
  if (!code.ok()) {
    kill(pid, SIGKILL);
    waitpid(pid, nullptr, 0);
    return absl::DeadlineExceededError(absl::StrCat(command[0], " still ran after ",
                                                    absl::FormatDuration(timeout),
                                                    "; standard error: ", ReadFile(err)));
  }
  ProgramResult result;
  result.exit_code = *code;
  result.out = ReadFile(out);
  result.err = ReadFile(err);
  return result;
}

absl::StatusOr<std::unique_ptr<InteractiveProgram>> InteractiveProgram::Start(
    const std::vector<std::string>& command) {
  std::unique_ptr<InteractiveProgram> program(new InteractiveProgram);
  std::array<int, 2> ends;
  if (pipe2(ends.data(), O_CLOEXEC) != 0) return absl::InternalError("no pipe");
  program->input_ = ends[1];
  absl::StatusOr<pid_t> pid =
      Spawn(command, program->directory_.File("out"), program->directory_.File("err"), ends[0]);
  close(ends[0]);
  MMFREE_RETURN_IF_ERROR(pid.status());
  program->pid_ = *pid;
  return program;
}

InteractiveProgram::~InteractiveProgram() {
  if (input_ >= 0) close(input_);
  if (pid_ < 0) return;
  kill(pid_, SIGKILL);
  waitpid(pid_, nullptr, 0);
}

void InteractiveProgram::Say(const std::string& line) {
  const std::string bytes = line + "\n";
  // A program that has ended shows in what the test waits for next.
  if (write(input_, bytes.data(), bytes.size()) < 0) return;
}

bool InteractiveProgram::AwaitError(const std::string& text, absl::Duration timeout) {
  const absl::Time deadline = absl::Now() + timeout;
  for (;;) {
    const size_t found = ReadFile(directory_.File("err")).find(text, awaited_);
    if (found != std::string::npos) {
      awaited_ = found + text.size();
      return true;
    }
    if (absl::Now() >= deadline) return false;
    absl::SleepFor(kPoll);
  }
}

absl::StatusOr<ProgramResult> InteractiveProgram::Finish(absl::Duration timeout) {
  close(input_);
  input_ = -1;
  ProgramResult result;
  MMFREE_ASSIGN_OR_RETURN(result.exit_code, WaitFor(pid_, timeout));
  pid_ = -1;
  result.out = ReadFile(directory_.File("out"));
  result.err = ReadFile(directory_.File("err"));
  return result;
}

absl::StatusOr<std::unique_ptr<ServerProcess>> ServerProcess::Start(
    const std::vector<std::string>& flags) {
  std::unique_ptr<ServerProcess> server(new ServerProcess);
  const std::string ports = server->directory_.File("ports");
  std::vector<std::string> command = {
      Binary("mmfree-server"),
      absl::StrCat("--model=", MMFREE_SOURCE_DIR, "/deploy/models/tales"),
      "--backend=cpu",
      "--listen=127.0.0.1:0",
      "--metrics_listen=127.0.0.1:0",
      absl::StrCat("--port_file=", ports)};
  command.insert(command.end(), flags.begin(), flags.end());
  MMFREE_ASSIGN_OR_RETURN(
      server->pid_, Spawn(command, server->directory_.File("out"), server->directory_.File("err")));
  const absl::Time deadline = absl::Now() + Patience(absl::Minutes(2));
  while (!std::filesystem::exists(ports)) {
    const absl::StatusOr<int> code = WaitFor(server->pid_, absl::ZeroDuration());
    if (code.ok()) {
      server->reaped_ = true;
      return absl::FailedPreconditionError(
          absl::StrCat("the server ended with ", *code, ": ", server->Log()));
    }
    if (absl::Now() >= deadline) {
      return absl::DeadlineExceededError(
          absl::StrCat("the server does not serve: ", server->Log()));
    }
    absl::SleepFor(kPoll);
  }
  const std::string lines = ReadFile(ports);
  if (std::sscanf(lines.c_str(), "grpc=%d\nmetrics=%d", &server->grpc_port_,
                  &server->metrics_port_) != 2) {
    return absl::FailedPreconditionError(absl::StrCat("port file: ", lines));
  }
  return server;
}

ServerProcess::~ServerProcess() {
  if (pid_ < 0 || reaped_) return;
  kill(pid_, SIGKILL);
  waitpid(pid_, nullptr, 0);
}

std::string ServerProcess::address() const { return absl::StrCat("127.0.0.1:", grpc_port_); }

void ServerProcess::Signal(int signal) const { kill(pid_, signal); }

absl::StatusOr<int> ServerProcess::Wait(absl::Duration timeout) {
  absl::StatusOr<int> code = WaitFor(pid_, timeout);
  reaped_ = code.ok();
  return code;
}

std::string ServerProcess::Log() const { return ReadFile(directory_.File("err")); }

absl::StatusOr<ProgramResult> ServerProcess::Client(const std::vector<std::string>& arguments,
                                                    absl::Duration timeout) const {
  std::vector<std::string> command = {Binary("mmfree"), absl::StrCat("--server=", address())};
  command.insert(command.end(), arguments.begin(), arguments.end());
  return RunProgram(command, timeout);
}

}  // namespace mmfree

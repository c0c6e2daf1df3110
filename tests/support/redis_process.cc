#include "tests/support/redis_process.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>

#include <random>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "tests/support/loopback.h"
#include "tests/support/patience.h"

namespace mmfree {
namespace {

// Another process can only be asked; nothing depends on this interval.
constexpr absl::Duration kPoll = absl::Milliseconds(5);

// A free port that the system gives to nobody else while the server that had it starts again: those
// that it gives out by itself are above 32767. 0 when there is none.
int FreePort() {
  std::random_device random;
  for (int attempt = 0; attempt < 100; ++attempt) {
    int port = 20'000 + static_cast<int>(random() % 12'000);
    close(BindLoopback(&port));
    if (port != 0) return port;
  }
  return 0;
}

// Whether the server there answers this command, and not with an error.
bool Answers(int port, const std::string& command) {
  const int fd = ConnectLoopback(port);
  if (fd < 0) return false;
  const std::string line = command + "\r\n";
  char reply = 0;
  const bool answers = write(fd, line.data(), line.size()) == static_cast<ssize_t>(line.size()) &&
                       read(fd, &reply, 1) == 1 && reply == '+';
  close(fd);
  return answers;
}

}  // namespace

std::unique_ptr<RedisProcess> RedisProcess::Start() {
  std::unique_ptr<RedisProcess> redis(new RedisProcess);
  redis->port_ = FreePort();
  if (redis->port_ == 0 || !redis->Launch()) return nullptr;
  return redis;
}

RedisProcess::~RedisProcess() { Kill(); }

void RedisProcess::Kill() {
  if (pid_ <= 0) return;
  kill(pid_, SIGKILL);
  waitpid(pid_, nullptr, 0);
  pid_ = -1;
}

void RedisProcess::Freeze() {
  kill(pid_, SIGSTOP);
  // Until it has stopped it could still answer.
  siginfo_t info;
  waitid(P_PID, static_cast<id_t>(pid_), &info, WSTOPPED | WNOWAIT);
}

void RedisProcess::Thaw() { kill(pid_, SIGCONT); }

bool RedisProcess::Command(const std::string& command) const { return Answers(port_, command); }

bool RedisProcess::Restart() {
  Kill();
  return Launch();
}

bool RedisProcess::Launch() {
  const std::string port = std::to_string(port_);
  pid_ = fork();
  if (pid_ == 0) {
    const int null = open("/dev/null", O_RDWR);
    dup2(null, STDOUT_FILENO);
    dup2(null, STDERR_FILENO);
    execlp("redis-server", "redis-server", "--port", port.c_str(), "--bind", "127.0.0.1", "--dir",
           directory_.path().c_str(), "--save", "", "--appendonly", "yes", "--appendfsync",
           "always", static_cast<char*>(nullptr));
    _exit(127);
  }
  const absl::Time give_up = absl::Now() + Patience(absl::Minutes(1));
  while (pid_ > 0 && absl::Now() < give_up) {
    if (waitpid(pid_, nullptr, WNOHANG) == pid_) {
      pid_ = -1;
      return false;
    }
    if (Answers(port_, "PING")) return true;
    absl::SleepFor(kPoll);
  }
  Kill();
  return false;
}

}  // namespace mmfree

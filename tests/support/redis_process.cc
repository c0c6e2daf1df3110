#include "tests/support/redis_process.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace mmfree {
namespace {

// Another process can only be asked; nothing depends on this interval.
constexpr absl::Duration kPoll = absl::Milliseconds(5);

sockaddr_in Loopback(int port) {
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return address;
}

int FreePort() {
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address = Loopback(0);
  socklen_t size = sizeof(address);
  int port = 0;
  if (bind(fd, reinterpret_cast<sockaddr*>(&address), size) == 0 &&
      getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size) == 0) {
    port = ntohs(address.sin_port);
  }
  close(fd);
  return port;
}

// Whether the server there answers commands.
bool Answers(int port) {
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const sockaddr_in address = Loopback(port);
  bool answers = false;
  if (connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0) {
    constexpr char kPing[] = "PING\r\n";
    char reply = 0;
    answers = write(fd, kPing, sizeof(kPing) - 1) == sizeof(kPing) - 1 &&
              read(fd, &reply, 1) == 1 && reply == '+';
  }
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
  const absl::Time give_up = absl::Now() + absl::Seconds(20);
  while (pid_ > 0 && absl::Now() < give_up) {
    if (waitpid(pid_, nullptr, WNOHANG) == pid_) {
      pid_ = -1;
      return false;
    }
    if (Answers(port_)) return true;
    absl::SleepFor(kPoll);
  }
  Kill();
  return false;
}

}  // namespace mmfree

// A real redis-server on a free loopback port, for tests. Skip the test when there is none.
#ifndef MMFREE_TESTS_SUPPORT_REDIS_PROCESS_H_
#define MMFREE_TESTS_SUPPORT_REDIS_PROCESS_H_

#include <sys/types.h>

#include <memory>
#include <string>

#include "tests/support/temp_directory.h"

namespace mmfree {

// Killed and reaped when destroyed. Not thread-safe.
class RedisProcess {
 public:
  // Null when redis-server is not installed or does not start.
  static std::unique_ptr<RedisProcess> Start();
  ~RedisProcess();
  RedisProcess(const RedisProcess&) = delete;
  RedisProcess& operator=(const RedisProcess&) = delete;

  int port() const { return port_; }
  // Ends it as a crash does.
  void Kill();
  // Stops it as a machine does that hangs: it keeps its connections and answers nothing. And lets
  // it go on.
  void Freeze();
  void Thaw();
  // Sends a command, its words apart by spaces; whether the answer is OK.
  bool Command(const std::string& command) const;
  // Starts it again on the same port and data (an append-only file that is written at once).
  bool Restart();

 private:
  RedisProcess() = default;
  bool Launch();

  TempDirectory directory_;
  int port_ = 0;
  pid_t pid_ = -1;
};

}  // namespace mmfree

#endif  // MMFREE_TESTS_SUPPORT_REDIS_PROCESS_H_

// A TCP proxy on loopback that can hold back what clients send, for tests of messages that come
// late.
#ifndef MMFREE_TESTS_SUPPORT_HOLDING_PROXY_H_
#define MMFREE_TESTS_SUPPORT_HOLDING_PROXY_H_

#include <atomic>
#include <list>
#include <string>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

namespace mmfree {

// Thread-safe. Its connections end when it is destroyed.
class HoldingProxy {
 public:
  // Forwards to 127.0.0.1:`port`.
  explicit HoldingProxy(int port);
  ~HoldingProxy();
  HoldingProxy(const HoldingProxy&) = delete;
  HoldingProxy& operator=(const HoldingProxy&) = delete;

  // Where clients connect.
  int port() const { return port_; }

  // Connections that are made from now on go to 127.0.0.1:`port`.
  void SetTarget(int port) { target_ = port; }

  // From now on a message that contains `word` is not forwarded, nor what its client sends after
  // it, even when that client is gone.
  void Hold(const std::string& word);
  // Forwards what was held, and returns when each of those messages was answered: how many.
  int Release();

 private:
  struct Link {
    int client = -1;
    int server = -1;
    bool holds = false;
    std::string held;
  };

  void Run();
  void Accept();
  void FromClient(Link* link);

  int listener_ = -1;
  int port_ = 0;
  std::atomic<int> target_;
  std::atomic<bool> stop_{false};
  absl::Mutex mutex_;
  std::string word_ ABSL_GUARDED_BY(mutex_);
  std::list<Link> links_ ABSL_GUARDED_BY(mutex_);
  std::thread thread_;
};

}  // namespace mmfree

#endif  // MMFREE_TESTS_SUPPORT_HOLDING_PROXY_H_

#include "tests/support/holding_proxy.h"

#include <poll.h>

#include <vector>

#include "tests/support/loopback.h"

namespace mmfree {
namespace {

// Another thread can only be told by a flag; nothing in a test depends on this interval.
constexpr int kPollMs = 2;

bool SendAll(int fd, const std::string& bytes) {
  size_t sent = 0;
  while (sent < bytes.size()) {
    const ssize_t n = send(fd, bytes.data() + sent, bytes.size() - sent, MSG_NOSIGNAL);
    if (n <= 0) return false;
    sent += static_cast<size_t>(n);
  }
  return true;
}

// What there is; empty at the end of the connection.
std::string Receive(int fd) {
  std::string bytes(64 << 10, '\0');
  const ssize_t n = recv(fd, bytes.data(), bytes.size(), 0);
  bytes.resize(n > 0 ? static_cast<size_t>(n) : 0);
  return bytes;
}

void Close(int* fd) {
  if (*fd >= 0) close(*fd);
  *fd = -1;
}

}  // namespace

HoldingProxy::HoldingProxy(int port) : target_(port) {
  listener_ = BindLoopback(&port_);
  listen(listener_, 64);
  thread_ = std::thread([this] { Run(); });
}

HoldingProxy::~HoldingProxy() {
  stop_ = true;
  thread_.join();
  Close(&listener_);
  absl::MutexLock lock(&mutex_);
  for (Link& link : links_) {
    Close(&link.client);
    Close(&link.server);
  }
}

void HoldingProxy::Hold(const std::string& word) {
  absl::MutexLock lock(&mutex_);
  word_ = word;
}

int HoldingProxy::Release() {
  absl::MutexLock lock(&mutex_);
  word_.clear();
  int released = 0;
  for (Link& link : links_) {
    if (!link.holds) continue;
    link.holds = false;
    if (SendAll(link.server, link.held) && !Receive(link.server).empty()) ++released;
    link.held.clear();
  }
  return released;
}

void HoldingProxy::Run() {
  while (!stop_) {
    std::vector<pollfd> polled = {{listener_, POLLIN, 0}};
    {
      absl::MutexLock lock(&mutex_);
      for (const Link& link : links_) {
        polled.push_back({link.client, POLLIN, 0});  // ignored when it is -1
        polled.push_back({link.holds ? -1 : link.server, POLLIN, 0});
      }
    }
    if (poll(polled.data(), polled.size(), kPollMs) <= 0) continue;
    absl::MutexLock lock(&mutex_);
    size_t i = 1;
    for (Link& link : links_) {
      if (polled[i].revents != 0) FromClient(&link);
      if (polled[i + 1].revents != 0 && !link.holds && link.server >= 0) {
        const std::string bytes = Receive(link.server);
        if (bytes.empty() || !SendAll(link.client, bytes)) Close(&link.server);
      }
      i += 2;
    }
    for (Link& link : links_) {
      if (link.holds || (link.client >= 0 && link.server >= 0)) continue;
      Close(&link.client);
      Close(&link.server);
    }
    if (polled[0].revents != 0) Accept();
  }
}

void HoldingProxy::Accept() {
  mutex_.AssertHeld();
  const int client = accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
  if (client < 0) return;
  links_.push_back({client, ConnectLoopback(target_), false, ""});
}

void HoldingProxy::FromClient(Link* link) {
  mutex_.AssertHeld();
  if (link->client < 0) return;
  const std::string bytes = Receive(link->client);
  if (bytes.empty()) {
    Close(&link->client);
    return;
  }
  link->holds = link->holds || (!word_.empty() && bytes.find(word_) != std::string::npos);
  if (link->holds) {
    link->held += bytes;
  } else if (!SendAll(link->server, bytes)) {
    Close(&link->server);
  }
}

}  // namespace mmfree

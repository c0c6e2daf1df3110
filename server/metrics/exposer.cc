#include "server/metrics/exposer.h"

#include <netdb.h>
#include <netinet/in.h>
#include <prometheus/exposer.h>
#include <prometheus/registry.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <exception>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "absl/time/time.h"
#include "server/base/status_macros.h"
#include "server/metrics/process_metrics.h"

namespace mmfree {
namespace {

struct ResolvedAddress {
  sockaddr_storage address = {};
  socklen_t length = 0;
  std::string numeric;  // "127.0.0.1:9090", "[::1]:9090"
};

absl::StatusOr<ResolvedAddress> Resolve(absl::string_view address) {
  const size_t colon = address.rfind(':');
  absl::string_view host = address.substr(0, colon == absl::string_view::npos ? 0 : colon);
  int port = -1;
  if (host.empty() || !absl::SimpleAtoi(address.substr(colon + 1), &port) || port < 0 ||
      port > 65535) {
    return absl::InvalidArgumentError(
        absl::StrCat("metrics address \"", address, "\": want HOST:PORT, e.g. 0.0.0.0:9090"));
  }
  if (absl::StartsWith(host, "[") && absl::EndsWith(host, "]")) {
    host = host.substr(1, host.size() - 2);
  }
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE;
  addrinfo* found = nullptr;
  if (const int error =
          getaddrinfo(std::string(host).c_str(), absl::StrCat(port).c_str(), &hints, &found);
      error != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("metrics address \"", address, "\": ", gai_strerror(error)));
  }
  ResolvedAddress resolved;
  memcpy(&resolved.address, found->ai_addr, found->ai_addrlen);
  resolved.length = found->ai_addrlen;
  char text[NI_MAXHOST];
  const int error = getnameinfo(found->ai_addr, found->ai_addrlen, text, sizeof(text), nullptr, 0,
                                NI_NUMERICHOST);
  const bool v6 = found->ai_family == AF_INET6;
  freeaddrinfo(found);
  if (error != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("metrics address \"", address, "\": ", gai_strerror(error)));
  }
  resolved.numeric = v6 ? absl::StrCat("[", text, "]:", port) : absl::StrCat(text, ":", port);
  return resolved;
}

// The HTTP library does not say why it cannot listen; the system does.
absl::Status TryToListen(absl::string_view asked, const ResolvedAddress& address) {
  const int fd = socket(address.address.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
  int error = fd < 0 ? errno : 0;
  if (error == 0) {
    const int on = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
    if (bind(fd, reinterpret_cast<const sockaddr*>(&address.address), address.length) != 0 ||
        listen(fd, 1) != 0) {
      error = errno;
    }
    close(fd);
  }
  if (error == 0) return absl::OkStatus();
  return absl::UnavailableError(
      absl::StrCat("cannot listen on ", asked, " for metrics: ", strerror(error)));
}

// Each connection takes a thread until its request has come or the timeout has passed. Connections
// that never ask (a probe that only connects) must not keep a scrape waiting for long.
std::vector<std::string> HttpOptions(const ResolvedAddress& address) {
  return {"listening_ports", address.numeric, "num_threads", "8", "request_timeout_ms", "1000"};
}

class MetricsExposerImpl final : public MetricsExposer {
 public:
  MetricsExposerImpl(const ResolvedAddress& address,
                     std::vector<std::shared_ptr<prometheus::Collectable>> served)
      : address_(address),
        served_(std::move(served)),
        exposer_(std::make_unique<prometheus::Exposer>(HttpOptions(address))) {
    for (const auto& collectable : served_) exposer_->RegisterCollectable(collectable);
    const std::vector<int> ports = exposer_->GetListeningPorts();
    if (!ports.empty()) port_ = ports[0];
  }

  // The HTTP library looks at its stop flag after a connection or every two seconds: connections
  // keep it from making every shutdown that slow.
  ~MetricsExposerImpl() override {
    absl::Notification stopped;
    std::thread waker([&] {
      do {
        Connect();
      } while (!stopped.WaitForNotificationWithTimeout(absl::Milliseconds(5)));
    });
    exposer_.reset();
    stopped.Notify();
    waker.join();
  }

  int port() const override { return port_; }

 private:
  void Connect() const {
    sockaddr_storage address = address_.address;
    // The port is at one place in both families.
    reinterpret_cast<sockaddr_in*>(&address)->sin_port = htons(static_cast<uint16_t>(port_));
    const int fd = socket(address.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0) return;
    // Whether it succeeds does not matter: it is tried again until the library has stopped.
    static_cast<void>(connect(fd, reinterpret_cast<const sockaddr*>(&address), address_.length));
    close(fd);
  }

  const ResolvedAddress address_;
  // The exposer only holds weak pointers to what it serves.
  const std::vector<std::shared_ptr<prometheus::Collectable>> served_;
  std::unique_ptr<prometheus::Exposer> exposer_;
  int port_ = 0;
};

}  // namespace

absl::StatusOr<std::unique_ptr<MetricsExposer>> StartExposer(
    absl::string_view address, std::shared_ptr<prometheus::Registry> registry,
    std::vector<std::shared_ptr<prometheus::Collectable>> others) {
  MMFREE_ASSIGN_OR_RETURN(const ResolvedAddress resolved, Resolve(address));
  MMFREE_RETURN_IF_ERROR(TryToListen(address, resolved));
  others.push_back(std::move(registry));
  others.push_back(std::make_shared<ProcessMetrics>());
  try {
    return std::make_unique<MetricsExposerImpl>(resolved, std::move(others));
  } catch (const std::exception& error) {
    return absl::UnavailableError(
        absl::StrCat("cannot listen on ", address, " for metrics: ", error.what()));
  }
}

}  // namespace mmfree

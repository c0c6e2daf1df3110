#include "server/rpc/listen_address.h"

#include <netdb.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <memory>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace mmfree {

absl::StatusOr<ListenAddress> ParseListenAddress(absl::string_view address) {
  const size_t colon = address.rfind(':');
  absl::string_view host = address.substr(0, colon == absl::string_view::npos ? 0 : colon);
  const bool bracketed = host.size() > 2 && host.front() == '[' && host.back() == ']';
  if (bracketed) host = host.substr(1, host.size() - 2);
  uint32_t port = 0;
  const bool host_ok =
      !host.empty() && (bracketed || host.find_first_of(":[]") == absl::string_view::npos);
  if (!host_ok || !absl::SimpleAtoi(address.substr(colon + 1), &port) || port > 65535) {
    return absl::InvalidArgumentError(
        absl::StrCat("\"", address,
                     "\" is not an address to listen on; use HOST:PORT, such as 0.0.0.0:50051, "
                     "[::]:50051 or localhost:0 (port 0 picks a free one)"));
  }
  return ListenAddress{std::string(host), static_cast<uint16_t>(port)};
}

absl::Status ProbeListenAddress(const ListenAddress& address) {
  const std::string name = absl::StrCat(address.host, ":", address.port);
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV;
  addrinfo* found = nullptr;
  const int error =
      getaddrinfo(address.host.c_str(), absl::StrCat(address.port).c_str(), &hints, &found);
  if (error != 0) {
    return absl::UnavailableError(
        absl::StrCat("cannot listen on ", name, ": ", gai_strerror(error)));
  }
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> owned(found, &freeaddrinfo);
  for (const addrinfo* info = found; info != nullptr; info = info->ai_next) {
    const int fd = socket(info->ai_family, info->ai_socktype | SOCK_CLOEXEC, info->ai_protocol);
    if (fd < 0) continue;
    const int on = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
    const bool bound =
        bind(fd, info->ai_addr, info->ai_addrlen) == 0 && listen(fd, /*backlog=*/1) == 0;
    const int bind_errno = errno;
    close(fd);
    if (!bound) {
      return absl::UnavailableError(
          absl::StrCat("cannot listen on ", name, ": ", strerror(bind_errno)));
    }
  }
  return absl::OkStatus();
}

}  // namespace mmfree

// Checks of the address that a server is to listen on, for errors better than "failed".
#ifndef MMFREE_SERVER_RPC_LISTEN_ADDRESS_H_
#define MMFREE_SERVER_RPC_LISTEN_ADDRESS_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace mmfree {

struct ListenAddress {
  std::string host;  // without brackets
  uint16_t port = 0;
};

// "HOST:PORT" or "[IPV6]:PORT". INVALID_ARGUMENT says what is wrong.
absl::StatusOr<ListenAddress> ParseListenAddress(absl::string_view address);

// Tries to bind a socket to the address and lets it go again. UNAVAILABLE with the system's reason;
// OK when it can be bound now.
absl::Status ProbeListenAddress(const ListenAddress& address);

}  // namespace mmfree

#endif  // MMFREE_SERVER_RPC_LISTEN_ADDRESS_H_

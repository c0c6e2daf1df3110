// TLS settings of the listening port.
#ifndef MMFREE_SERVER_RPC_TLS_H_
#define MMFREE_SERVER_RPC_TLS_H_

#include <grpcpp/security/server_credentials.h>

#include <memory>
#include <string>

#include "absl/status/statusor.h"

namespace mmfree {

struct TlsOptions {
  std::string cert_file;       // PEM certificate chain, the server's first; empty: no TLS
  std::string key_file;        // PEM private key of the first certificate
  std::string client_ca_file;  // PEM; when given, clients must show a certificate signed by one
};

// Insecure credentials when nothing is set. INVALID_ARGUMENT names the file (or the missing option)
// and what is wrong with it: unreadable, not PEM, a key of another certificate.
absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> MakeServerCredentials(
    const TlsOptions& options);

}  // namespace mmfree

#endif  // MMFREE_SERVER_RPC_TLS_H_

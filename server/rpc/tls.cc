#include "server/rpc/tls.h"

#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/x509.h>

#include <fstream>
#include <sstream>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "server/base/status_macros.h"

namespace mmfree {
namespace {

template <auto kFree>
struct Free {
  template <typename T>
  void operator()(T* object) const {
    kFree(object);
  }
};
using BioPtr = std::unique_ptr<BIO, Free<BIO_free_all>>;
using CertificatePtr = std::unique_ptr<X509, Free<X509_free>>;
using KeyPtr = std::unique_ptr<EVP_PKEY, Free<EVP_PKEY_free>>;

absl::StatusOr<std::string> ReadFile(absl::string_view option, const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::stringstream content;
  if (file) content << file.rdbuf();
  if (!file || content.str().empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat(option, ": cannot read ", path, ", or it is empty"));
  }
  return content.str();
}

absl::StatusOr<CertificatePtr> ParseCertificate(absl::string_view option, const std::string& path,
                                                const std::string& pem) {
  const BioPtr bio(BIO_new_mem_buf(pem.data(), static_cast<int>(pem.size())));
  CertificatePtr certificate(PEM_read_bio_X509(bio.get(), nullptr, nullptr, nullptr));
  ERR_clear_error();
  if (certificate == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat(option, ": ", path, " does not start with a PEM certificate"));
  }
  return certificate;
}

}  // namespace

absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> MakeServerCredentials(
    const TlsOptions& options) {
  if (options.cert_file.empty() && options.key_file.empty() && options.client_ca_file.empty()) {
    return grpc::InsecureServerCredentials();
  }
  if (options.cert_file.empty() || options.key_file.empty()) {
    return absl::InvalidArgumentError("TLS needs both --tls_cert and --tls_key");
  }
  MMFREE_ASSIGN_OR_RETURN(const std::string cert, ReadFile("--tls_cert", options.cert_file));
  MMFREE_ASSIGN_OR_RETURN(const std::string key, ReadFile("--tls_key", options.key_file));
  MMFREE_ASSIGN_OR_RETURN(const CertificatePtr certificate,
                          ParseCertificate("--tls_cert", options.cert_file, cert));
  const BioPtr key_bio(BIO_new_mem_buf(key.data(), static_cast<int>(key.size())));
  // An empty pass phrase, instead of the default callback that asks on the terminal.
  const KeyPtr private_key(
      PEM_read_bio_PrivateKey(key_bio.get(), nullptr, nullptr, const_cast<char*>("")));
  const bool matches =
      private_key != nullptr && X509_check_private_key(certificate.get(), private_key.get()) == 1;
  ERR_clear_error();
  if (private_key == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat("--tls_key: ", options.key_file, " is not an unencrypted PEM private key"));
  }
  if (!matches) {
    return absl::InvalidArgumentError(absl::StrCat("--tls_key: ", options.key_file,
                                                   " is not the key of the certificate in ",
                                                   options.cert_file));
  }

  grpc::SslServerCredentialsOptions ssl;
  ssl.pem_key_cert_pairs.push_back({key, cert});
  if (!options.client_ca_file.empty()) {
    MMFREE_ASSIGN_OR_RETURN(ssl.pem_root_certs,
                            ReadFile("--tls_client_ca", options.client_ca_file));
    MMFREE_RETURN_IF_ERROR(
        ParseCertificate("--tls_client_ca", options.client_ca_file, ssl.pem_root_certs).status());
    ssl.client_certificate_request = GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY;
  }
  return grpc::SslServerCredentials(ssl);
}

}  // namespace mmfree

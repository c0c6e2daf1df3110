// The HTTP endpoint that Prometheus scrapes.
#ifndef MMFREE_SERVER_METRICS_EXPOSER_H_
#define MMFREE_SERVER_METRICS_EXPOSER_H_

#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace prometheus {
class Collectable;
class Registry;
}  // namespace prometheus

namespace mmfree {

// Serves /metrics until destroyed.
class MetricsExposer {
 public:
  virtual ~MetricsExposer() = default;
  // The bound port, also when port 0 was asked for.
  virtual int port() const = 0;
};

// Serves what `registry` and `others` hold and the process_* metrics on `address`, "HOST:PORT" with
// a name or an address for HOST ("0.0.0.0", "[::]", "localhost") and 0 for any free port.
// INVALID_ARGUMENT: not such an address; UNAVAILABLE: it cannot be listened on, and why (port
// taken, no such address, no permission). The exposer shares ownership of what it serves.
absl::StatusOr<std::unique_ptr<MetricsExposer>> StartExposer(
    absl::string_view address, std::shared_ptr<prometheus::Registry> registry,
    std::vector<std::shared_ptr<prometheus::Collectable>> others = {});

}  // namespace mmfree

#endif  // MMFREE_SERVER_METRICS_EXPOSER_H_

// The served models by name.
#ifndef MMFREE_SERVER_RPC_MODEL_REGISTRY_H_
#define MMFREE_SERVER_RPC_MODEL_REGISTRY_H_

#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "server/engine/engine.h"

namespace mmfree {

// Filled at start, then read by any thread. Does not own the engines, which must outlive it.
class ModelRegistry {
 public:
  // INVALID_ARGUMENT unless the engine's model name is 1 to 128 characters of [A-Za-z0-9._-];
  // ALREADY_EXISTS when it is taken.
  absl::Status Add(Engine* engine);

  // An empty name means the only model. NOT_FOUND for an unknown name; INVALID_ARGUMENT for an
  // empty one when several models are served. Both list the names.
  absl::StatusOr<Engine*> Find(absl::string_view name) const;

  // By name.
  std::vector<Engine*> engines() const;

 private:
  std::string Names() const;

  std::map<std::string, Engine*, std::less<>> engines_;
};

// Whether `name` can name a model or a session: 1 to 128 characters of [A-Za-z0-9._-].
bool IsResourceName(absl::string_view name);

}  // namespace mmfree

#endif  // MMFREE_SERVER_RPC_MODEL_REGISTRY_H_

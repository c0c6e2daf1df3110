#include "server/rpc/model_registry.h"

#include <algorithm>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "server/rpc/status.h"

namespace mmfree {

bool IsResourceName(absl::string_view name) {
  return !name.empty() && name.size() <= 128 && std::all_of(name.begin(), name.end(), [](char c) {
    return absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '.' || c == '_' || c == '-';
  });
}

absl::Status ModelRegistry::Add(Engine* engine) {
  const std::string& name = engine->model_name();
  if (!IsResourceName(name)) {
    return absl::InvalidArgumentError(
        absl::StrCat("model name ", Quoted(name),
                     " is not 1 to 128 characters of letters, digits, '.', '_', '-'"));
  }
  if (!engines_.emplace(name, engine).second) {
    return absl::AlreadyExistsError(absl::StrCat("two models are named ", Quoted(name)));
  }
  return absl::OkStatus();
}

absl::StatusOr<Engine*> ModelRegistry::Find(absl::string_view name) const {
  if (name.empty()) {
    if (engines_.size() == 1) return engines_.begin()->second;
    return InvalidField("model",
                        absl::StrCat("required, because several models are served: ", Names()));
  }
  const auto found = engines_.find(std::string(name));
  if (found == engines_.end()) {
    return absl::NotFoundError(
        absl::StrCat("model ", Quoted(name), " is not served; served: ", Names()));
  }
  return found->second;
}

std::vector<Engine*> ModelRegistry::engines() const {
  std::vector<Engine*> engines;
  engines.reserve(engines_.size());
  for (const auto& [name, engine] : engines_) engines.push_back(engine);
  return engines;
}

std::string ModelRegistry::Names() const {
  return absl::StrJoin(engines_, ", ", [](std::string* out, const auto& entry) {
    absl::StrAppend(out, entry.first);
  });
}

}  // namespace mmfree

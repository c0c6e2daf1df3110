// The tensors of a model directory: model.safetensors, or shards listed by
// model.safetensors.index.json.
#ifndef MMFREE_SERVER_MODEL_CHECKPOINT_H_
#define MMFREE_SERVER_MODEL_CHECKPOINT_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "server/model/safetensors.h"

namespace mmfree {

inline constexpr const char* kConfigFile = "config.json";
inline constexpr const char* kWeightsFile = "model.safetensors";
inline constexpr const char* kIndexFile = "model.safetensors.index.json";

// Immutable after construction; owns its mappings. Movable.
class Checkpoint {
 public:
  struct Entry {
    const TensorView* tensor = nullptr;
    const std::string* source = nullptr;  // path of the file it lies in
  };

  // Opens model.safetensors if there is one, else every shard that the index names. NOT_FOUND when
  // a file is missing, INVALID_ARGUMENT when one is wrong or the index does not fit its shards.
  static absl::StatusOr<Checkpoint> Open(const std::string& directory);

  const Entry* Find(absl::string_view name) const;
  const absl::flat_hash_map<std::string, Entry>& entries() const { return entries_; }
  // What to name in an error about a missing tensor: the file, or the index.
  const std::string& source() const { return source_; }

  // model.safetensors when the checkpoint is that single file, else null.
  const SafetensorsFile* single_file() const { return sharded_ ? nullptr : files_.front().get(); }
  SafetensorsFile* single_file() { return sharded_ ? nullptr : files_.front().get(); }

 private:
  Checkpoint() = default;
  absl::Status OpenShards(const std::string& directory, absl::string_view index_json);

  std::string source_;
  bool sharded_ = false;
  std::vector<std::unique_ptr<SafetensorsFile>> files_;  // stable addresses for the entries
  absl::flat_hash_map<std::string, Entry> entries_;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_MODEL_CHECKPOINT_H_

#include "server/model/checkpoint.h"

#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "server/base/status_macros.h"
#include "server/model/json.h"

namespace mmfree {
namespace {

constexpr size_t kMaxIndexBytes = size_t{16} << 20;
constexpr size_t kMaxShards = 1024;

// A shard is a file of the same directory; anything else could point outside it.
bool IsPlainFileName(absl::string_view name) {
  return !name.empty() && name != "." && name != ".." &&
         name.find('/') == absl::string_view::npos && name.find('\0') == absl::string_view::npos;
}

}  // namespace

absl::StatusOr<Checkpoint> Checkpoint::Open(const std::string& directory) {
  Checkpoint checkpoint;
  checkpoint.source_ = absl::StrCat(directory, "/", kWeightsFile);
  absl::StatusOr<SafetensorsFile> single = SafetensorsFile::Open(checkpoint.source_);
  if (single.ok()) {
    checkpoint.files_.push_back(std::make_unique<SafetensorsFile>(*std::move(single)));
    const SafetensorsFile& file = *checkpoint.files_.front();
    for (const TensorView& tensor : file.tensors()) {
      checkpoint.entries_.emplace(tensor.name, Entry{&tensor, &file.source()});
    }
    return checkpoint;
  }
  if (!absl::IsNotFound(single.status())) return single.status();

  checkpoint.sharded_ = true;
  checkpoint.source_ = absl::StrCat(directory, "/", kIndexFile);
  absl::StatusOr<Region> index = Region::MapFile(checkpoint.source_);
  if (absl::IsNotFound(index.status())) {
    return absl::NotFoundError(
        absl::StrCat(directory, ": has neither ", kWeightsFile, " nor ", kIndexFile));
  }
  MMFREE_RETURN_IF_ERROR(index.status());
  MMFREE_RETURN_IF_ERROR(checkpoint.OpenShards(
      directory, absl::string_view(reinterpret_cast<const char*>(index->data()),
                                   static_cast<size_t>(index->size()))));
  return checkpoint;
}

absl::Status Checkpoint::OpenShards(const std::string& directory, absl::string_view index_json) {
  JsonLimits limits;
  limits.max_bytes = kMaxIndexBytes;
  MMFREE_ASSIGN_OR_RETURN(const nlohmann::json root, ParseJsonObject(index_json, source_, limits));
  const auto map = root.find("weight_map");
  if (map == root.end() || !map->is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(source_, ": weight_map: expected an object"));
  }
  absl::flat_hash_map<std::string, const SafetensorsFile*> shards;
  for (const auto& [name, value] : map->items()) {
    if (!value.is_string() || !IsPlainFileName(value.get_ref<const std::string&>())) {
      return absl::InvalidArgumentError(absl::StrCat(source_, ": weight_map: tensor ",
                                                     QuotedName(name),
                                                     ": expected the name of a file beside it"));
    }
    const std::string& shard_name = value.get_ref<const std::string&>();
    const SafetensorsFile*& shard = shards[shard_name];
    if (shard == nullptr) {
      if (shards.size() > kMaxShards) {
        return absl::InvalidArgumentError(
            absl::StrCat(source_, ": weight_map: more than ", kMaxShards, " shards"));
      }
      MMFREE_ASSIGN_OR_RETURN(SafetensorsFile file,
                              SafetensorsFile::Open(absl::StrCat(directory, "/", shard_name)));
      files_.push_back(std::make_unique<SafetensorsFile>(std::move(file)));
      shard = files_.back().get();
    }
    const TensorView* const tensor = shard->Find(name);
    if (tensor == nullptr) {
      return absl::InvalidArgumentError(absl::StrCat(shard->source(), ": tensor ", QuotedName(name),
                                                     " is missing, but ", kIndexFile,
                                                     " says it is there"));
    }
    entries_.emplace(name, Entry{tensor, &shard->source()});
  }
  return absl::OkStatus();
}

const Checkpoint::Entry* Checkpoint::Find(absl::string_view name) const {
  const auto it = entries_.find(name);
  return it == entries_.end() ? nullptr : &it->second;
}

}  // namespace mmfree

#include "server/model/loader.h"

#include <sys/stat.h>

#include <cerrno>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "server/base/status_macros.h"
#include "server/model/packed.h"
#include "server/model/region.h"

namespace mmfree {
namespace {

absl::Status CheckDirectory(const std::string& directory) {
  struct stat info;
  if (stat(directory.c_str(), &info) != 0) {
    if (errno == ENOENT || errno == ENOTDIR) {
      return absl::NotFoundError(absl::StrCat(directory, ": no such model directory"));
    }
    return absl::ErrnoToStatus(errno, directory);
  }
  if (!S_ISDIR(info.st_mode)) {
    return absl::InvalidArgumentError(
        absl::StrCat(directory, ": not a directory, expected a model directory"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::shared_ptr<const StoredModel>> LoadStoredModel(const std::string& directory,
                                                                   const LoadOptions& options) {
  MMFREE_RETURN_IF_ERROR(CheckDirectory(directory));
  const std::string config_path = absl::StrCat(directory, "/", kConfigFile);
  MMFREE_ASSIGN_OR_RETURN(const Region config_text, Region::MapFile(config_path));
  MMFREE_ASSIGN_OR_RETURN(
      const ModelConfig config,
      ModelConfig::FromJson(absl::string_view(reinterpret_cast<const char*>(config_text.data()),
                                              static_cast<size_t>(config_text.size())),
                            config_path));
  MMFREE_ASSIGN_OR_RETURN(Checkpoint checkpoint, Checkpoint::Open(directory));
  SafetensorsFile* const single = checkpoint.single_file();
  const bool packed = single != nullptr && IsPacked(*single);
  MMFREE_ASSIGN_OR_RETURN(StoredModel::Parts parts,
                          packed ? LoadPacked(config, std::move(*single), options)
                                 : LoadPublished(config, checkpoint, options));
  return std::make_shared<const StoredModel>(std::move(parts));
}

absl::StatusOr<std::shared_ptr<const Model>> Model::Load(const std::string& directory,
                                                         const LoadOptions& options) {
  return LoadStoredModel(directory, options);
}

absl::StatusOr<std::shared_ptr<const Model>> Model::Load(const std::string& directory,
                                                         const ProgressFn& progress) {
  LoadOptions options;
  options.progress = progress;
  return LoadStoredModel(directory, options);
}

}  // namespace mmfree

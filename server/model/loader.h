// Model directories in, StoredModel out: the parts behind Model::Load.
#ifndef MMFREE_SERVER_MODEL_LOADER_H_
#define MMFREE_SERVER_MODEL_LOADER_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "server/model/checkpoint.h"
#include "server/model/config.h"
#include "server/model/model.h"
#include "server/model/stored_model.h"

namespace mmfree {

// Model::Load, keeping the concrete type (mmfree-pack writes it out again).
absl::StatusOr<std::shared_ptr<const StoredModel>> LoadStoredModel(const std::string& directory,
                                                                   const LoadOptions& options);

// Quantises and packs a checkpoint in the published layout. Errors as Model::Load.
absl::StatusOr<StoredModel::Parts> LoadPublished(const ModelConfig& config,
                                                 const Checkpoint& checkpoint,
                                                 const LoadOptions& options);

}  // namespace mmfree

#endif  // MMFREE_SERVER_MODEL_LOADER_H_

// The packed form's file, model.safetensors (server/model/FORMAT.md): its header, its reader, and
// the digest.
#ifndef MMFREE_SERVER_MODEL_PACKED_H_
#define MMFREE_SERVER_MODEL_PACKED_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "server/model/config.h"
#include "server/model/layout.h"
#include "server/model/model.h"
#include "server/model/safetensors.h"
#include "server/model/stored_model.h"

namespace mmfree {

inline constexpr absl::string_view kPackedFormat = "mmfree-packed";
inline constexpr absl::string_view kPackedFormatVersion = "1";

// Whether the file says that it is a packed model, of whatever version.
bool IsPacked(const SafetensorsFile& file);

// Reads the file in place and takes its mapping. Without `verify` it touches the header and the
// vectors only; with it, every byte: SHA-256s, codes and padding. Errors as Model::Load.
absl::StatusOr<StoredModel::Parts> LoadPacked(const ModelConfig& config, SafetensorsFile file,
                                              const LoadOptions& options);

// The bytes before the first tensor: length, JSON, spaces up to a multiple of 64. The file is this
// followed by the tensors in the layout's order.
std::string PackedHeader(const StoredModel& model);

// Model::digest() of a model with these tensors; `scales` and `sha256` by tensor of the layout.
std::string ModelDigest(const ModelConfig& config, DType embedding_dtype,
                        const PackedLayout& layout, absl::Span<const float> scales,
                        absl::Span<const std::string> sha256);

}  // namespace mmfree

#endif  // MMFREE_SERVER_MODEL_PACKED_H_

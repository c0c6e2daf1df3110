// Reader of one safetensors file: an 8-byte little-endian header length, a JSON header, then the
// tensors' bytes without holes (https://github.com/huggingface/safetensors#format).
//
// Input is not trusted: every length, offset, size, dtype and shape is checked before it is used,
// so a file that opens has only tensors that lie inside it, do not overlap and are as long as their
// shape says.
#ifndef MMFREE_SERVER_MODEL_SAFETENSORS_H_
#define MMFREE_SERVER_MODEL_SAFETENSORS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "server/model/region.h"

namespace mmfree {

enum class TensorType : uint8_t { kF32, kF16, kBF16, kU8, kI32 };

// As the format spells it, e.g. "BF16".
absl::string_view TensorTypeName(TensorType type);
int64_t TensorTypeBytes(TensorType type);

struct TensorView {
  std::string name;
  TensorType type = TensorType::kF32;
  std::vector<int64_t> shape;     // each >= 0; empty for a scalar
  const uint8_t* data = nullptr;  // no alignment is promised
  int64_t bytes = 0;
};

// "[3, 4]".
std::string ShapeName(absl::Span<const int64_t> shape);

// A name out of a file, made safe and short for a message: quoted, escaped, cut.
std::string QuotedName(absl::string_view name);

// Immutable after construction; owns its mapping. Movable: views stay valid across moves.
class SafetensorsFile {
 public:
  // Largest header accepted. A 13B model's packed header is 0.2 MB.
  static constexpr int64_t kMaxHeaderBytes = int64_t{16} << 20;
  static constexpr int64_t kMaxDimensions = 8;

  // Maps and checks the file. NOT_FOUND, or INVALID_ARGUMENT naming the file, the tensor, what was
  // expected and what is there.
  static absl::StatusOr<SafetensorsFile> Open(const std::string& path);

  // The same for bytes in memory, which must outlive the result. `source` names them in errors.
  static absl::StatusOr<SafetensorsFile> Parse(absl::Span<const uint8_t> bytes,
                                               absl::string_view source);

  const std::string& source() const { return source_; }
  // In the order of their data.
  const std::vector<TensorView>& tensors() const { return tensors_; }
  // Null when there is none.
  const TensorView* Find(absl::string_view name) const;
  // The header's __metadata__.
  const absl::flat_hash_map<std::string, std::string>& metadata() const { return metadata_; }

  // Hands the mapping over; views stay valid as long as it lives.
  Region TakeRegion() && { return std::move(region_); }

 private:
  SafetensorsFile() = default;

  std::string source_;
  Region region_;
  std::vector<TensorView> tensors_;
  absl::flat_hash_map<std::string, size_t> index_;
  absl::flat_hash_map<std::string, std::string> metadata_;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_MODEL_SAFETENSORS_H_

// The one concrete Model: views into a region that it owns.
#ifndef MMFREE_SERVER_MODEL_STORED_MODEL_H_
#define MMFREE_SERVER_MODEL_STORED_MODEL_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "server/model/layout.h"
#include "server/model/model.h"
#include "server/model/region.h"

namespace mmfree {

class StoredModel final : public Model {
 public:
  struct Parts {
    ModelConfig config;
    PackedLayout layout;
    DType embedding_dtype = DType::kF32;
    Region region;
    // For each tensor of the layout: its bytes inside `region`, and its scale (0 where it is not a
    // ternary matrix).
    std::vector<const uint8_t*> data;
    std::vector<float> scales;
    // SHA-256 of each tensor, lower-case hex; empty for a random model.
    std::vector<std::string> sha256;
    std::string digest;
    bool packed = false;
  };

  explicit StoredModel(Parts parts);

  const PackedLayout& layout() const { return layout_; }
  const uint8_t* data(size_t tensor) const { return data_[tensor]; }
  float scale(size_t tensor) const { return scales_[tensor]; }
  const std::string& sha256(size_t tensor) const { return sha256_[tensor]; }

 private:
  PackedLayout layout_;
  Region region_;
  std::vector<const uint8_t*> data_;
  std::vector<float> scales_;
  std::vector<std::string> sha256_;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_MODEL_STORED_MODEL_H_

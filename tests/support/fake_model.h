// A model without weights and a tokenizer of bytes, for what only needs their sizes and interfaces.
#ifndef MMFREE_TESTS_SUPPORT_FAKE_MODEL_H_
#define MMFREE_TESTS_SUPPORT_FAKE_MODEL_H_

#include <memory>
#include <string>
#include <vector>

#include "server/model/model.h"
#include "server/tokenizer/tokenizer.h"

namespace mmfree {

class FakeModel final : public Model {
 public:
  explicit FakeModel(int64_t vocab_size) {
    config_.vocab_size = vocab_size;
    config_.hidden_size = 8;
    config_.intermediate_size = 16;
    config_.num_layers = 1;
    config_.bos_token_id = 0;  // not the tokenizer's: who puts it in front of a text decides
    digest_ = std::string(64, 'f');
  }
};

// Ids 0 to 2 are control tokens (unknown, BOS, EOS); 3 + b is the byte b.
class FakeTokenizer final : public Tokenizer {
 public:
  FakeTokenizer() {
    for (int byte = 0; byte < 256; ++byte) bytes_.emplace_back(1, static_cast<char>(byte));
  }

  absl::StatusOr<std::vector<int32_t>> Encode(absl::string_view text,
                                              const EncodeOptions& options) const override {
    std::vector<int32_t> ids;
    if (options.bos && !options.continuation) ids.push_back(bos_id());
    for (const char c : text) ids.push_back(3 + static_cast<unsigned char>(c));
    return ids;
  }
  absl::StatusOr<std::string> Decode(absl::Span<const int32_t> ids, bool) const override {
    std::string text;
    for (const int32_t id : ids) text.append(TokenBytes(id).data(), TokenBytes(id).size());
    return text;
  }
  absl::string_view TokenBytes(int32_t id) const override {
    return id < 3 ? absl::string_view() : absl::string_view(bytes_[id - 3]);
  }
  absl::string_view Piece(int32_t id) const override { return TokenBytes(id); }
  int32_t bos_id() const override { return 1; }
  int32_t eos_id() const override { return 2; }
  int32_t size() const override { return 259; }

 private:
  std::vector<std::string> bytes_;
};

}  // namespace mmfree

#endif  // MMFREE_TESTS_SUPPORT_FAKE_MODEL_H_

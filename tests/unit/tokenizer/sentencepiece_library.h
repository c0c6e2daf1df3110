// The SentencePiece library, to compare with. Its header and Abseil's cannot be included together.
#ifndef MMFREE_TESTS_UNIT_TOKENIZER_SENTENCEPIECE_LIBRARY_H_
#define MMFREE_TESTS_UNIT_TOKENIZER_SENTENCEPIECE_LIBRARY_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace mmfree {

class SentencePieceLibrary {
 public:
  explicit SentencePieceLibrary(const std::string& serialized_model);
  ~SentencePieceLibrary();

  bool ok() const { return ok_; }
  std::vector<int32_t> Encode(const std::string& text) const;
  std::string Decode(const std::vector<int32_t>& ids) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
  bool ok_;
};

}  // namespace mmfree

#endif  // MMFREE_TESTS_UNIT_TOKENIZER_SENTENCEPIECE_LIBRARY_H_

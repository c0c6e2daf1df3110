// Byte-pair encoding with byte fallback, the same ids as SentencePiece's BPE model gives.
#ifndef MMFREE_SERVER_TOKENIZER_BPE_ENCODER_H_
#define MMFREE_SERVER_TOKENIZER_BPE_ENCODER_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/string_view.h"
#include "server/tokenizer/sentencepiece_model.h"

namespace mmfree {

// Thread-safe, immutable. Refers to the pieces of the model it was made from, which must outlive
// it.
class BpeEncoder {
 public:
  explicit BpeEncoder(const SentencePieceModel& model);

  // Appends the ids of `text`: valid UTF-8 of less than 2 GiB, normalized, with U+2581 for space.
  //
  // Starting from single characters, the neighbours whose concatenation is the piece of the highest
  // score (the leftmost of equals) are merged until no neighbours make a piece; characters that are
  // no piece by then become their bytes. Text is worked on in parts of a few KiB where it can be
  // cut, which leaves the ids as they are; a part of n characters costs O(n log n) time and
  // some 30 n bytes.
  void Encode(absl::string_view text, std::vector<int32_t>* ids) const;

 private:
  // The first place at or after byte `from`, not 0, where `text` can be cut; its size if none. BPE
  // merges neighbours only into a piece of the vocabulary, so nothing ever merges across two
  // characters that stand next to each other in no piece.
  size_t NextCut(absl::string_view text, size_t from) const;
  void EncodePart(absl::string_view text, std::vector<int32_t>* ids) const;

  struct ScoredPiece {
    int32_t id;
    float score;
  };
  absl::flat_hash_map<absl::string_view, ScoredPiece> pieces_;  // the normal ones
  absl::flat_hash_set<uint64_t> neighbours_;  // in any of them: left code point << 32 | right
  std::array<int32_t, 256> byte_ids_{};
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_TOKENIZER_BPE_ENCODER_H_

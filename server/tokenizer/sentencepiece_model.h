// A SentencePiece model file (tokenizer.model): a serialized sentencepiece.ModelProto.
//
// Read here and not by the SentencePiece library, whose shared object carries a protobuf of its own
// that cannot live in one process with the one gRPC uses
// (server/decisions/0006-own-bpe-encoder.md).
#ifndef MMFREE_SERVER_TOKENIZER_SENTENCEPIECE_MODEL_H_
#define MMFREE_SERVER_TOKENIZER_SENTENCEPIECE_MODEL_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace mmfree {

struct SentencePieceModel {
  enum class Type : uint8_t {  // the values of ModelProto.SentencePiece.Type
    kNormal = 1,
    kUnknown = 2,
    kControl = 3,
    kUserDefined = 4,
    kUnused = 5,
    kByte = 6,
  };
  struct Piece {
    std::string text;  // UTF-8, with U+2581 for space
    float score = 0;
    Type type = Type::kNormal;
    uint8_t byte = 0;  // what a kByte piece "<0xHH>" stands for
  };

  std::vector<Piece> pieces;  // by id
  std::string unk_surface = " \u2047 ";
  int32_t bos_id = -1;  // of the control piece that the trainer settings name; -1 without one
  int32_t eos_id = -1;
  bool add_dummy_prefix = true;
  bool remove_extra_whitespaces = true;

  // Parses and checks a model. INVALID_ARGUMENT says what is damaged: not a protobuf message; no
  // trainer or normalizer settings (a file cut short between two pieces parses, and would be
  // another tokenizer); an empty, repeated or non-UTF-8 piece; a score that is not a number; fewer
  // than 256 byte pieces. UNIMPLEMENTED names a setting other than a BPE model with identity
  // normalizer and byte fallback.
  static absl::StatusOr<SentencePieceModel> Parse(absl::string_view serialized);
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_TOKENIZER_SENTENCEPIECE_MODEL_H_

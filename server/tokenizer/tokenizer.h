// SentencePiece tokenizer of a model directory: BPE with the identity normalizer, as Llama's and
// Mistral's are. Anything else is refused by name when it is loaded.
#ifndef MMFREE_SERVER_TOKENIZER_TOKENIZER_H_
#define MMFREE_SERVER_TOKENIZER_TOKENIZER_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "server/tokenizer/utf8.h"

namespace mmfree {

// Thread-safe, immutable after Load.
class Tokenizer {
 public:
  // Reads DIRECTORY/tokenizer.model and tokenizer_config.json (optional). `vocab_size` is the
  // model's. Errors name the file: NOT_FOUND when tokenizer.model is missing, INVALID_ARGUMENT when
  // it is damaged, has more pieces than `vocab_size` or disagrees with tokenizer_config.json,
  // UNIMPLEMENTED for a kind of tokenizer this class does not encode exactly.
  static absl::StatusOr<std::shared_ptr<const Tokenizer>> Load(const std::string& directory,
                                                               int64_t vocab_size);
  virtual ~Tokenizer() = default;

  struct EncodeOptions {
    bool bos = true;  // put BOS first, where tokenizer_config.json has add_bos_token (its default)
    // Continue earlier text: no BOS and no dummy prefix space; the text is encoded exactly as
    // given.
    bool continuation = false;
  };
  // `text` is valid UTF-8, INVALID_ARGUMENT otherwise, and nothing in it is special: "<s>" is three
  // characters. Without `continuation` the text is normalized as the tokenizer was trained: where
  // its normalizer removes extra whitespace, spaces at both ends go and runs of spaces become one.
  virtual absl::StatusOr<std::vector<int32_t>> Encode(absl::string_view text,
                                                      const EncodeOptions& options) const = 0;

  // Text of a whole sequence: control tokens give nothing; the leading space that the dummy prefix
  // added is dropped when the sequence starts the text (first token is BOS or `starts_text`). Bytes
  // that do not form UTF-8 become U+FFFD. Ids out of range are INVALID_ARGUMENT.
  virtual absl::StatusOr<std::string> Decode(absl::Span<const int32_t> ids,
                                             bool starts_text = true) const = 0;

  // Raw bytes that a token adds to running text: U+2581 is a space, byte tokens are one byte,
  // control tokens are empty, and so is an id out of range (a model's vocabulary may be padded
  // beyond the tokenizer's). The view lives as long as the tokenizer.
  virtual absl::string_view TokenBytes(int32_t id) const = 0;
  // The piece as the vocabulary spells it, e.g. "\u2581the" or "<0x0A>". Empty out of range.
  virtual absl::string_view Piece(int32_t id) const = 0;

  virtual int32_t bos_id() const = 0;
  virtual int32_t eos_id() const = 0;
  virtual int32_t size() const = 0;

  // Whether Encode puts a space before the first word, which decoding then drops.
  virtual bool adds_dummy_prefix() const { return true; }
};

// What a token adds to a text that it starts: TokenBytes without the space of the dummy prefix.
absl::string_view BytesAtStart(const Tokenizer& tokenizer, int32_t id);

// Turns a stream of tokens into text that is always valid UTF-8: bytes of an unfinished character
// wait for the rest. The concatenation of everything returned equals Decode of all the ids,
// whatever the grouping. Ids out of range add nothing. Not thread-safe; cheap to make, one per
// stream.
class StreamDecoder {
 public:
  // `starts_text`: drop the first token's leading space (as Decode); false when the tokens continue
  // a prompt, whose last text is not ours. The tokenizer must outlive the decoder.
  StreamDecoder(const Tokenizer* tokenizer, bool starts_text);

  // Text that became complete with this token; may be empty.
  std::string Append(int32_t id);
  // What is left at the end: an unfinished character becomes U+FFFD.
  std::string Finish();

  // Whether bytes of an unfinished character wait.
  bool unfinished() const { return utf8_.unfinished(); }
  // Whether the next visible token loses the space of the dummy prefix.
  bool drops_leading_space() const { return drop_leading_space_; }

 private:
  const Tokenizer* tokenizer_;
  bool first_ = true;        // no token yet
  bool drop_leading_space_;  // the next visible token starts the text
  Utf8Decoder utf8_;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_TOKENIZER_TOKENIZER_H_

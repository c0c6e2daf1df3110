#include "absl/strings/match.h"
#include "absl/strings/strip.h"
#include "server/tokenizer/tokenizer.h"

namespace mmfree {

absl::string_view BytesAtStart(const Tokenizer& tokenizer, int32_t id) {
  absl::string_view bytes = tokenizer.TokenBytes(id);
  // Only a piece can carry the dummy prefix: a space that came as the byte token <0x20> is text.
  if (tokenizer.adds_dummy_prefix() && absl::StartsWith(tokenizer.Piece(id), "\u2581")) {
    absl::ConsumePrefix(&bytes, " ");
  }
  return bytes;
}

StreamDecoder::StreamDecoder(const Tokenizer* tokenizer, bool starts_text)
    : tokenizer_(tokenizer), drop_leading_space_(starts_text && tokenizer->adds_dummy_prefix()) {}

std::string StreamDecoder::Append(int32_t id) {
  if (first_ && id == tokenizer_->bos_id()) {
    drop_leading_space_ = tokenizer_->adds_dummy_prefix();
  }
  first_ = false;

  absl::string_view bytes = tokenizer_->TokenBytes(id);
  if (drop_leading_space_ && !bytes.empty()) {
    drop_leading_space_ = false;
    bytes = BytesAtStart(*tokenizer_, id);
  }
  std::string text;
  utf8_.Append(bytes, &text);
  return text;
}

std::string StreamDecoder::Finish() {
  std::string text;
  utf8_.Finish(&text);
  return text;
}

}  // namespace mmfree

// Validation and repair of UTF-8, whole or in pieces.
#ifndef MMFREE_SERVER_TOKENIZER_UTF8_H_
#define MMFREE_SERVER_TOKENIZER_UTF8_H_

#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/strings/string_view.h"

namespace mmfree {

// Well-formed UTF-8 as Unicode defines it (table 3-7): no overlong forms, no surrogates, nothing
// above U+10FFFF. Returns the offset of the first ill-formed byte sequence, `text.size()` if none.
size_t FindInvalidUtf8(absl::string_view text);

// Turns a stream of bytes into well-formed UTF-8. Bytes of an unfinished character wait for the
// rest; each maximal subpart of an ill-formed sequence becomes one U+FFFD (Unicode 15, section 3.9,
// the practice of the WHATWG decoder), so the result does not depend on how the bytes are grouped.
class Utf8Decoder {
 public:
  // Appends to `out` what is complete with these bytes.
  void Append(absl::string_view bytes, std::string* out);

  // Appends U+FFFD for an unfinished character, if there is one. The decoder is then as new.
  void Finish(std::string* out);

  // Whether bytes of an unfinished character wait.
  bool unfinished() const { return pending_size_ > 0; }

 private:
  char pending_[3];           // first bytes of an unfinished character
  uint8_t pending_size_ = 0;  // how many
  uint8_t needed_ = 0;        // bytes that the unfinished character still lacks
  uint8_t next_low_ = 0x80;   // range of its next byte
  uint8_t next_high_ = 0xBF;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_TOKENIZER_UTF8_H_

// Reading the characters of a pattern or a grammar.
#ifndef MMFREE_SERVER_SAMPLING_TEXT_READER_H_
#define MMFREE_SERVER_SAMPLING_TEXT_READER_H_

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace mmfree {

// A place in a text, which is valid UTF-8.
class TextReader {
 public:
  explicit TextReader(absl::string_view text) : text_(text) {}

  bool done() const { return at_ == text_.size(); }
  size_t at() const { return at_; }
  void Rewind(size_t at) { at_ = at; }
  // The next byte; 0 at the end.
  char Peek() const { return done() ? '\0' : text_[at_]; }
  bool Consume(absl::string_view expected) {
    if (!absl::StartsWith(text_.substr(at_), expected)) return false;
    at_ += expected.size();
    return true;
  }

  // The next code point. Not at the end.
  uint32_t TakeCharacter() {
    const auto lead = static_cast<unsigned char>(text_[at_]);
    const size_t size = lead < 0x80 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
    uint32_t c = size == 1 ? lead : lead & (0x7fu >> size);
    for (size_t i = 1; i < size && at_ + i < text_.size(); ++i) {
      c = (c << 6) | (static_cast<unsigned char>(text_[at_ + i]) & 0x3f);
    }
    at_ = at_ + size < text_.size() ? at_ + size : text_.size();
    return c;
  }

  // So many hexadecimal digits.
  absl::StatusOr<uint32_t> TakeHex(int digits) {
    uint32_t value = 0;
    for (int i = 0; i < digits; ++i, ++at_) {
      const char c = Peek();
      const int digit = c >= '0' && c <= '9'   ? c - '0'
                        : c >= 'a' && c <= 'f' ? c - 'a' + 10
                        : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                               : -1;
      if (digit < 0) return Error(absl::StrCat("expected ", digits, " hexadecimal digits"));
      value = value * 16 + static_cast<uint32_t>(digit);
    }
    return value;
  }

  // A decimal number up to `max`; -1 when there is none.
  absl::StatusOr<int64_t> TakeNumber(int64_t max) {
    if (Peek() < '0' || Peek() > '9') return -1;
    int64_t value = 0;
    for (; Peek() >= '0' && Peek() <= '9'; ++at_) {
      value = value * 10 + (Peek() - '0');
      if (value > max) return Error(absl::StrCat("a count is more than ", max));
    }
    return value;
  }

  absl::Status Error(absl::string_view what) const {
    return absl::InvalidArgumentError(absl::StrCat("at byte ", at_, ": ", what));
  }
  absl::Status Unsupported(absl::string_view what) const {
    return absl::UnimplementedError(absl::StrCat("at byte ", at_, ": ", what, " not supported"));
  }

 private:
  const absl::string_view text_;
  size_t at_ = 0;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_SAMPLING_TEXT_READER_H_

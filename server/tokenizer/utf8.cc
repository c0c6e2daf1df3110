#include "server/tokenizer/utf8.h"

namespace mmfree {
namespace {

constexpr absl::string_view kReplacement = "\xEF\xBF\xBD";  // U+FFFD

// What the first byte of a character says about the rest.
struct Lead {
  uint8_t needed;  // bytes that follow; 0 with `valid` is ASCII
  uint8_t low;     // range of the byte right after it; later ones are 80..BF
  uint8_t high;
  bool valid;
};

constexpr Lead Classify(uint8_t byte) {
  if (byte <= 0x7F) return {0, 0, 0, true};
  if (byte >= 0xC2 && byte <= 0xDF) return {1, 0x80, 0xBF, true};
  if (byte == 0xE0) return {2, 0xA0, 0xBF, true};  // below: overlong
  if (byte == 0xED) return {2, 0x80, 0x9F, true};  // above: surrogates
  if (byte >= 0xE1 && byte <= 0xEF) return {2, 0x80, 0xBF, true};
  if (byte == 0xF0) return {3, 0x90, 0xBF, true};  // below: overlong
  if (byte == 0xF4) return {3, 0x80, 0x8F, true};  // above: U+10FFFF
  if (byte >= 0xF1 && byte <= 0xF3) return {3, 0x80, 0xBF, true};
  return {0, 0, 0, false};
}

}  // namespace

size_t FindInvalidUtf8(absl::string_view text) {
  size_t i = 0;
  while (i < text.size()) {
    const Lead lead = Classify(static_cast<uint8_t>(text[i]));
    if (!lead.valid || text.size() - i <= lead.needed) return i;
    uint8_t low = lead.low;
    uint8_t high = lead.high;
    for (size_t k = 1; k <= lead.needed; ++k) {
      const uint8_t byte = static_cast<uint8_t>(text[i + k]);
      if (byte < low || byte > high) return i;
      low = 0x80;
      high = 0xBF;
    }
    i += 1 + lead.needed;
  }
  return text.size();
}

void Utf8Decoder::Append(absl::string_view bytes, std::string* out) {
  for (const char c : bytes) {
    const uint8_t byte = static_cast<uint8_t>(c);
    if (needed_ > 0) {
      if (byte >= next_low_ && byte <= next_high_) {
        next_low_ = 0x80;
        next_high_ = 0xBF;
        if (--needed_ > 0) {
          pending_[pending_size_++] = c;
        } else {
          out->append(pending_, pending_size_);
          out->push_back(c);
          pending_size_ = 0;
        }
        continue;
      }
      Finish(out);  // the byte cannot continue it and is looked at afresh
    }
    const Lead lead = Classify(byte);
    if (!lead.valid) {
      out->append(kReplacement.data(), kReplacement.size());
    } else if (lead.needed == 0) {
      out->push_back(c);
    } else {
      pending_[0] = c;
      pending_size_ = 1;
      needed_ = lead.needed;
      next_low_ = lead.low;
      next_high_ = lead.high;
    }
  }
}

void Utf8Decoder::Finish(std::string* out) {
  if (needed_ > 0) out->append(kReplacement.data(), kReplacement.size());
  pending_size_ = 0;
  needed_ = 0;
}

}  // namespace mmfree

#include "server/tokenizer/bpe_encoder.h"

#include <algorithm>

namespace mmfree {
namespace {

constexpr size_t kPartBytes = 4096;

bool IsContinuation(char c) { return (static_cast<uint8_t>(c) & 0xC0) == 0x80; }

// Bytes of the character at the front of valid UTF-8.
size_t CharacterSize(absl::string_view text) {
  size_t size = 1;
  while (size < text.size() && IsContinuation(text[size])) ++size;
  return size;
}

uint32_t TakeCodePoint(absl::string_view* text) {
  const size_t size = CharacterSize(*text);
  constexpr uint8_t kLeadMask[] = {0, 0x7F, 0x1F, 0x0F, 0x07};
  uint32_t code = static_cast<uint8_t>((*text)[0]) & kLeadMask[size];
  for (size_t i = 1; i < size; ++i) code = code << 6 | (static_cast<uint8_t>((*text)[i]) & 0x3F);
  text->remove_prefix(size);
  return code;
}

uint64_t Neighbours(uint32_t left, uint32_t right) { return uint64_t{left} << 32 | right; }

// A run of characters that is or may become one token; part of a doubly linked list.
struct Symbol {
  int32_t prev;  // index, -1 at the end
  int32_t next;
  int32_t begin;  // in bytes
  int32_t size;   // 0: merged into the symbol on its left
};

// Symbol `left` and the one after it make a piece of `size` bytes. Outdated once either has been
// merged otherwise; their sizes then no longer add up to `size`.
struct Merge {
  float score;
  int32_t left;
  int32_t size;

  bool operator<(const Merge& other) const {  // the greatest is done first
    return score != other.score ? score < other.score : left > other.left;
  }
};

}  // namespace

BpeEncoder::BpeEncoder(const SentencePieceModel& model) {
  for (size_t id = 0; id < model.pieces.size(); ++id) {
    const SentencePieceModel::Piece& piece = model.pieces[id];
    if (piece.type == SentencePieceModel::Type::kByte) {
      byte_ids_[piece.byte] = static_cast<int32_t>(id);
    }
    if (piece.type != SentencePieceModel::Type::kNormal) continue;
    pieces_.emplace(piece.text, ScoredPiece{static_cast<int32_t>(id), piece.score});
    absl::string_view rest = piece.text;
    uint32_t left = TakeCodePoint(&rest);
    while (!rest.empty()) {
      const uint32_t right = TakeCodePoint(&rest);
      neighbours_.insert(Neighbours(left, right));
      left = right;
    }
  }
}

void BpeEncoder::Encode(absl::string_view text, std::vector<int32_t>* ids) const {
  while (!text.empty()) {
    const size_t cut = NextCut(text, kPartBytes);
    EncodePart(text.substr(0, cut), ids);
    text.remove_prefix(cut);
  }
}

size_t BpeEncoder::NextCut(absl::string_view text, size_t from) const {
  if (from >= text.size()) return text.size();
  size_t start = from;
  while (start > 0 && IsContinuation(text[start])) --start;
  absl::string_view rest = text.substr(start);
  uint32_t left = TakeCodePoint(&rest);
  while (!rest.empty()) {
    const size_t cut = text.size() - rest.size();
    const uint32_t right = TakeCodePoint(&rest);
    if (!neighbours_.contains(Neighbours(left, right))) return cut;
    left = right;
  }
  return text.size();
}

void BpeEncoder::EncodePart(absl::string_view text, std::vector<int32_t>* ids) const {
  std::vector<Symbol> symbols;
  symbols.reserve(text.size());
  for (size_t begin = 0; begin < text.size();) {
    const int32_t index = static_cast<int32_t>(symbols.size());
    const size_t size = CharacterSize(text.substr(begin));
    symbols.push_back(
        {index - 1, index + 1, static_cast<int32_t>(begin), static_cast<int32_t>(size)});
    begin += size;
  }
  symbols.back().next = -1;

  const auto find = [&](const Symbol& symbol, int32_t size) {
    return pieces_.find(text.substr(static_cast<size_t>(symbol.begin), static_cast<size_t>(size)));
  };
  std::vector<Merge> merges;  // a heap
  merges.reserve(symbols.size());
  const auto consider = [&](int32_t left, int32_t right) {
    if (left < 0 || right < 0) return;
    const int32_t size =
        symbols[static_cast<size_t>(left)].size + symbols[static_cast<size_t>(right)].size;
    const auto piece = find(symbols[static_cast<size_t>(left)], size);
    if (piece == pieces_.end()) return;
    merges.push_back({piece->second.score, left, size});
    std::push_heap(merges.begin(), merges.end());
  };
  for (size_t i = 1; i < symbols.size(); ++i) {
    consider(static_cast<int32_t>(i) - 1, static_cast<int32_t>(i));
  }

  while (!merges.empty()) {
    std::pop_heap(merges.begin(), merges.end());
    const Merge merge = merges.back();
    merges.pop_back();
    Symbol& left = symbols[static_cast<size_t>(merge.left)];
    if (left.size == 0 || left.next < 0) continue;
    Symbol& right = symbols[static_cast<size_t>(left.next)];
    if (left.size + right.size != merge.size) continue;
    left.size = merge.size;
    right.size = 0;
    left.next = right.next;
    if (left.next >= 0) symbols[static_cast<size_t>(left.next)].prev = merge.left;
    consider(left.prev, merge.left);
    consider(merge.left, left.next);
  }

  for (int32_t i = 0; i >= 0; i = symbols[static_cast<size_t>(i)].next) {
    const Symbol& symbol = symbols[static_cast<size_t>(i)];
    const auto piece = find(symbol, symbol.size);
    if (piece != pieces_.end()) {
      ids->push_back(piece->second.id);
      continue;
    }
    for (const char byte :
         text.substr(static_cast<size_t>(symbol.begin), static_cast<size_t>(symbol.size))) {
      ids->push_back(byte_ids_[static_cast<uint8_t>(byte)]);
    }
  }
}

}  // namespace mmfree

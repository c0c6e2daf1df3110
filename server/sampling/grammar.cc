#include "server/sampling/grammar.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

namespace mmfree {
namespace {

constexpr uint32_t kFirstSurrogate = 0xd800;
constexpr uint32_t kLastSurrogate = 0xdfff;

// UTF-8 of a code point.
std::string Encode(uint32_t c) {
  const auto byte = [](uint32_t value) { return static_cast<char>(value); };
  if (c < 0x80) return {byte(c)};
  const char last = byte(0x80 | (c & 0x3f));
  if (c < 0x800) return {byte(0xc0 | (c >> 6)), last};
  const char middle = byte(0x80 | ((c >> 6) & 0x3f));
  if (c < 0x10000) return {byte(0xe0 | (c >> 12)), middle, last};
  return {byte(0xf0 | (c >> 18)), byte(0x80 | ((c >> 12) & 0x3f)), middle, last};
}

// Calls f(first, last), UTF-8 of equal length, for parts of [low, high] that together are all of
// it, such that each byte between those of first and last, at every place, gives a character of the
// part.
template <typename F>
void SplitByEncoding(uint32_t low, uint32_t high, F f) {
  if (low > high) return;
  if (low < kFirstSurrogate && high >= kFirstSurrogate) {
    SplitByEncoding(low, kFirstSurrogate - 1, f);
    SplitByEncoding(kLastSurrogate + 1, high, f);
    return;
  }
  if (low >= kFirstSurrogate && low <= kLastSurrogate) {
    SplitByEncoding(kLastSurrogate + 1, high, f);
    return;
  }
  for (const uint32_t last_of_length : {0x7fu, 0x7ffu, 0xffffu}) {
    if (low <= last_of_length && high > last_of_length) {
      SplitByEncoding(low, last_of_length, f);
      SplitByEncoding(last_of_length + 1, high, f);
      return;
    }
  }
  for (int bits = 6; bits <= 18 && high > 0x7f; bits += 6) {
    const uint32_t mask = (1u << bits) - 1;
    if ((low & ~mask) == (high & ~mask)) continue;
    const uint32_t split = (low & mask) != 0       ? (low | mask)
                           : (high & mask) != mask ? (high & ~mask) - 1
                                                   : high;
    if (split == high) continue;
    SplitByEncoding(low, split, f);
    SplitByEncoding(split + 1, high, f);
    return;
  }
  f(Encode(low), Encode(high));
}

ByteSet ByteRange(unsigned char low, unsigned char high) {
  ByteSet set;
  for (int byte = low; byte <= high; ++byte) set.set(static_cast<size_t>(byte));
  return set;
}

}  // namespace

CodePoints Normalized(CodePoints points) {
  std::sort(points.begin(), points.end());
  CodePoints merged;
  for (const auto& [low, high] : points) {
    if (low > high) continue;
    if (!merged.empty() && low <= merged.back().second + 1) {
      merged.back().second = std::max(merged.back().second, high);
    } else {
      merged.emplace_back(low, high);
    }
  }
  return merged;
}

CodePoints Complement(const CodePoints& points) {
  CodePoints rest;
  uint32_t next = 0;
  for (const auto& [low, high] : Normalized(points)) {
    if (low > next) rest.emplace_back(next, low - 1);
    next = high + 1;
  }
  if (next <= kLastCodePoint) rest.emplace_back(next, kLastCodePoint);
  return rest;
}

CodePoints Intersection(const CodePoints& a, const CodePoints& b) {
  CodePoints either = Complement(a);
  const CodePoints not_b = Complement(b);
  either.insert(either.end(), not_b.begin(), not_b.end());
  return Complement(either);
}

void Grammar::AddAlternative(Rule rule, Sequence sequence) {
  symbols_ += sequence.size() + 1;
  if (too_large()) return;  // Finish refuses it
  rules_[rule].push_back(std::move(sequence));
}

Grammar::Symbol Grammar::Set(const ByteSet& bytes) {
  const auto found = std::find(sets_.begin(), sets_.end(), bytes);
  const auto index = static_cast<int32_t>(found - sets_.begin());
  if (found == sets_.end()) sets_.push_back(bytes);
  return ~index;
}

Grammar::Sequence Grammar::Bytes(absl::string_view literal) {
  Sequence sequence;
  for (const char c : literal) {
    const auto byte = static_cast<unsigned char>(c);
    sequence.push_back(Set(ByteRange(byte, byte)));
  }
  return sequence;
}

Grammar::Sequence Grammar::Character(const CodePoints& points) {
  ByteSet ascii;
  std::vector<Sequence> alternatives;
  for (const auto& [low, high] : Normalized(points)) {
    SplitByEncoding(low, high, [&](const std::string& first, const std::string& last) {
      if (first.size() == 1) {
        ascii |=
            ByteRange(static_cast<unsigned char>(first[0]), static_cast<unsigned char>(last[0]));
        return;
      }
      Sequence sequence;
      for (size_t i = 0; i < first.size(); ++i) {
        sequence.push_back(Set(
            ByteRange(static_cast<unsigned char>(first[i]), static_cast<unsigned char>(last[i]))));
      }
      alternatives.push_back(std::move(sequence));
    });
  }
  if (ascii.any()) alternatives.push_back({Set(ascii)});
  return OneOf(std::move(alternatives));
}

Grammar::Sequence Grammar::OneOf(std::vector<Sequence> alternatives) {
  if (alternatives.size() == 1) return std::move(alternatives[0]);
  const Rule rule = AddRule();
  for (Sequence& alternative : alternatives) AddAlternative(rule, std::move(alternative));
  return {rule};
}

Grammar::Sequence Grammar::Repeat(const Sequence& item, int64_t min, int64_t max) {
  Sequence once = item;
  if (item.size() > 1) {
    once = {AddRule()};
    AddAlternative(once[0], item);
  }
  Sequence sequence;
  for (int64_t i = 0; i < min && !too_large(); ++i) {
    sequence.insert(sequence.end(), once.begin(), once.end());
    ++symbols_;  // counted here, too, so that a huge count stops at once
  }
  if (once.empty()) return sequence;
  if (max < 0) {
    const Rule star = AddRule();
    AddAlternative(star, {});
    AddAlternative(star, {once[0], star});
    sequence.push_back(star);
    return sequence;
  }
  // more[k]: up to k times; each refers to the one before.
  Rule more = -1;
  for (int64_t i = min; i < max && !too_large(); ++i) {
    const Rule rule = AddRule();
    AddAlternative(rule, {});
    AddAlternative(rule, more < 0 ? Sequence{once[0]} : Sequence{once[0], more});
    more = rule;
  }
  if (more >= 0) sequence.push_back(more);
  return sequence;
}

// Drops alternatives that need a rule without any sentence.
void Grammar::DropUnproductive() {
  std::vector<char> productive(rules_.size(), 0);
  const auto ends = [&](const Sequence& sequence) {
    return std::all_of(sequence.begin(), sequence.end(), [&](Symbol symbol) {
      return symbol < 0 ? sets_[~symbol].any() : productive[symbol] != 0;
    });
  };
  // Later rules are mostly parts of earlier ones, so few rounds do.
  for (bool changed = true; changed;) {
    changed = false;
    for (size_t rule = rules_.size(); rule-- > 0;) {
      if (productive[rule] != 0) continue;
      if (std::any_of(rules_[rule].begin(), rules_[rule].end(), ends)) {
        productive[rule] = 1;
        changed = true;
      }
    }
  }
  for (std::vector<Sequence>& alternatives : rules_) {
    alternatives.erase(std::remove_if(alternatives.begin(), alternatives.end(),
                                      [&](const Sequence& sequence) { return !ends(sequence); }),
                       alternatives.end());
  }
}

// Whether a rule can begin with itself and go on after that: its stack would grow without an end
// before the first byte. A rule that only becomes itself again, as in (a*)*, is harmless.
bool Grammar::LeftRecursive() const {
  const size_t count = rules_.size();
  std::vector<char> nullable(count, 0);
  for (bool changed = true; changed;) {
    changed = false;
    for (size_t rule = count; rule-- > 0;) {
      if (nullable[rule] != 0) continue;
      for (const Sequence& sequence : rules_[rule]) {
        if (std::all_of(sequence.begin(), sequence.end(),
                        [&](Symbol symbol) { return symbol >= 0 && nullable[symbol] != 0; })) {
          nullable[rule] = 1;
          changed = true;
        }
      }
    }
  }
  struct Edge {
    Rule to;
    bool more;  // something follows
  };
  std::vector<std::vector<Edge>> edges(count);
  for (size_t rule = 0; rule < count; ++rule) {
    for (const Sequence& sequence : rules_[rule]) {
      for (size_t i = 0; i < sequence.size() && sequence[i] >= 0; ++i) {
        edges[rule].push_back({sequence[i], i + 1 < sequence.size()});
        if (nullable[sequence[i]] == 0) break;
      }
    }
  }
  // Strongly connected components, by Tarjan's algorithm without recursion.
  std::vector<int32_t> order(count, -1), low(count, 0), component(count, -1);
  std::vector<Rule> open;
  int32_t next_order = 0, next_component = 0;
  struct Frame {
    Rule rule;
    size_t edge;
  };
  for (size_t start = 0; start < count; ++start) {
    if (order[start] >= 0) continue;
    std::vector<Frame> frames = {{static_cast<Rule>(start), 0}};
    while (!frames.empty()) {
      const Rule rule = frames.back().rule;
      if (frames.back().edge == 0) {
        order[rule] = low[rule] = next_order++;
        open.push_back(rule);
      }
      if (frames.back().edge < edges[rule].size()) {
        const Rule to = edges[rule][frames.back().edge++].to;
        if (order[to] < 0) {
          frames.push_back({to, 0});
        } else if (component[to] < 0) {
          low[rule] = std::min(low[rule], order[to]);
        }
        continue;
      }
      if (low[rule] == order[rule]) {
        Rule member;
        do {
          member = open.back();
          open.pop_back();
          component[member] = next_component;
        } while (member != rule);
        ++next_component;
      }
      frames.pop_back();
      if (!frames.empty()) {
        const Rule parent = frames.back().rule;
        low[parent] = std::min(low[parent], low[rule]);
      }
    }
  }
  for (size_t rule = 0; rule < count; ++rule) {
    for (const Edge& edge : edges[rule]) {
      if (edge.more && component[edge.to] == component[rule]) return true;
    }
  }
  return false;
}

absl::Status Grammar::Finish(Rule root) {
  root_ = root;
  if (too_large()) {
    return absl::InvalidArgumentError(
        absl::StrCat("is too large: more than ", kMaxSymbols, " symbols once it is expanded"));
  }
  DropUnproductive();
  if (rules_[root].empty()) return absl::InvalidArgumentError("nothing can ever match it");
  if (LeftRecursive()) {
    return absl::InvalidArgumentError(
        "is left-recursive: a rule begins with itself; put the recursion at the end");
  }
  return absl::OkStatus();
}

}  // namespace mmfree

// Any strings to stop at, over any text in any tokens, against a search for them in the whole text;
// and a token mask against a set.
#include <algorithm>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "server/rpc/output_text.h"
#include "server/sampling/token_mask.h"
#include "server/tokenizer/utf8.h"
#include "tests/fuzz/fuzz_target.h"
#include "tests/support/fake_model.h"

namespace mmfree {
namespace {

// Where the text ends: the earliest byte at which a string is complete, of those the longest.
struct Stop {
  size_t end = std::string::npos;
  std::string string;
};

Stop FindStop(const std::string& text, const std::vector<std::string>& strings) {
  Stop stop;
  for (const std::string& string : strings) {
    const size_t at = text.find(string);
    if (at == std::string::npos) continue;
    const size_t end = at + string.size();
    if (stop.end == std::string::npos || end < stop.end ||
        (end == stop.end && string.size() > stop.string.size())) {
      stop = {end, string};
    }
  }
  return stop;
}

void CheckOutput(const std::vector<std::string>& strings, const std::string& bytes, bool include) {
  const FakeTokenizer tokenizer;
  OutputText::Options options;
  options.include_stop = include;
  options.stop_strings = std::make_shared<const StopStrings>(strings);
  OutputText output(&tokenizer, true, options);
  OutputText plain(&tokenizer, true, OutputText::Options());
  std::string shown;
  std::string text;  // all that there is
  for (const char byte : bytes) {
    const int32_t token = 3 + static_cast<unsigned char>(byte);
    text += plain.Append(token);
    shown += output.Append(token);
    MMFREE_FUZZ_CHECK(FindInvalidUtf8(shown) == shown.size());
    const Stop stop = FindStop(text, strings);
    MMFREE_FUZZ_CHECK((output.matched() != nullptr) == (stop.end != std::string::npos));
    if (output.matched() != nullptr) {
      const size_t end = stop.end - (include ? 0 : stop.string.size());
      MMFREE_FUZZ_CHECK(*output.matched() == stop.string);
      MMFREE_FUZZ_CHECK(shown == text.substr(0, end));
    } else {
      // All but the longest end that a string begins with: no withheld byte leaks, and none is
      // held back longer than it must be.
      size_t held = text.size() - shown.size();
      MMFREE_FUZZ_CHECK(text.compare(0, shown.size(), shown) == 0);
      size_t longest = 0;
      for (const std::string& string : strings) {
        for (size_t size = std::min(string.size(), text.size()); size > longest; --size) {
          if (text.compare(text.size() - size, size, string, 0, size) == 0) longest = size;
        }
      }
      MMFREE_FUZZ_CHECK(held == longest);
    }
  }
  if (output.matched() == nullptr) {
    shown += output.Finish();
    text += plain.Finish();
    MMFREE_FUZZ_CHECK(shown == text);
  }
}

void CheckMask(FuzzInput* in) {
  const int64_t size = 1 + in->Word() % 300;
  const bool full = in->Byte() % 2 == 0;
  TokenMask mask(size, full);
  std::set<int32_t> expected;
  for (int32_t id = 0; full && id < size; ++id) expected.insert(id);
  TokenMask kept = mask;
  std::set<int32_t> expected_kept = expected;
  for (int i = 0; i < 40; ++i) {
    const uint8_t operation = in->Byte();
    const auto id = static_cast<int32_t>(in->Word() % static_cast<uint32_t>(size));
    if (operation % 4 == 0) {
      mask.Remove(id);
      expected.erase(id);
    } else if (operation % 4 == 1) {
      mask.Add(id);
      expected.insert(id);
    } else if (operation % 4 == 2) {
      kept = mask;
      expected_kept = expected;
    } else {
      mask.Intersect(kept);
      std::set<int32_t> both;
      std::set_intersection(expected.begin(), expected.end(), expected_kept.begin(),
                            expected_kept.end(), std::inserter(both, both.end()));
      expected = both;
    }
    MMFREE_FUZZ_CHECK(mask.Has(id) == (expected.count(id) > 0));
  }
  MMFREE_FUZZ_CHECK(mask.Count() == static_cast<int64_t>(expected.size()));
  MMFREE_FUZZ_CHECK(mask.First() == (expected.empty() ? -1 : *expected.begin()));
  int64_t missing = 0;
  mask.ForEachMissing([&](int32_t id) {
    MMFREE_FUZZ_CHECK(expected.count(id) == 0);
    ++missing;
  });
  MMFREE_FUZZ_CHECK(missing == size - mask.Count());
}

}  // namespace

std::vector<std::string> FuzzSeeds() {
  using std::string;
  return {string("\1\3\2aba\1b", 8) + "xxabababa",
          string("\2\1\3\n\n#\4END.\2\xc3\xa9\0", 15) + "a\n\n END.",
          string("\1\2\4abcd\3bce", 11) + "aabcabcde \xf0\x9f\x90\xba", string("\0\0\0\0\1\1", 6)};
}

}  // namespace mmfree

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* input, size_t size) {
  mmfree::FuzzInput in(input, size);
  const uint8_t options = in.Byte();
  if (options % 4 == 0) {
    mmfree::CheckMask(&in);
    return 0;
  }
  std::vector<std::string> strings;
  for (int count = 1 + in.Byte() % 6; count > 0; --count) {
    std::string string = in.Text(1 + in.Byte() % 8);
    // As a request holds them.
    if (!string.empty() && mmfree::FindInvalidUtf8(string) == string.size()) {
      strings.push_back(std::move(string));
    }
  }
  if (!strings.empty()) mmfree::CheckOutput(strings, in.Text(256), options % 2 == 0);
  return 0;
}

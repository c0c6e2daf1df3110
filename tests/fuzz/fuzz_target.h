// What a fuzz target is made of. The same file is linked with libFuzzer, and with a driver that
// runs some thousand fixed inputs as an ordinary test.
#ifndef MMFREE_TESTS_FUZZ_FUZZ_TARGET_H_
#define MMFREE_TESTS_FUZZ_FUZZ_TARGET_H_

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

// Any bytes: must return, soon. Aborts when a promise does not hold.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* input, size_t size);

namespace mmfree {

// Inputs that reach far, to start from.
std::vector<std::string> FuzzSeeds();

// The bytes of an input, taken one after the other; zeros after its end.
class FuzzInput {
 public:
  FuzzInput(const uint8_t* input, size_t size) : next_(input), end_(input + size) {}

  uint8_t Byte() { return next_ == end_ ? 0 : *next_++; }
  uint32_t Word() {
    uint32_t word = 0;
    for (int i = 0; i < 4; ++i) word = word << 8 | Byte();
    return word;
  }
  // Up to `size` bytes.
  std::string Text(size_t size) {
    std::string text;
    for (; size > 0 && next_ != end_; --size) text.push_back(static_cast<char>(Byte()));
    return text;
  }
  std::string Rest() { return Text(static_cast<size_t>(end_ - next_)); }

 private:
  const uint8_t* next_;
  const uint8_t* const end_;
};

}  // namespace mmfree

// Ends the process, which the fuzzer reports with the input.
#define MMFREE_FUZZ_CHECK(condition)                                                 \
  do {                                                                               \
    if (!(condition)) {                                                              \
      fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #condition); \
      abort();                                                                       \
    }                                                                                \
  } while (false)

#endif  // MMFREE_TESTS_FUZZ_FUZZ_TARGET_H_

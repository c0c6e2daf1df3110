// Runs a fuzz target on its seeds and on fixed mutations of them: an ordinary test, so that targets
// keep building and what they check holds. With --write_seeds=DIR it only writes the seeds, as a
// corpus for libFuzzer.
#include <algorithm>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "tests/fuzz/fuzz_target.h"

namespace {

constexpr int kMutations = 20000;

using Random = std::mt19937;

size_t Place(const std::string& text, Random* random) { return (*random)() % (text.size() + 1); }

// Bytes, parts and digits, as fuzzers change them.
std::string Mutated(std::string text, const std::vector<std::string>& seeds, Random* random) {
  for (uint32_t changes = 1 + (*random)() % 4; changes > 0; --changes) {
    const size_t at = Place(text, random);
    switch ((*random)() % 6) {
      case 0:
        if (at < text.size()) text[at] = static_cast<char>((*random)());
        break;
      case 1:
        text.insert(at, 1, static_cast<char>((*random)() % 128));
        break;
      case 2:
        text.erase(at, (*random)() % 8);
        break;
      case 3:
        text.insert(at, text.substr(Place(text, random), (*random)() % 32));
        break;
      case 4: {
        const std::string& other = seeds[(*random)() % seeds.size()];
        text.insert(at, other.substr(Place(other, random), (*random)() % 64));
        break;
      }
      case 5:
        text.resize(at);
        break;
    }
  }
  return text;
}

void Run(const std::string& input) {
  LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(input.data()), input.size());
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string> seeds = mmfree::FuzzSeeds();
  absl::string_view directory = argc > 1 ? argv[1] : "";
  if (absl::ConsumePrefix(&directory, "--write_seeds=")) {
    for (size_t i = 0; i < seeds.size(); ++i) {
      std::ofstream(absl::StrCat(directory, "/seed", i), std::ios::binary) << seeds[i];
    }
    return 0;
  }
  Run("");
  for (const std::string& seed : seeds) Run(seed);
  Random random(1);
  for (int i = 0; i < kMutations; ++i) {
    Run(Mutated(seeds[random() % seeds.size()], seeds, &random));
  }
  return 0;
}

// Model files for the tokenizer's tests.
#ifndef MMFREE_TESTS_UNIT_TOKENIZER_TEST_MODELS_H_
#define MMFREE_TESTS_UNIT_TOKENIZER_TEST_MODELS_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/strings/string_view.h"
#include "server/tokenizer/tokenizer.h"

namespace mmfree {

// The demo model's directory and size of vocabulary.
std::string TalesDirectory();
constexpr int64_t kTalesVocabulary = 4096;

// Contents of the demo model's tokenizer.model.
std::string TalesModel();

// Serialized fields of a sentencepiece.ModelProto: appended to TalesModel() they override or add.
std::string NormalizerOverride(bool add_dummy_prefix, bool remove_extra_whitespaces);
std::string ExtraPiece(absl::string_view text, float score, int type = 1);

// A new empty directory, removed with its contents at the end.
class TempDirectory {
 public:
  TempDirectory();
  ~TempDirectory();
  TempDirectory(const TempDirectory&) = delete;
  TempDirectory& operator=(const TempDirectory&) = delete;

  void Write(absl::string_view name, absl::string_view content) const;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

// Loads a tokenizer from a model in memory; the test fails if that fails.
std::shared_ptr<const Tokenizer> LoadFromMemory(absl::string_view model);

}  // namespace mmfree

#endif  // MMFREE_TESTS_UNIT_TOKENIZER_TEST_MODELS_H_

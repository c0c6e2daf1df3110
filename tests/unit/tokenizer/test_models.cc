#include "tests/unit/tokenizer/test_models.h"

#include <gtest/gtest.h>
#include <stdlib.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"

namespace mmfree {
namespace {

// A length-delimited field; both the number and the size fit one byte.
std::string Message(int field, absl::string_view content) {
  EXPECT_LT(content.size(), 128u);
  return absl::StrCat(std::string(1, static_cast<char>(field << 3 | 2)),
                      std::string(1, static_cast<char>(content.size())), content);
}

std::string Varint(int field, int value) {
  return {static_cast<char>(field << 3), static_cast<char>(value)};
}

}  // namespace

std::string TalesDirectory() { return absl::StrCat(MMFREE_SOURCE_DIR, "/deploy/models/tales"); }

std::string TalesModel() {
  std::ifstream file(TalesDirectory() + "/tokenizer.model", std::ios::binary);
  EXPECT_TRUE(file) << TalesDirectory();
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

std::string NormalizerOverride(bool add_dummy_prefix, bool remove_extra_whitespaces) {
  return Message(3, Varint(3, add_dummy_prefix) + Varint(4, remove_extra_whitespaces));
}

std::string ExtraPiece(absl::string_view text, float score, int type) {
  std::string bytes(sizeof(score), '\0');
  std::memcpy(bytes.data(), &score, sizeof(score));
  return Message(
      1, absl::StrCat(Message(1, text), std::string(1, 2 << 3 | 5), bytes, Varint(3, type)));
}

TempDirectory::TempDirectory() : path_(::testing::TempDir() + "/tokenizer_XXXXXX") {
  EXPECT_NE(mkdtemp(path_.data()), nullptr) << path_;
}

TempDirectory::~TempDirectory() { std::filesystem::remove_all(path_); }

void TempDirectory::Write(absl::string_view name, absl::string_view content) const {
  std::ofstream file(absl::StrCat(path_, "/", name), std::ios::binary);
  file.write(content.data(), static_cast<std::streamsize>(content.size()));
  EXPECT_TRUE(file.flush());
}

std::shared_ptr<const Tokenizer> LoadFromMemory(absl::string_view model) {
  TempDirectory directory;
  directory.Write("tokenizer.model", model);
  auto tokenizer = Tokenizer::Load(directory.path(), 1 << 20);
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
  return tokenizer.ok() ? *tokenizer : nullptr;
}

}  // namespace mmfree

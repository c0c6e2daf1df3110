// The demo model in the repository, and what it was made from where that is at hand.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <memory>
#include <string>

#include "server/model/model.h"
#include "tests/support/status_is.h"
#include "tests/support/temp_directory.h"

namespace mmfree {
namespace {

constexpr char kDemo[] = MMFREE_SOURCE_DIR "/deploy/models/tales";

TEST(DemoModelTest, LoadsVerifiesAndHasTheDigestItsReadmeSays) {
  LoadOptions options;
  options.verify = true;
  const auto model = Model::Load(kDemo, options);
  ASSERT_THAT(model, IsOk());
  EXPECT_TRUE((*model)->packed());
  EXPECT_EQ((*model)->config(), *ConfigForShape("tales"));
  EXPECT_EQ((*model)->embedding().dtype, DType::kF16);
  EXPECT_THAT(ReadFile(std::string(kDemo) + "/README.md"), testing::HasSubstr((*model)->digest()));
}

TEST(DemoModelTest, ThePublishedCheckpointHasTheSameDigest) {
  const char* const published = std::getenv("MMFREE_PUBLISHED_TALES");
  if (published == nullptr) {
    GTEST_SKIP() << "MMFREE_PUBLISHED_TALES does not name the published checkpoint";
  }
  const auto from = Model::Load(published);
  const auto packed = Model::Load(kDemo);
  ASSERT_THAT(from, IsOk());
  ASSERT_THAT(packed, IsOk());
  EXPECT_FALSE((*from)->packed());
  EXPECT_EQ((*from)->digest(), (*packed)->digest());
}

}  // namespace
}  // namespace mmfree

#include "server/tools/progress.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <sstream>

namespace mmfree {
namespace {

using testing::EndsWith;
using testing::HasSubstr;
using testing::Not;

TEST(ProgressTest, WritesALineForEachTenthWithoutATerminal) {
  std::ostringstream out;
  Progress progress(&out, /*terminal=*/false, "packing");
  for (int64_t done = 0; done <= 1000000; done += 1000) progress.Update(done, 1000000);
  progress.Update(1000000, 1000000);
  const std::string text = out.str();
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 11);
  EXPECT_THAT(text, HasSubstr("packing:  50 %  (0.5 of 1.0 MB)\n"));
  EXPECT_THAT(text, EndsWith("packing: 100 %  (1.0 of 1.0 MB)\n"));
  EXPECT_THAT(text, Not(HasSubstr("\r")));
}

TEST(ProgressTest, RedrawsOneLineOnATerminalAndEndsIt) {
  std::ostringstream out;
  Progress progress(&out, /*terminal=*/true, "packing");
  for (int64_t done = 0; done <= 1000; ++done) progress.Update(done, 1000);
  const std::string text = out.str();
  EXPECT_EQ(std::count(text.begin(), text.end(), '\r'), 101);
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 1);
  EXPECT_THAT(text, HasSubstr("[####################                    ]  50 %"));
  EXPECT_THAT(text, EndsWith("\n"));
}

TEST(ProgressTest, NothingToDoIsDone) {
  std::ostringstream out;
  Progress(&out, /*terminal=*/false, "packing").Update(0, 0);
  EXPECT_THAT(out.str(), HasSubstr("100 %"));
}

}  // namespace
}  // namespace mmfree

#include "server/base/flag_set.h"

#include <optional>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/status_is.h"

namespace mmfree {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Pair;

class FlagSetTest : public testing::Test {
 protected:
  FlagSetTest() {
    flags_.Add("text", &text_, "TEXT", "a text");
    flags_.Add("switch", &switch_, "", "a switch");
    flags_.Add("list", &list_, "TEXT", "repeat");
    flags_.Add("ids", &ids_, "IDS", "ids");
    flags_.Add("maybe", &maybe_, "X", "a number");
    flags_.Add("time", &time_, "TIME", "a time");
    flags_.AddInteger("count", &count_, -2, 5, "N", "a count");
    flags_.AddSetter<std::vector<std::pair<int32_t, float>>>("pairs", "PAIRS", "pairs",
                                                             [this](const auto& v) { pairs_ = v; });
    flags_.AddChoice<int>("choice", {{"one", 1}, {"two", 2}}, "WORD", "a word",
                          [this](int v) { choice_ = v; });
  }

  FlagSet flags_;
  std::string text_ = "default";
  bool switch_ = false;
  std::vector<std::string> list_;
  std::vector<int32_t> ids_;
  std::optional<float> maybe_;
  absl::Duration time_;
  int32_t count_ = 0;
  std::vector<std::pair<int32_t, float>> pairs_;
  int choice_ = 0;
};

TEST_F(FlagSetTest, ReadsEveryFormAndKind) {
  const auto rest = flags_.Parse(
      {"--text=a=b", "first", "--switch", "--list", "x", "--list=", "--ids=1,-2,3", "--maybe=0",
       "--time=1.5s", "--count=-2", "--pairs=5:1.5,7:-2", "--choice=two", "--", "--text=rest"});
  ASSERT_THAT(rest, IsOk());
  EXPECT_THAT(*rest, ElementsAre("first", "--text=rest"));
  EXPECT_EQ(text_, "a=b");
  EXPECT_TRUE(switch_);
  EXPECT_THAT(list_, ElementsAre("x", ""));
  EXPECT_THAT(ids_, ElementsAre(1, -2, 3));
  EXPECT_EQ(maybe_, 0.0f);
  EXPECT_EQ(time_, absl::Milliseconds(1500));
  EXPECT_EQ(count_, -2);
  EXPECT_THAT(pairs_, ElementsAre(Pair(5, 1.5f), Pair(7, -2.0f)));
  EXPECT_EQ(choice_, 2);
}

TEST_F(FlagSetTest, UnsetStaysUnset) {
  ASSERT_THAT(flags_.Parse({}), IsOk());
  EXPECT_EQ(text_, "default");
  EXPECT_FALSE(maybe_.has_value());
}

TEST_F(FlagSetTest, SwitchCanBeTurnedOff) {
  ASSERT_THAT(flags_.Parse({"--switch", "--switch=false"}), IsOk());
  EXPECT_FALSE(switch_);
}

TEST_F(FlagSetTest, StopsAtTheFirstWordWhenAsked) {
  const auto rest = flags_.Parse({"--switch", "command", "--unknown"}, /*stop_at_first=*/true);
  ASSERT_THAT(rest, IsOk());
  EXPECT_THAT(*rest, ElementsAre("command", "--unknown"));
}

TEST_F(FlagSetTest, MistakesNameTheFlagAndWhatIsExpected) {
  const struct {
    const char* argument;
    const char* message;
  } kCases[] = {
      {"--txt=x", "did you mean --text?"},
      {"--something_else", "unknown flag --something_else"},
      {"--count=6", "--count=6: expected a whole number from -2 to 5"},
      {"--count=1.5", "whole number"},
      {"--count", "--count needs a value"},
      {"--maybe=x", "expected a number"},
      {"--ids=1,,2", "separated by commas"},
      {"--pairs=1", "KEY:NUMBER"},
      {"--switch=perhaps", "true or false"},
      {"--time=5", "such as 500ms"},
      {"--choice=three", "expected one of one two"},
      {"-x", "flags start with --"},
  };
  for (const auto& test : kCases) {
    EXPECT_THAT(flags_.Parse({test.argument}),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(test.message)))
        << test.argument;
  }
}

TEST_F(FlagSetTest, HelpIsNotedAndListsTheFlags) {
  ASSERT_THAT(flags_.Parse({"--help"}), IsOk());
  EXPECT_TRUE(flags_.help_requested());
  EXPECT_THAT(flags_.Help(), HasSubstr("  --text=TEXT                 a text\n"));
  EXPECT_THAT(flags_.Help(), HasSubstr("  --switch                    a switch\n"));
}

}  // namespace
}  // namespace mmfree

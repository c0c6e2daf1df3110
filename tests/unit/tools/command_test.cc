// The mmfree-pack command itself: its exit statuses and what it prints.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>

#include <cstdlib>
#include <string>

#include "absl/strings/str_cat.h"
#include "tests/support/temp_directory.h"
#include "tests/support/tiny_checkpoint.h"

namespace mmfree {
namespace {

using testing::HasSubstr;

constexpr char kCommand[] = MMFREE_BINARY_DIR "/bin/mmfree-pack";

struct Result {
  int status = -1;
  std::string out;
  std::string err;
};

class CommandTest : public testing::Test {
 protected:
  void SetUp() override { TinyCheckpoint(TinyCheckpoint::OddConfig()).Write(in_, "F16"); }

  Result Run(const std::string& arguments) const {
    const std::string line = absl::StrCat(kCommand, " ", arguments, " >", work_.File("stdout"),
                                          " 2>", work_.File("stderr"), " </dev/null");
    const int status = std::system(line.c_str());
    return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, ReadFile(work_.File("stdout")),
            ReadFile(work_.File("stderr"))};
  }

  const TempDirectory in_;
  const TempDirectory work_;
};

TEST_F(CommandTest, PacksAndVerifies) {
  const std::string out = work_.File("out");
  const Result packed = Run(in_.path() + " " + out);
  EXPECT_EQ(packed.status, 0) << packed.err;
  EXPECT_THAT(packed.out, HasSubstr("digest      "));
  EXPECT_THAT(packed.err, HasSubstr("packing: 100 %"));
  const Result verified = Run("--verify " + out);
  EXPECT_EQ(verified.status, 0) << verified.err;
  EXPECT_EQ(verified.out.substr(0, 76), packed.out.substr(0, 76)) << "the same digest";
}

TEST_F(CommandTest, HelpExplainsAndSucceeds) {
  for (const char* const flag : {"--help", "-h"}) {
    const Result help = Run(flag);
    EXPECT_EQ(help.status, 0);
    for (const char* const word :
         {"IN_DIR OUT_DIR", "--verify", "--force", "--threads", "Exit status"}) {
      EXPECT_THAT(help.out, HasSubstr(word));
    }
  }
}

TEST_F(CommandTest, AWrongCommandLineIsStatus1) {
  for (const std::string& arguments :
       {std::string(), in_.path(), std::string("a b c"), std::string("--verify"),
        std::string("--verify a b"), std::string("--threads=-1 a b"),
        std::string("--no_such a b")}) {
    const Result result = Run(arguments);
    EXPECT_EQ(result.status, 1) << arguments;
    EXPECT_FALSE(result.err.empty());
  }
}

TEST_F(CommandTest, AWrongInputIsStatus2) {
  const Result absent = Run(work_.File("absent") + " " + work_.File("out"));
  EXPECT_EQ(absent.status, 2);
  EXPECT_THAT(absent.err, HasSubstr("mmfree-pack: " + work_.File("absent") + ": no such model"));
  WriteFile(in_.File("model.safetensors"), "short");
  const Result damaged = Run(in_.path() + " " + work_.File("out"));
  EXPECT_EQ(damaged.status, 2);
  EXPECT_THAT(damaged.err, HasSubstr("model.safetensors: truncated"));
}

TEST_F(CommandTest, AnOutputThatIsSomethingElseIsStatus3) {
  const Result occupied = Run(in_.path() + " " + work_.path());
  EXPECT_EQ(occupied.status, 3);
  EXPECT_THAT(occupied.err, HasSubstr("--force"));
  const Result forced = Run("--force " + in_.path() + " " + work_.path());
  EXPECT_EQ(forced.status, 0) << forced.err;
}

}  // namespace
}  // namespace mmfree

#include "server/server_flags.h"

#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/status_is.h"

namespace mmfree {
namespace {

using ::testing::HasSubstr;

using Arguments = std::vector<std::string>;

TEST(ServerFlags, ModelsAreNamedAfterTheirDirectoryUnlessNamed) {
  const absl::StatusOr<ServerFlags> flags =
      ParseServerFlags({"--model=deploy/models/tales/", "--model", "big=/m/2.7b", "--model=x"});
  ASSERT_THAT(flags, IsOk());
  ASSERT_EQ(flags->models.size(), 3u);
  EXPECT_EQ(flags->models[0].name, "tales");
  EXPECT_EQ(flags->models[0].directory, "deploy/models/tales/");
  EXPECT_EQ(flags->models[1].name, "big");
  EXPECT_EQ(flags->models[1].directory, "/m/2.7b");
  EXPECT_EQ(flags->models[2].name, "x");
}

TEST(ServerFlags, MistakesSayWhatToDo) {
  const struct {
    Arguments arguments;
    const char* message;
  } kCases[] = {
      {{}, "no model: give at least one"},
      {{"--model="}, "expected DIR or NAME=DIR"},
      {{"--model==x"}, "expected DIR or NAME=DIR"},
      {{"deploy/models/tales"}, "--model=DIR"},
      {{"--model=x", "--backend=gpu"}, "expected one of auto, cpu, cuda"},
      {{"--model=x", "--cpu_isa=sse"},
       "expected one of auto, scalar, avx2, avx_vnni, avx512, avx512_gfni, amx"},
      {{"--model=x", "--threads=-1"}, "from 0 to"},
      {{"--model=x", "--max_sessions=0"}, "from 1 to"},
      {{"--model=x", "--drain_timeout=30"}, "such as 500ms"},
      {{"--model=x", "--drain_timeout=-1s"}, "must not be negative"},
      {{"--model=x", "--tls_cert=a"}, "both --tls_cert and --tls_key"},
      {{"--model=x", "--tls_client_ca=a"}, "needs --tls_cert"},
      {{"--model=x", "--max_new_tokens=10"}, "--default_max_new_tokens=256 is more"},
      {{"--model=x", "--listen=foo"}, "--listen: \"foo\" is not an address"},
      {{"--model=x", "--listen=127.0.0.1:65536"}, "--listen: \"127.0.0.1:65536\""},
      {{"--model=x", "--metrics_listen=9090"}, "--metrics_listen: \"9090\""},
      {{"--model=a/x", "--model=b/x"}, "two models are named \"x\"; name them"},
      {{"--model=a b=x"}, "the name \"a b\" is not"},
      {{"--model=.../..é"}, "give one with --model=NAME=DIR"},
      {{"--model=x", "--max_que=1"}, "did you mean --max_queue?"},
  };
  for (const auto& test : kCases) {
    EXPECT_THAT(ParseServerFlags(test.arguments),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(test.message)));
  }
}

TEST(ServerFlags, DevicesAreAListOfDifferentNumbers) {
  EXPECT_EQ(ParseServerFlags({"--model=x"})->devices, (std::vector<int32_t>{0}));
  EXPECT_EQ(ParseServerFlags({"--model=x", "--devices=3,0"})->devices,
            (std::vector<int32_t>{3, 0}));
  for (const char* wrong : {"--devices=", "--devices=a", "--devices=0,", "--devices=0,0",
                            "--devices=-1", "--devices=4096"}) {
    EXPECT_THAT(ParseServerFlags({"--model=x", wrong}),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("such as --devices=0,1")));
  }
}

TEST(ServerFlags, TheDevicesRoomForSessionsIsInMiB) {
  EXPECT_EQ(ParseServerFlags({"--model=x"})->session_device_mb, 1024);
  EXPECT_EQ(ParseServerFlags({"--model=x", "--session_device_mb=0"})->session_device_mb, 0);
  EXPECT_EQ(ParseServerFlags({"--model=x", "--session_device_mb=70000"})->session_device_mb, 70000);
  for (const char* wrong : {"--session_device_mb=-1", "--session_device_mb=1048577"}) {
    EXPECT_THAT(ParseServerFlags({"--model=x", wrong}),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("from 0 to 1048576")));
  }
}

TEST(ServerFlags, FlagsOfLaterVersionsAreRefusedAndNotIgnored) {
  EXPECT_THAT(ParseServerFlags({"--model=x", "--auth_tokens_file=f"}),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("--auth_tokens_file")));
}

TEST(ServerFlags, HelpNeedsNoModelAndNamesEveryFlag) {
  ASSERT_THAT(ParseServerFlags({"--help"}), IsOk());
  EXPECT_TRUE(ParseServerFlags({"--help"})->help);
  for (const char* flag :
       {"--model=", "--listen=", "--port_file=", "--drain_timeout=", "--prefix_cache_mb="}) {
    EXPECT_THAT(ServerHelp(), HasSubstr(flag));
  }
}

}  // namespace
}  // namespace mmfree

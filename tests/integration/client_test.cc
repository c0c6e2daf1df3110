// The `mmfree` command against a real server: what it prints and how it exits.
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "tests/integration/live_server.h"
#include "tests/support/status_is.h"
#include "tests/support/temp_directory.h"

namespace mmfree {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

using Json = nlohmann::json;

class ClientTest : public LiveServer {
 protected:
  ProgramResult Run(const std::vector<std::string>& arguments) {
    absl::StatusOr<ProgramResult> result = server_->Client(arguments);
    EXPECT_THAT(result, IsOk());
    return result.ok() ? *std::move(result) : ProgramResult();
  }
  Json RunJson(const std::vector<std::string>& arguments) {
    const ProgramResult result = Run(arguments);
    EXPECT_EQ(result.exit_code, 0) << result.err;
    EXPECT_THAT(result.err, IsEmpty());
    return Json::parse(result.out, nullptr, /*allow_exceptions=*/false);
  }
};

TEST_F(ClientTest, GeneratePrintsExactlyTheText) {
  StartServer();
  const Generation expected = Generate(GreedyRequest("Once upon a time", 20));
  const ProgramResult result =
      Run({"generate", "--prompt=Once upon a time", "--max_tokens=20", "--temperature=0"});
  EXPECT_EQ(result.exit_code, 0);
  EXPECT_EQ(result.out, expected.text);
  EXPECT_THAT(result.err, IsEmpty());

  const TempDirectory directory;
  WriteFile(directory.File("prompt"), "Once upon a time");
  const ProgramResult from_file =
      Run({"--timeout=1m", "generate", "--max_new_tokens", "20", "--temperature", "0", "--stats",
           "--prompt_file", directory.File("prompt")});
  EXPECT_EQ(from_file.out, expected.text);
  EXPECT_THAT(from_file.err, HasSubstr("20 tokens"));
}

TEST_F(ClientTest, CandidatesArePrintedWholeOneAfterTheOther) {
  StartServer();
  const std::vector<std::string> arguments = {"generate", "--prompt=Once upon a time",
                                              "--max_tokens=20", "--seed=4", "--candidates=3"};
  const ProgramResult result = Run(arguments);
  EXPECT_EQ(result.exit_code, 0) << result.err;
  v1::GenerateRequest request = GreedyRequest("Once upon a time", 20);
  request.mutable_sampling()->clear_temperature();
  request.mutable_sampling()->set_seed(4);
  request.set_candidates(3);
  std::vector<std::string> texts(3);
  for (const v1::GenerateResponse& event : Generate(request).events) {
    texts.at(event.delta().candidate()) += event.delta().text();
  }
  EXPECT_EQ(result.out, absl::StrCat("[candidate 0]\n", texts[0], "\n[candidate 1]\n", texts[1],
                                     "\n[candidate 2]\n", texts[2], "\n"));
}

TEST_F(ClientTest, OfBestOfTheBestIsPrinted) {
  StartServer();
  v1::GenerateRequest request = GreedyRequest("Once upon a time", 20);
  request.mutable_sampling()->clear_temperature();
  request.mutable_sampling()->set_seed(4);
  request.set_best_of(5);
  const Generation expected = Generate(request);
  std::vector<std::string> arguments = {"generate", "--prompt=Once upon a time", "--max_tokens=20",
                                        "--seed=4", "--best_of=5"};
  const ProgramResult plain = Run(arguments);
  EXPECT_EQ(plain.exit_code, 0) << plain.err;
  EXPECT_EQ(plain.out, expected.text);
  arguments.insert(arguments.begin(), "--json");
  const ProgramResult json = Run(arguments);
  const std::vector<std::string> lines = absl::StrSplit(json.out, '\n', absl::SkipEmpty());
  const Json finished = Json::parse(lines.back(), nullptr, false)["finished"];
  EXPECT_EQ(finished["usage"]["discarded_tokens"], expected.finished.usage().discarded_tokens());
  EXPECT_EQ(finished["cumulative_logprob"].get<float>(),
            static_cast<float>(expected.finished.cumulative_logprob()));
}

TEST_F(ClientTest, GenerateJsonIsAnEventALine) {
  StartServer();
  const ProgramResult result = Run({"--json", "generate", "--prompt=Once", "--max_tokens=6",
                                    "--seed=5", "--logprobs", "--request_id=mine", "--ignore_eos"});
  EXPECT_EQ(result.exit_code, 0) << result.err;
  std::string text;
  std::vector<int32_t> ids;
  std::vector<float> logprobs;
  const std::vector<std::string> lines = absl::StrSplit(result.out, '\n', absl::SkipEmpty());
  for (size_t i = 0; i < lines.size(); ++i) {
    const Json event = Json::parse(lines[i], nullptr, false);
    ASSERT_TRUE(event.is_object() && event.size() == 1) << lines[i];
    if (i == 0) {
      EXPECT_EQ(event["started"]["request_id"], "mine");
      EXPECT_EQ(event["started"]["seed"], 5);
      EXPECT_EQ(event["started"]["model"], "tales");
    } else if (i + 1 == lines.size()) {
      const Json& finished = event["finished"];
      EXPECT_EQ(finished["finish_reason"], "LENGTH");
      EXPECT_EQ(finished["usage"]["completion_tokens"], 6);
      EXPECT_GE(finished["timings"]["decode"], 0.0);
    } else {
      const Json& delta = event["delta"];
      text += delta["text"].get<std::string>();
      for (const Json& id : delta["token_ids"]) ids.push_back(id);
      for (const Json& entry : delta["logprobs"]) logprobs.push_back(entry["logprob"]);
    }
  }
  v1::GenerateRequest request = GreedyRequest("Once", 6);
  request.mutable_sampling()->clear_temperature();
  request.mutable_sampling()->set_seed(5);
  request.mutable_stopping()->set_ignore_eos(true);
  request.mutable_response()->set_logprobs(true);
  const Generation expected = Generate(request);
  EXPECT_EQ(text, expected.text);
  EXPECT_EQ(ids, expected.token_ids);
  std::vector<float> expected_logprobs;
  for (const v1::GenerateResponse& event : expected.events) {
    for (const auto& logprob : event.delta().logprobs()) {
      expected_logprobs.push_back(logprob.logprob());
    }
  }
  EXPECT_EQ(logprobs, expected_logprobs) << "floats must survive the JSON exactly";
}

TEST_F(ClientTest, ScoreJsonHasTheDocumentedShapeAndExactFloats) {
  StartServer();
  const Json json = RunJson({"score", "--text=The cat sat", "--json", "--last_logits"});
  v1::ScoreRequest request;
  request.add_inputs()->set_text("The cat sat");
  request.set_last_logits(true);
  grpc::ClientContext context;
  v1::ScoreResponse response;
  ASSERT_TRUE(inference_->Score(&context, request, &response).ok());
  const v1::ScoreResult& result = response.results(0);
  const auto floats = [](const auto& values) {
    return std::vector<float>(values.begin(), values.end());
  };
  EXPECT_EQ(json["token_ids"].size(), json["argmax"].size());
  EXPECT_EQ(json["token_ids"].size(), json["logprobs"].size() + 1);
  EXPECT_EQ(json["logprobs"].get<std::vector<float>>(), floats(result.logprobs()));
  EXPECT_EQ(json["last_logits"].get<std::vector<float>>(), floats(result.last_logits()));
  std::vector<std::string> ids;
  for (const Json& id : json["token_ids"]) ids.push_back(id.dump());
  const Json by_ids = RunJson({"score", "--token_ids=" + absl::StrJoin(ids, ","), "--json"});
  EXPECT_EQ(by_ids["logprobs"], json["logprobs"]);
  EXPECT_FALSE(by_ids.contains("last_logits"));
}

TEST_F(ClientTest, ScoreFileScoresEachLineAsATextOfItsOwn) {
  StartServer();
  const TempDirectory directory;
  std::string content;
  for (int i = 0; i < 70; ++i) {  // more than fit one call
    absl::StrAppend(&content, "The cat number ", i, i % 10 == 0 ? " sat.\r\n\n" : " ran.\n");
  }
  WriteFile(directory.File("texts"), content);
  const std::string flag = "--file=" + directory.File("texts");
  const ProgramResult json = Run({"score", flag, "--json"});
  EXPECT_EQ(json.exit_code, 0) << json.err;
  EXPECT_THAT(json.err, HasSubstr("perplexity"));
  const std::vector<std::string> lines = absl::StrSplit(json.out, '\n', absl::SkipEmpty());
  ASSERT_EQ(lines.size(), 70u);
  EXPECT_EQ(Json::parse(lines[0]), RunJson({"score", "--text=The cat number 0 sat.", "--json"}));
  EXPECT_EQ(Json::parse(lines[69]), RunJson({"score", "--text=The cat number 69 ran.", "--json"}));
  const ProgramResult table = Run({"score", flag});
  const std::vector<std::string> rows = absl::StrSplit(table.out, '\n', absl::SkipEmpty());
  ASSERT_EQ(rows.size(), 70u);
  EXPECT_THAT(rows[1], testing::StartsWith("3\t")) << "the number of its line";
}

// A server that admits three texts at a time, with nothing to spare: two of the three places are
// taken until the client has been refused.
TEST_F(ClientTest, ScoreFileFitsItselfToATinyServerAndWaitsForAFullOne) {
  StartServer({"--max_sessions=1", "--max_queue=2", kKeepsSlots});
  const TempDirectory directory;
  std::string content;
  for (int i = 0; i < 20; ++i) absl::StrAppend(&content, "The cat number ", i, " ran.\n");
  WriteFile(directory.File("texts"), content);
  const std::string flag = "--file=" + directory.File("texts");

  grpc::ClientContext contexts[3];
  std::vector<std::unique_ptr<grpc::ClientReader<v1::GenerateResponse>>> readers;
  for (grpc::ClientContext& context : contexts) {
    readers.push_back(inference_->Generate(&context, EndlessRequest()));
  }
  ASSERT_TRUE(AwaitLoad(
      [](const v1::GetLoadResponse& load) { return load.running() + load.queued() == 3; }));
  const ProgramResult impatient = Run({"score", flag, "--patience=0s"});
  EXPECT_NE(impatient.exit_code, 0);
  EXPECT_THAT(impatient.err, HasSubstr("RESOURCE_EXHAUSTED"));

  const char kRefused[] = "mmfree_rpcs_total{method=\"Score\",status=\"RESOURCE_EXHAUSTED\"}";
  const double refused = Metric(kRefused);
  ProgramResult patient;
  std::thread client([&] { patient = Run({"score", flag}); });
  while (Metric(kRefused) < refused + 1) absl::SleepFor(absl::Milliseconds(10));
  for (grpc::ClientContext& context : contexts) context.TryCancel();
  client.join();
  for (const auto& reader : readers) reader->Finish();
  EXPECT_EQ(patient.exit_code, 0) << patient.err;
  const std::vector<std::string> rows = absl::StrSplit(patient.out, '\n', absl::SkipEmpty());
  ASSERT_EQ(rows.size(), 20u);
  for (size_t i = 0; i < rows.size(); ++i) {
    EXPECT_THAT(rows[i], testing::StartsWith(absl::StrCat(i + 1, "\t")));
  }
}

TEST_F(ClientTest, TokenizeAndDetokenize) {
  StartServer();
  const Json json = RunJson({"tokenize", "--text=Once \U0001F600", "--json"});
  EXPECT_EQ(json["token_ids"][0], 1);
  EXPECT_EQ(json["token_ids"].size(), json["pieces"].size());
  EXPECT_EQ(json["pieces"][1], "\u2581Once");
  const Json without = RunJson({"tokenize", "--text=Once \U0001F600", "--json", "--bos=false"});
  EXPECT_EQ(without["token_ids"].size() + 1, json["token_ids"].size());
  const ProgramResult ids = Run({"tokenize", "--text=Once \U0001F600"});
  ASSERT_EQ(ids.exit_code, 0);
  const std::string list = ids.out.substr(0, ids.out.find('\n'));
  EXPECT_EQ(Run({"detokenize", "--token_ids=" + list}).out, "Once \U0001F600");
  EXPECT_EQ(RunJson({"detokenize", "--json", "--token_ids", list})["text"], "Once \U0001F600");
}

TEST_F(ClientTest, ModelsLoadAndHealth) {
  StartServer();
  const Json models = RunJson({"models", "list", "--json"});
  ASSERT_EQ(models["models"].size(), 1u);
  EXPECT_EQ(models["models"][0]["name"], "tales");
  EXPECT_EQ(models["models"][0]["state"], "READY");
  EXPECT_EQ(models["models"][0]["digest"].get<std::string>().size(), 64u);
  EXPECT_EQ(RunJson({"models", "get", "tales", "--json"}), models["models"][0]);
  EXPECT_EQ(RunJson({"load", "--json"})["running"], 0);
  EXPECT_EQ(Run({"health"}).out, "SERVING\n");
  EXPECT_EQ(RunJson({"health", "--service=tales", "--json"})["status"], "SERVING");
  EXPECT_EQ(Run({"health", "--service=other"}).exit_code, 1);
}

TEST_F(ClientTest, RpcErrorsExitWithOneAndShowCodeAndFields) {
  StartServer();
  ProgramResult result =
      Run({"generate", "--prompt=x", "--temperature=nan", "--max_tokens=4000000000"});
  EXPECT_EQ(result.exit_code, 1);
  EXPECT_THAT(result.out, IsEmpty());
  EXPECT_THAT(result.err, AllOf(HasSubstr("INVALID_ARGUMENT"), HasSubstr("sampling.temperature"),
                                HasSubstr("stopping.max_new_tokens"), HasSubstr("65536")));
  result = Run({"generate", "--prompt=x", "--model=y"});
  EXPECT_EQ(result.exit_code, 1);
  EXPECT_THAT(result.err, AllOf(HasSubstr("NOT_FOUND"), HasSubstr("tales")));
  result = Run({"generate", "--prompt=x", "--session=s"});
  EXPECT_THAT(result.err, AllOf(HasSubstr("NOT_FOUND"), HasSubstr("session")));
  result = Run({"--timeout=200ms", "generate", "--prompt=x", "--max_tokens=60000", "--ignore_eos"});
  EXPECT_EQ(result.exit_code, 1);
  EXPECT_THAT(result.err, HasSubstr("DEADLINE_EXCEEDED"));
  const absl::StatusOr<ProgramResult> nobody =
      RunProgram({BuiltProgram("mmfree"), "--server=127.0.0.1:1", "models", "list"});
  ASSERT_THAT(nobody, IsOk());
  EXPECT_EQ(nobody->exit_code, 1);
  EXPECT_THAT(nobody->err, AllOf(HasSubstr("UNAVAILABLE"), HasSubstr("127.0.0.1:1")));
}

TEST_F(ClientTest, UsageErrorsExitWithTwoAndAHint) {
  const std::vector<std::vector<std::string>> mistakes = {
      {},
      {"unknown"},
      {"generate"},
      {"generate", "--prompt=a", "--token_ids=1"},
      {"generate", "--prompt=a", "stray"},
      {"generate", "--promt=a"},
      {"generate", "--prompt=a", "--max_tokens=-1"},
      {"generate", "--prompt=a", "--logprobs"},
      {"generate", "--prompt_file=/no/such/file"},
      {"tokenize", "--text_file=/tmp"},
      {"generate", "--prompt=caf\xE9"},
      {"health", "--service=\xFF"},
      {"score", "--text=a", "--last_logits"},
      {"score", "--text=a", "--file=b"},
      {"score", "--file=/dev/null"},
      {"models"},
      {"detokenize"},
      {"--timeout=5", "health"},
      {"health", "--tls_ca=x"},
      {"--server=", "health"},
  };
  for (std::vector<std::string> arguments : mistakes) {
    arguments.insert(arguments.begin(), BuiltProgram("mmfree"));
    const absl::StatusOr<ProgramResult> result = RunProgram(arguments);
    ASSERT_THAT(result, IsOk());
    EXPECT_EQ(result->exit_code, 2) << absl::StrJoin(arguments, " ");
    EXPECT_THAT(result->out, IsEmpty());
    EXPECT_THAT(result->err, HasSubstr("--help"));
  }
}

// A server cannot even parse a request with a string that is not UTF-8, so it could not explain.
TEST_F(ClientTest, TextInAnotherEncodingIsRefusedWithItsPlace) {
  const TempDirectory directory;
  const std::string latin1 = directory.File("latin1.txt");
  WriteFile(latin1, "na\xEFve");
  const absl::StatusOr<ProgramResult> result =
      RunProgram({BuiltProgram("mmfree"), "score", "--text_file=" + latin1});
  ASSERT_THAT(result, IsOk());
  EXPECT_EQ(result->exit_code, 2);
  EXPECT_THAT(result->err, AllOf(HasSubstr(latin1), HasSubstr("not valid UTF-8 at byte 2")));
}

TEST_F(ClientTest, OutputThatCannotBeWrittenIsAFailure) {
  if (!std::filesystem::exists("/dev/full")) GTEST_SKIP() << "this system has no /dev/full";
  StartServer();
  const absl::StatusOr<ProgramResult> result =
      RunProgram({"/bin/sh", "-c", "exec \"$0\" \"$@\" > /dev/full", BuiltProgram("mmfree"),
                  "--server=" + server_->address(), "generate", "--prompt=Once", "--max_tokens=3"});
  ASSERT_THAT(result, IsOk());
  EXPECT_EQ(result->exit_code, 1);
  EXPECT_THAT(result->err, HasSubstr("standard output"));
}

TEST_F(ClientTest, EveryCommandExplainsItself) {
  for (const char* command :
       {"", "generate", "score", "tokenize", "detokenize", "models", "load", "health"}) {
    std::vector<std::string> arguments = {BuiltProgram("mmfree")};
    if (*command != '\0') arguments.emplace_back(command);
    arguments.emplace_back("--help");
    const absl::StatusOr<ProgramResult> result = RunProgram(arguments);
    ASSERT_THAT(result, IsOk());
    EXPECT_EQ(result->exit_code, 0);
    EXPECT_THAT(result->out, AllOf(HasSubstr("mmfree"), HasSubstr("--server=HOST:PORT")));
  }
}

}  // namespace
}  // namespace mmfree

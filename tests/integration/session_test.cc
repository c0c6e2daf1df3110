// Sessions on real servers. The reference for every turn is a request without a session whose input
// is the whole context so far: both must give the same tokens, whatever happened in between.
#include <signal.h>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "tests/integration/session_fixture.h"
#include "tests/support/status_is.h"

namespace mmfree {
namespace {

using ::testing::HasSubstr;

using SessionTest = SessionFixture;

TEST_F(SessionTest, TurnsOfEveryKindGoOnExactlyWhereTheLastOneEnded) {
  Start();
  Mirror mirror = {Create("tale"), {}, 0};
  ExpectTurn(&mirror, "Once upon a time", 20);
  ExpectTurn(&mirror, ", the king said", 7);
  ExpectTurn(&mirror, "", 5);           // goes on
  ExpectTurn(&mirror, " And then", 0);  // only feeds
  ExpectTurn(&mirror, "", 9);           // goes on from what was fed
  ExpectTurn(&mirror, "x", 0);
  ExpectTurn(&mirror, "", 1);
  EXPECT_EQ(Metric("mmfree_session_turns_total{outcome=\"committed\"}"), 7);
}

TEST_F(SessionTest, ASystemPromptIsTheStartOfTheContext) {
  Start();
  v1::CreateSessionRequest request;
  request.set_text("Once upon a time there was a fox.");
  v1::CreateSessionResponse response;
  ASSERT_TRUE(Call(&v1::SessionService::Stub::CreateSession, request, &response).ok());
  EXPECT_EQ(response.session().turn(), 0u);
  Mirror mirror = {response.session().id(), {}, 0};
  Expect(&mirror, request.text(), 0);
  mirror.turn = 0;
  EXPECT_EQ(response.session().token_count(), static_cast<int64_t>(mirror.context.size()));
  ExpectTurn(&mirror, "", 12);
}

TEST_F(SessionTest, RestartForkRewindExportAndImportAreInvisible) {
  const TempDirectory directory;
  const std::vector<std::string> flags = {"--session_store=rocksdb:" + directory.File("sessions"),
                                          "--session_memory_mb=0"};
  Start(flags);
  Mirror mirror = {Create(), {}, 0};
  ExpectTurn(&mirror, "Once upon a time", 10);
  const Mirror first = mirror;
  ExpectTurn(&mirror, " there was", 10);

  server_->Signal(SIGKILL);
  ASSERT_THAT(server_->Wait(), IsOk());
  Start(flags);
  EXPECT_EQ(Get(mirror.id).tier(), v1::SESSION_TIER_STORE);
  ExpectTurn(&mirror, " a", 10);

  Mirror fork = mirror;
  fork.id = Fork(mirror.id).id();
  ExpectTurn(&mirror, " left", 8);
  ExpectTurn(&fork, " right", 8);
  Mirror early = first;
  early.id = Fork(mirror.id, 1).id();
  ExpectTurn(&early, " elsewhere", 8);

  v1::RewindSessionRequest rewind;
  rewind.set_session_id(mirror.id);
  rewind.set_turn(1);
  v1::RewindSessionResponse rewound;
  ASSERT_TRUE(Call(&v1::SessionService::Stub::RewindSession, rewind, &rewound).ok());
  mirror.context = first.context;
  mirror.turn = 1;
  ExpectTurn(&mirror, " again", 8);

  const v1::SessionCheckpoint exported = Export(mirror.id);
  Start();  // another server, another store
  ASSERT_TRUE(Import(exported, &mirror.id).ok());
  ExpectTurn(&mirror, " and more", 8);
}

TEST_F(SessionTest, TheCallerCanKeepTheStateItself) {
  Start({"--session_store=none"});
  Mirror mirror;
  v1::SessionCheckpoint state;
  for (const auto& [text, tokens] : std::vector<std::pair<std::string, uint32_t>>{
           {"Once upon a time", 10}, {"", 3}, {" the end", 0}, {"", 6}}) {
    const std::vector<int32_t> expected = Expect(&mirror, text, tokens);
    v1::GenerateRequest request = Sampled(tokens);
    request.mutable_response()->set_return_state(true);
    if (!text.empty()) request.set_text(text);
    if (!state.body().empty()) *request.mutable_state() = state;
    const Generation turn = Generate(request);
    ASSERT_TRUE(turn.status.ok()) << turn.status.error_message();
    EXPECT_EQ(turn.token_ids, expected);
    EXPECT_FALSE(turn.finished.has_session_turn());
    state = turn.finished.state();
  }
}

TEST_F(SessionTest, CandidatesGoOnFromTheCallersState) {
  Start({"--session_store=none"});
  v1::GenerateRequest first = Sampled(10);
  first.set_text("Once upon a time");
  first.mutable_response()->set_return_state(true);
  v1::GenerateRequest second = Sampled(12);
  *second.mutable_state() = Generate(first).finished.state();
  second.set_text(" and then");
  const Generation alone = Generate(second);
  second.set_candidates(3);
  const Generation several = Generate(second);
  ASSERT_TRUE(several.status.ok()) << several.status.error_message();
  EXPECT_EQ(several.started.prompt_tokens(), alone.started.prompt_tokens());
  std::vector<int32_t> ids;
  for (const v1::GenerateResponse& event : several.events) {
    if (event.delta().candidate() > 0) continue;
    ids.insert(ids.end(), event.delta().token_ids().begin(), event.delta().token_ids().end());
  }
  EXPECT_EQ(ids, alone.token_ids);
}

// Going on from a candidate's state is going on from all that was fed and sent.
TEST_F(SessionTest, EachCandidatesStateIsThatOfItsContext) {
  Start({"--session_store=none"});
  v1::GenerateRequest first = Sampled(10);
  first.set_text("Once upon a time");
  first.mutable_response()->set_return_state(true);
  const Generation before = Generate(first);
  ASSERT_TRUE(before.status.ok()) << before.status.error_message();
  v1::TokenizeRequest text;
  text.set_text("Once upon a time");
  const v1::TokenizeResponse once = Tokenize(text);
  text.set_text(" and then");
  text.set_continuation(true);
  const v1::TokenizeResponse then = Tokenize(text);
  std::vector<int32_t> input(once.token_ids().begin(), once.token_ids().end());
  input.insert(input.end(), before.token_ids.begin(), before.token_ids.end());
  input.insert(input.end(), then.token_ids().begin(), then.token_ids().end());
  for (const int kind : {0, 1, 2, 3}) {
    v1::GenerateRequest request = Sampled(kind == 1 ? 0 : 12);
    *request.mutable_state() = before.finished.state();
    request.set_text(" and then");
    request.set_candidates(3);
    request.mutable_response()->set_return_state(true);
    if (kind == 2) request.set_best_of(5);
    if (kind == 3) request.mutable_stopping()->add_stop_strings("e");
    const Generation several = Generate(request);
    ASSERT_TRUE(several.status.ok()) << several.status.error_message();
    std::vector<std::vector<int32_t>> contexts(3, input);
    std::vector<v1::SessionCheckpoint> states(3);
    for (const v1::GenerateResponse& event : several.events) {
      if (event.has_delta()) {
        std::vector<int32_t>& context = contexts[event.delta().candidate()];
        context.insert(context.end(), event.delta().token_ids().begin(),
                       event.delta().token_ids().end());
      }
      if (event.has_finished()) states[event.finished().candidate()] = event.finished().state();
    }
    if (kind != 2) {
      // Candidate 0 is the lone request.
      v1::GenerateRequest alone = request;
      alone.clear_candidates();
      EXPECT_EQ(states[0].checksum(), Generate(alone).finished.state().checksum()) << kind;
    }
    for (int i = 0; i < 3; ++i) {
      v1::GenerateRequest from_state = Sampled(8);
      *from_state.mutable_state() = states[i];
      const Generation on = Generate(from_state);
      ASSERT_TRUE(on.status.ok()) << on.status.error_message();
      if (kind == 3) continue;  // the context ends within the text of the last tokens
      v1::GenerateRequest whole = Sampled(8);
      whole.mutable_token_ids()->mutable_ids()->Add(contexts[i].begin(), contexts[i].end());
      EXPECT_EQ(on.token_ids, Generate(whole).token_ids) << kind << " " << i;
    }
  }
}

TEST_F(SessionTest, ATurnThatDoesNotEndWellNeverHappened) {
  Start();
  Mirror mirror = {Create(), {}, 0};
  ExpectTurn(&mirror, "Once upon a time", 10);
  {
    const auto cancelled = BeginEndless(mirror.id);
    cancelled->context.TryCancel();
    EXPECT_EQ(End(cancelled.get()).error_code(), grpc::StatusCode::CANCELLED);
  }
  AwaitFree(mirror.id);
  v1::GenerateRequest overdue = EndlessRequest();
  overdue.set_session_id(mirror.id);
  EXPECT_EQ(Generate(overdue, absl::Milliseconds(200)).status.error_code(),
            grpc::StatusCode::DEADLINE_EXCEEDED);
  AwaitFree(mirror.id);
  v1::GenerateRequest refused = Sampled(5);
  refused.set_session_id(mirror.id);
  refused.mutable_sampling()->set_temperature(-1);
  EXPECT_EQ(Generate(refused).status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  ExpectTurn(&mirror, " there", 6);
  ExpectIdle();
  EXPECT_EQ(Metric("mmfree_sessions_busy"), 0);
}

TEST_F(SessionTest, ATurnThatIsQueuedFreesItsSessionWhenItIsGivenUp) {
  Start({"--max_sessions=1", kKeepsSlots});
  const std::string running = Create();
  const std::string queued = Create();
  const auto blocker = BeginEndless(running);
  v1::GenerateRequest request = Sampled(5);
  request.set_session_id(queued);
  EXPECT_EQ(Generate(request, absl::Milliseconds(200)).status.error_code(),
            grpc::StatusCode::DEADLINE_EXCEEDED);
  AwaitFree(queued);
  {
    grpc::ClientContext context;
    const auto reader = inference_->Generate(&context, request);
    ASSERT_TRUE(AwaitLoad([](const auto& load) { return load.queued() == 1; }));
    context.TryCancel();
    EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
  }
  AwaitFree(queued);
  blocker->context.TryCancel();
  End(blocker.get());
  Mirror mirror = {queued, {}, 0};
  ExpectTurn(&mirror, "Once", 5);
}

TEST_F(SessionTest, ASecondTurnIsAbortedAtOnce) {
  Start();
  const std::string id = Create();
  const auto running = BeginEndless(id);
  v1::GenerateRequest request = Sampled(5);
  request.set_session_id(id);
  request.set_text("x");
  const Generation second = Generate(request);
  EXPECT_EQ(second.status.error_code(), grpc::StatusCode::ABORTED);
  EXPECT_TRUE(Get(id).busy());
  running->context.TryCancel();
  End(running.get());
}

TEST_F(SessionTest, DeletingDuringATurnEndsItAndFreesEverything) {
  Start();
  const std::string id = Create();
  const auto running = BeginEndless(id);
  ASSERT_TRUE(Delete(id).ok());
  EXPECT_EQ(End(running.get()).error_code(), grpc::StatusCode::ABORTED);
  EXPECT_EQ(Delete(id).error_code(), grpc::StatusCode::NOT_FOUND);
  ExpectIdle();
  EXPECT_EQ(Metric("mmfree_sessions_busy"), 0);
}

TEST_F(SessionTest, ErrorsSayWhatIsWrong) {
  Start({"--session_kept_turns=1"});
  Mirror mirror = {Create("s"), {}, 0};
  v1::GenerateRequest request = Sampled(3);
  request.set_session_id("none");
  EXPECT_EQ(Generate(request).status.error_code(), grpc::StatusCode::NOT_FOUND);
  ExpectTurn(&mirror, "Once", 3);
  request.set_session_id("s");
  request.set_expected_turn(7);
  EXPECT_EQ(Generate(request).status.error_code(), grpc::StatusCode::ABORTED);
  // After an end token there is nothing to go on from without input.
  const std::vector<int32_t> next = [&] {
    Mirror whole = mirror;
    return Expect(&whole, "", 1);
  }();
  v1::GenerateRequest stops = Sampled(3);
  stops.set_session_id("s");
  stops.mutable_stopping()->add_stop_token_ids(next[0]);
  const Generation stopped = Generate(stops);
  EXPECT_EQ(stopped.finished.finish_reason(), v1::FINISH_REASON_STOP_TOKEN);
  EXPECT_TRUE(stopped.token_ids.empty());
  const Generation empty = Generate(stops);
  EXPECT_EQ(empty.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(empty.status.error_message(), HasSubstr("input"));
  EXPECT_EQ(Get("s").turn(), 2u);
  ++mirror.turn;
  ExpectTurn(&mirror, " and", 4);
  v1::CreateSessionRequest again;
  again.set_session_id("s");
  v1::CreateSessionResponse created;
  EXPECT_EQ(Call(&v1::SessionService::Stub::CreateSession, again, &created).error_code(),
            grpc::StatusCode::ALREADY_EXISTS);
  again.set_session_id("a/b");
  EXPECT_THAT(Call(&v1::SessionService::Stub::CreateSession, again, &created).error_message(),
              HasSubstr("session_id"));
  again.set_session_id("t");
  again.mutable_ttl()->set_seconds(-1);
  EXPECT_THAT(Call(&v1::SessionService::Stub::CreateSession, again, &created).error_message(),
              HasSubstr("ttl"));
  // The longest Duration, ten thousand years: it ends where no Timestamp reaches.
  again.mutable_ttl()->set_seconds(315'576'000'000);
  EXPECT_TRUE(Call(&v1::SessionService::Stub::CreateSession, again, &created).ok());
  EXPECT_FALSE(created.session().has_expire_time());
  v1::SessionCheckpoint damaged = Export("s");
  damaged.mutable_body()->back() ^= 1;
  std::string id;
  EXPECT_EQ(Import(damaged, &id).error_code(), grpc::StatusCode::DATA_LOSS);
}

TEST_F(SessionTest, ASignedServerTakesOnlyItsOwnStates) {
  const TempDirectory directory;
  WriteFile(directory.File("key"), std::string(40, 'k'));
  Start();
  Mirror mirror = {Create(), {}, 0};
  ExpectTurn(&mirror, "Once", 3);
  const v1::SessionCheckpoint unsigned_state = Export(mirror.id);
  Start({"--session_key_file=" + directory.File("key")});
  std::string id;
  EXPECT_EQ(Import(unsigned_state, &id).error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  mirror = {Create(), {}, 0};
  ExpectTurn(&mirror, "Once", 3);
  EXPECT_TRUE(Import(Export(mirror.id), &id).ok());
}

}  // namespace
}  // namespace mmfree

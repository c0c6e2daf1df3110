#include "server/sessions/checkpoint.h"

#include <cstring>
#include <limits>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/sessions/session_key.h"
#include "tests/support/status_is.h"
#include "tests/support/temp_directory.h"

namespace mmfree {
namespace {

using ::testing::HasSubstr;

const ModelShape kShape = {.digest = std::string(64, 'a'), .state_floats = 6, .vocab_size = 100};

SessionState SomeState() {
  SessionState state;
  state.state = {0.0f, -0.0f, 1.5f, 1e-40f, -3.25f, 70000.0f};
  state.token_count = 5;
  state.pending = {42};
  state.last_tokens = {1, 2, 3, 4, 99};
  state.turn = 3;
  return state;
}

SessionKey Key(char fill = 'k') { return SessionKey(std::string(32, fill)); }

v1::SessionCheckpoint Encode(const SessionState& state,
                             v1::StateDtype dtype = v1::STATE_DTYPE_UNSPECIFIED,
                             const SessionKey& key = SessionKey()) {
  return EncodeCheckpoint(state, kShape.digest, dtype, key);
}

// A checkpoint with a right checksum and a body that `change` has made wrong.
template <typename Change>
v1::SessionCheckpoint Forged(const Change& change) {
  v1::SessionCheckpoint checkpoint = Encode(SomeState());
  v1::SessionCheckpointBody body;
  EXPECT_TRUE(body.ParseFromString(checkpoint.body()));
  change(&body);
  checkpoint.set_body(body.SerializeAsString());
  checkpoint.set_checksum(CheckpointChecksum(checkpoint.body()));
  return checkpoint;
}

void ExpectSame(const SessionState& a, const SessionState& b) {
  ASSERT_EQ(a.state.size(), b.state.size());
  if (!a.state.empty()) {
    EXPECT_EQ(memcmp(a.state.data(), b.state.data(), a.state.size() * sizeof(float)), 0);
  }
  EXPECT_EQ(a.token_count, b.token_count);
  EXPECT_EQ(a.pending, b.pending);
  EXPECT_EQ(a.last_tokens, b.last_tokens);
  EXPECT_EQ(a.turn, b.turn);
}

TEST(Checkpoint, ComesBackToTheBit) {
  for (const SessionKey& key : {SessionKey(), Key()}) {
    const auto decoded =
        DecodeCheckpoint(Encode(SomeState(), v1::STATE_DTYPE_F32, key), kShape, key);
    ASSERT_THAT(decoded, IsOk());
    ExpectSame(*decoded, SomeState());
  }
}

TEST(Checkpoint, AnUntouchedContextHasNoPayload) {
  const auto decoded = DecodeCheckpoint(Encode(SessionState()), kShape, SessionKey());
  ASSERT_THAT(decoded, IsOk());
  ExpectSame(*decoded, SessionState());
}

TEST(Checkpoint, SixteenBitPayloadsAreRoundedAndHalfTheSize) {
  for (const auto dtype : {v1::STATE_DTYPE_F16, v1::STATE_DTYPE_BF16}) {
    const v1::SessionCheckpoint checkpoint = Encode(SomeState(), dtype);
    EXPECT_EQ(Encode(SomeState()).body().size() - checkpoint.body().size(), 6 * 2);
    const auto decoded = DecodeCheckpoint(checkpoint, kShape, SessionKey());
    ASSERT_THAT(decoded, IsOk());
    EXPECT_EQ(decoded->state[2], 1.5f);
    EXPECT_EQ(decoded->state[5], dtype == v1::STATE_DTYPE_F16 ? 65504.0f : 70144.0f);
  }
}

TEST(Checkpoint, EveryFlippedBitIsFound) {
  const std::string bytes = Encode(SomeState(), v1::STATE_DTYPE_F32, Key()).SerializeAsString();
  for (size_t bit = 0; bit < bytes.size() * 8; ++bit) {
    std::string damaged = bytes;
    damaged[bit / 8] = static_cast<char>(damaged[bit / 8] ^ (1 << bit % 8));
    v1::SessionCheckpoint checkpoint;
    if (!checkpoint.ParseFromString(damaged)) continue;
    EXPECT_FALSE(DecodeCheckpoint(checkpoint, kShape, Key()).ok()) << "bit " << bit;
  }
}

TEST(Checkpoint, EveryTruncationIsFound) {
  const std::string bytes = Encode(SomeState()).SerializeAsString();
  for (size_t size = 0; size < bytes.size(); ++size) {
    v1::SessionCheckpoint checkpoint;
    if (!checkpoint.ParseFromString(bytes.substr(0, size))) continue;
    EXPECT_FALSE(DecodeCheckpoint(checkpoint, kShape, SessionKey()).ok()) << size << " bytes";
  }
}

TEST(Checkpoint, ADamagedBodyIsDataLoss) {
  v1::SessionCheckpoint checkpoint = Encode(SomeState());
  checkpoint.mutable_body()->back() ^= 1;
  EXPECT_THAT(DecodeCheckpoint(checkpoint, kShape, SessionKey()),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("checksum")));
  EXPECT_THAT(CheckpointModelDigest(checkpoint),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("checksum")));
}

TEST(Checkpoint, AnotherModelOrVersionIsFailedPrecondition) {
  ModelShape other = kShape;
  other.digest = std::string(64, 'b');
  EXPECT_THAT(DecodeCheckpoint(Encode(SomeState()), other, SessionKey()),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("of model aaaa")));
  v1::SessionCheckpoint checkpoint = Encode(SomeState());
  checkpoint.set_format_version(2);
  EXPECT_THAT(DecodeCheckpoint(checkpoint, kShape, SessionKey()),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("version 2")));
}

TEST(Checkpoint, AServerWithAKeyTakesOnlyItsOwnSignature) {
  EXPECT_THAT(DecodeCheckpoint(Encode(SomeState()), kShape, Key()),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("not signed")));
  const v1::SessionCheckpoint other = Encode(SomeState(), v1::STATE_DTYPE_F32, Key('x'));
  EXPECT_THAT(DecodeCheckpoint(other, kShape, Key()),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("session key")));
  EXPECT_THAT(DecodeCheckpoint(other, kShape, SessionKey()), IsOk());
}

TEST(Checkpoint, AWellChecksummedLieIsDataLoss) {
  const auto expect = [](const v1::SessionCheckpoint& checkpoint, const char* message) {
    EXPECT_THAT(DecodeCheckpoint(checkpoint, kShape, SessionKey()),
                StatusIs(absl::StatusCode::kDataLoss, HasSubstr(message)));
  };
  using Body = v1::SessionCheckpointBody;
  expect(Forged([](Body* b) { b->set_token_count(-1); }), "token counts");
  expect(Forged([](Body* b) { b->set_token_count(4); }), "token counts");
  // Counting on from these would overflow.
  expect(Forged([](Body* b) { b->set_token_count(std::numeric_limits<int64_t>::max()); }),
         "token counts");
  expect(Forged([](Body* b) { b->set_turn(std::numeric_limits<uint64_t>::max()); }),
         "token counts");
  expect(Forged([](Body* b) { b->mutable_pending_token_ids()->Resize(100'000, 1); }),
         "token counts");
  expect(Forged([](Body* b) { b->set_pending_token_ids(0, 100); }), "pending_token_ids");
  expect(Forged([](Body* b) { b->set_last_token_ids(2, -1); }), "last_token_ids");
  expect(Forged([](Body* b) { b->set_dtype(static_cast<v1::StateDtype>(9)); }), "dtype");
  expect(Forged([](Body* b) { b->set_dtype(v1::STATE_DTYPE_F16); }), "bytes");
  expect(Forged([](Body* b) { b->mutable_payload()->append(4, '\0'); }), "bytes");
  expect(Forged([](Body* b) { b->clear_payload(); }), "bytes");
  expect(Forged([](Body* b) { b->mutable_payload()->replace(0, 4, "\0\0\x80\x7f", 4); }), "finite");
}

TEST(SessionKey, IsReadFromAFileThatIsLongEnough) {
  const TempDirectory directory;
  WriteFile(directory.File("key"), std::string(32, 'k') + "\n");
  const auto key = SessionKey::FromFile(directory.File("key"));
  ASSERT_THAT(key, IsOk());
  EXPECT_TRUE(key->Verify(1, "body", Key().Sign(1, "body")));
  EXPECT_FALSE(key->Verify(2, "body", Key().Sign(1, "body")));
  WriteFile(directory.File("short"), std::string(31, 'k'));
  EXPECT_THAT(SessionKey::FromFile(directory.File("short")),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("at least 32")));
  EXPECT_THAT(SessionKey::FromFile(directory.File("none")),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("cannot be read")));
}

// RFC 2104's construction with SHA-256, from an independent implementation:
// python3 -c "import hmac; print(hmac.new(b'k'*32, b'\x01\0\0\0body', 'sha256').hexdigest())"
TEST(SessionKey, SignsAsDocumented) {
  const std::string signature = Key().Sign(1, "body");
  std::string hex;
  for (const char c : signature) {
    constexpr char kDigits[] = "0123456789abcdef";
    hex += kDigits[static_cast<uint8_t>(c) >> 4];
    hex += kDigits[static_cast<uint8_t>(c) & 15];
  }
  EXPECT_EQ(hex, "f3f59a9edc4771af924344e4694bdf60b9efe99874c854f3d26569767e8f4ffe");
}

}  // namespace
}  // namespace mmfree

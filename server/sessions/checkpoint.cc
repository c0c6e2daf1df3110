#include "server/sessions/checkpoint.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "server/base/status_macros.h"
#include "server/model/convert.h"
#include "server/sessions/half.h"

namespace mmfree {
namespace {

// Payloads are copied as they lie in memory.
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);

// Counts above it are no counts: what is added to them in a session's life must not overflow.
constexpr int64_t kMaxCount = int64_t{1} << 62;

struct PayloadFormat {
  TensorType type;
  size_t bytes;  // of one value
};

absl::StatusOr<PayloadFormat> FormatOf(v1::StateDtype dtype) {
  switch (dtype) {
    case v1::STATE_DTYPE_F32:
      return PayloadFormat{TensorType::kF32, 4};
    case v1::STATE_DTYPE_F16:
      return PayloadFormat{TensorType::kF16, 2};
    case v1::STATE_DTYPE_BF16:
      return PayloadFormat{TensorType::kBF16, 2};
    default:
      return absl::DataLossError(absl::StrCat("the checkpoint has the unknown dtype ", dtype));
  }
}

std::string EncodePayload(const std::vector<float>& state, v1::StateDtype dtype) {
  std::string payload;
  if (dtype == v1::STATE_DTYPE_F32) {
    payload.resize(state.size() * sizeof(float));
    if (!state.empty()) memcpy(payload.data(), state.data(), payload.size());
    return payload;
  }
  payload.resize(state.size() * sizeof(uint16_t));
  for (size_t i = 0; i < state.size(); ++i) {
    const uint16_t value =
        dtype == v1::STATE_DTYPE_F16 ? FloatToHalf(state[i]) : FloatToBfloat16(state[i]);
    memcpy(payload.data() + i * sizeof(value), &value, sizeof(value));
  }
  return payload;
}

absl::Status CheckTokens(const google::protobuf::RepeatedField<int32_t>& tokens, int64_t vocab_size,
                         absl::string_view name) {
  for (const int32_t token : tokens) {
    if (token < 0 || token >= vocab_size) {
      return absl::DataLossError(
          absl::StrCat("the checkpoint's ", name, " hold ", token, ", not a token id"));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckEnvelope(const v1::SessionCheckpoint& checkpoint, const SessionKey& key) {
  if (checkpoint.format_version() != kCheckpointFormatVersion) {
    return absl::FailedPreconditionError(
        absl::StrCat("the checkpoint has format version ", checkpoint.format_version(),
                     "; this server reads version ", kCheckpointFormatVersion));
  }
  const std::string& body = checkpoint.body();
  if (CheckpointChecksum(body) != checkpoint.checksum()) {
    return absl::DataLossError("the checkpoint is damaged: its checksum does not match");
  }
  if (!key.empty() && !key.Verify(checkpoint.format_version(), body, checkpoint.hmac_sha256())) {
    return absl::FailedPreconditionError(
        checkpoint.hmac_sha256().empty()
            ? "the checkpoint is not signed; this server takes only those signed with its session "
              "key"
            : "the checkpoint is not signed with this server's session key");
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<float>> DecodePayload(const v1::SessionCheckpointBody& body,
                                                 int64_t state_floats) {
  MMFREE_ASSIGN_OR_RETURN(const PayloadFormat format, FormatOf(body.dtype()));
  std::vector<float> state;
  const std::string& payload = body.payload();
  if (payload.empty() && body.token_count() == 0) return state;
  if (payload.size() != static_cast<size_t>(state_floats) * format.bytes) {
    return absl::DataLossError(absl::StrCat("the checkpoint's state has ", payload.size(),
                                            " bytes; its model's has ",
                                            static_cast<size_t>(state_floats) * format.bytes));
  }
  state.resize(static_cast<size_t>(state_floats));
  if (!ConvertToFloat(format.type, reinterpret_cast<const uint8_t*>(payload.data()), state_floats,
                      state.data())) {
    return absl::DataLossError("the checkpoint's state holds a value that is not finite");
  }
  return state;
}

}  // namespace

uint64_t CheckpointChecksum(const std::string& body) {
  return XXH3_64bits(body.data(), body.size());
}

bool CheckpointIsWhole(const std::string& bytes) {
  v1::SessionCheckpoint checkpoint;
  return checkpoint.ParseFromString(bytes) &&
         checkpoint.checksum() == CheckpointChecksum(checkpoint.body());
}

v1::SessionCheckpoint EncodeCheckpoint(const SessionState& state, const std::string& model_digest,
                                       v1::StateDtype dtype, const SessionKey& key) {
  if (dtype == v1::STATE_DTYPE_UNSPECIFIED) dtype = v1::STATE_DTYPE_F32;
  v1::SessionCheckpointBody body;
  body.set_model_digest(model_digest);
  body.set_dtype(dtype);
  body.set_token_count(state.token_count);
  body.mutable_pending_token_ids()->Add(state.pending.begin(), state.pending.end());
  body.mutable_last_token_ids()->Add(state.last_tokens.begin(), state.last_tokens.end());
  body.set_turn(state.turn);
  body.set_payload(EncodePayload(state.state, dtype));

  v1::SessionCheckpoint checkpoint;
  checkpoint.set_format_version(kCheckpointFormatVersion);
  checkpoint.set_body(body.SerializeAsString());
  checkpoint.set_checksum(CheckpointChecksum(checkpoint.body()));
  if (!key.empty()) {
    checkpoint.set_hmac_sha256(key.Sign(kCheckpointFormatVersion, checkpoint.body()));
  }
  return checkpoint;
}

absl::StatusOr<SessionState> DecodeCheckpoint(const v1::SessionCheckpoint& checkpoint,
                                              const ModelShape& shape, const SessionKey& key) {
  MMFREE_RETURN_IF_ERROR(CheckEnvelope(checkpoint, key));
  v1::SessionCheckpointBody body;
  if (!body.ParseFromString(checkpoint.body())) {
    return absl::DataLossError("the checkpoint's body cannot be parsed");
  }
  if (body.model_digest() != shape.digest) {
    return absl::FailedPreconditionError(absl::StrCat("the checkpoint is of model ",
                                                      body.model_digest().substr(0, 64),
                                                      ", not of ", shape.digest));
  }
  if (body.token_count() < 0 || body.token_count() > kMaxCount ||
      body.turn() > static_cast<uint64_t>(kMaxCount) ||
      body.pending_token_ids_size() > static_cast<int>(kMaxPendingTokens) ||
      body.last_token_ids_size() > static_cast<int>(kMaxLastTokens) ||
      body.last_token_ids_size() > body.token_count()) {
    return absl::DataLossError("the checkpoint's token counts contradict each other");
  }
  MMFREE_RETURN_IF_ERROR(
      CheckTokens(body.pending_token_ids(), shape.vocab_size, "pending_token_ids"));
  MMFREE_RETURN_IF_ERROR(CheckTokens(body.last_token_ids(), shape.vocab_size, "last_token_ids"));
  SessionState state;
  MMFREE_ASSIGN_OR_RETURN(state.state, DecodePayload(body, shape.state_floats));
  state.token_count = body.token_count();
  state.pending.assign(body.pending_token_ids().begin(), body.pending_token_ids().end());
  state.last_tokens.assign(body.last_token_ids().begin(), body.last_token_ids().end());
  state.turn = body.turn();
  return state;
}

absl::StatusOr<std::string> CheckpointModelDigest(const v1::SessionCheckpoint& checkpoint) {
  MMFREE_RETURN_IF_ERROR(CheckEnvelope(checkpoint, SessionKey()));
  v1::SessionCheckpointBody body;
  if (!body.ParseFromString(checkpoint.body())) {
    return absl::DataLossError("the checkpoint's body cannot be parsed");
  }
  return std::move(*body.mutable_model_digest());
}

}  // namespace mmfree

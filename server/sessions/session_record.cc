#include "server/sessions/session_record.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>
#include <cstring>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "mmfree/store/v1/session_record.pb.h"

namespace mmfree {
namespace {

constexpr uint32_t kRecordFormatVersion = 1;

}  // namespace

const KeptTurn* SessionRecord::Find(uint64_t turn) const {
  const auto found = std::find_if(kept.begin(), kept.end(),
                                  [turn](const KeptTurn& entry) { return entry.turn == turn; });
  return found == kept.end() ? nullptr : &*found;
}

SessionInfo SessionRecord::Info() const {
  SessionInfo info;
  info.name = name;
  info.model = model;
  info.model_digest = model_digest;
  info.token_count = present().token_count;
  info.turn = present().turn;
  info.oldest_turn = kept.front().turn;
  for (const KeptTurn& turn : kept) info.bytes += turn.bytes;
  info.create_time = create_time;
  info.last_use_time = last_use_time;
  info.expire_time = expire_time();
  info.ttl = ttl;
  return info;
}

std::string EncodeRecord(const SessionRecord& record) {
  store::v1::SessionRecord proto;
  proto.set_format_version(kRecordFormatVersion);
  proto.set_id(record.name.id);
  proto.set_owner(record.name.owner);
  proto.set_model(record.model);
  proto.set_model_digest(record.model_digest);
  for (const KeptTurn& turn : record.kept) {
    store::v1::KeptTurn* const kept = proto.add_kept();
    kept->set_turn(turn.turn);
    kept->set_revision(turn.revision);
    kept->set_token_count(turn.token_count);
    kept->set_bytes(turn.bytes);
  }
  proto.set_create_time_us(absl::ToUnixMicros(record.create_time));
  proto.set_last_use_time_us(absl::ToUnixMicros(record.last_use_time));
  if (record.ttl != absl::InfiniteDuration()) {
    proto.set_ttl_us(std::max<int64_t>(1, absl::ToInt64Microseconds(record.ttl)));
  }
  const std::string content = proto.SerializeAsString();
  const uint64_t checksum = XXH3_64bits(content.data(), content.size());
  std::string bytes(sizeof(checksum), '\0');
  memcpy(bytes.data(), &checksum, sizeof(checksum));
  bytes.append(content);
  return bytes;
}

absl::StatusOr<SessionRecord> DecodeRecord(absl::string_view bytes) {
  uint64_t checksum = 0;
  if (bytes.size() < sizeof(checksum)) {
    return absl::DataLossError("the session's stored record is damaged: it is cut short");
  }
  memcpy(&checksum, bytes.data(), sizeof(checksum));
  const absl::string_view content = bytes.substr(sizeof(checksum));
  if (XXH3_64bits(content.data(), content.size()) != checksum) {
    return absl::DataLossError(
        "the session's stored record is damaged: its checksum does not match");
  }
  store::v1::SessionRecord proto;
  if (!proto.ParseFromArray(content.data(), static_cast<int>(content.size())) ||
      proto.kept().empty()) {
    return absl::DataLossError("the session's stored record cannot be parsed");
  }
  if (proto.format_version() != kRecordFormatVersion) {
    return absl::DataLossError(absl::StrCat("the session's stored record has format version ",
                                            proto.format_version(), "; this server reads version ",
                                            kRecordFormatVersion));
  }
  SessionRecord record;
  record.name = {proto.owner(), proto.id()};
  record.model = proto.model();
  record.model_digest = proto.model_digest();
  for (const store::v1::KeptTurn& kept : proto.kept()) {
    record.kept.push_back({kept.turn(), kept.revision(), kept.token_count(), kept.bytes()});
  }
  record.create_time = absl::FromUnixMicros(proto.create_time_us());
  record.last_use_time = absl::FromUnixMicros(proto.last_use_time_us());
  if (proto.ttl_us() > 0) record.ttl = absl::Microseconds(proto.ttl_us());
  return record;
}

}  // namespace mmfree

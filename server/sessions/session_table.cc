#include "server/sessions/session_table.h"

#include <pthread.h>

#include <algorithm>
#include <tuple>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "server/base/log.h"
#include "server/base/status_macros.h"
#include "server/sessions/checkpoint.h"
#include "server/sessions/store_errors.h"

namespace mmfree {
namespace {

// Sessions removed in one call of the store, which holds a lock or a connection meanwhile.
constexpr int64_t kSweepBatch = 1000;

absl::StatusOr<SessionState> Deserialize(const std::string& bytes, const ModelShape& shape,
                                         const SessionKey& key) {
  v1::SessionCheckpoint checkpoint;
  if (!checkpoint.ParseFromString(bytes)) {
    return absl::DataLossError("the session's stored state is damaged: it cannot be parsed");
  }
  return DecodeCheckpoint(checkpoint, shape, key);
}

absl::Status TurnNotKept(const SessionRecord& record, uint64_t turn) {
  return absl::NotFoundError(absl::StrCat("turn ", turn, " of session \"", record.name.id,
                                          "\" is not kept; turns ", record.kept.front().turn,
                                          " to ", record.present().turn, " are"));
}

SessionState WithoutState(const SessionState& context) {
  SessionState copy;
  copy.device = context.device;
  copy.token_count = context.token_count;
  copy.pending = context.pending;
  copy.last_tokens = context.last_tokens;
  copy.turn = context.turn;
  return copy;
}

// The place of a session in a list that is most recently used first.
using ListKey = std::pair<int64_t, std::string>;

ListKey KeyOf(const SessionInfo& info) {
  return {-absl::ToUnixMicros(info.last_use_time), info.name.id};
}

std::string EncodePageToken(const ListKey& last) {
  return absl::WebSafeBase64Escape(absl::StrCat(last.first, ":", last.second));
}

absl::StatusOr<ListKey> DecodePageToken(const std::string& token) {
  std::string text;
  ListKey key;
  if (absl::WebSafeBase64Unescape(token, &text)) {
    const size_t colon = text.find(':');
    if (colon != std::string::npos &&
        absl::SimpleAtoi(absl::string_view(text).substr(0, colon), &key.first)) {
      key.second = text.substr(colon + 1);
      if (EncodePageToken(key) == token) return key;
    }
  }
  return absl::InvalidArgumentError("page_token is not a next_page_token of this server");
}

}  // namespace

SessionTable::SessionTable(Options options, std::unique_ptr<SessionStore> store,
                           SessionMetrics* metrics)
    : options_(std::move(options)),
      store_(std::make_unique<MonitoredStore>(std::move(store), options_.store_health, metrics)),
      metrics_(metrics),
      cache_(store_->in_memory() ? 0 : options_.host_cache_bytes) {
  UpdateStored();
  if (options_.sweep_interval == absl::InfiniteDuration()) return;
  sweeper_ = std::thread([this] {
    pthread_setname_np(pthread_self(), "mmfree-sweep");
    RunSweeps();
  });
}

SessionTable::~SessionTable() {
  {
    absl::MutexLock lock(&mutex_);
    stopping_ = true;
  }
  if (sweeper_.joinable()) sweeper_.join();
}

// --- One session at a time ----------------------------------------------------------------------

absl::StatusOr<std::shared_ptr<SessionTable::Hold>> SessionTable::Acquire(const SessionName& name) {
  absl::MutexLock lock(&mutex_);
  const auto [entry, is_new] = holds_.try_emplace(name);
  if (!is_new) {
    return absl::AbortedError(absl::StrCat("a turn is running on session \"", name.id, "\""));
  }
  entry->second = std::make_shared<Hold>();
  metrics_->SetBusy(static_cast<int64_t>(holds_.size()));
  return entry->second;
}

void SessionTable::Release(const SessionName& name) {
  absl::MutexLock lock(&mutex_);
  holds_.erase(name);
  metrics_->SetBusy(static_cast<int64_t>(holds_.size()));
}

int64_t SessionTable::busy() const {
  absl::MutexLock lock(&mutex_);
  return static_cast<int64_t>(holds_.size());
}

SessionInfo SessionTable::InfoOf(const SessionRecord& record) const {
  SessionInfo info = record.Info();
  const uint64_t revision = record.present().revision;
  const bool on_device =
      std::any_of(devices_.begin(), devices_.end(),
                  [revision](const auto& pool) { return pool->Contains(revision); });
  info.tier = on_device                                          ? SessionTier::kDevice
              : store_->in_memory() || cache_.Contains(revision) ? SessionTier::kHost
                                                                 : SessionTier::kStore;
  absl::MutexLock lock(&mutex_);
  info.busy = holds_.contains(record.name);
  return info;
}

absl::StatusOr<SessionTable::Loaded> SessionTable::Load(const SessionName& name) {
  MMFREE_ASSIGN_OR_RETURN(const StoredRecord stored, store_->Read(name));
  Loaded loaded;
  loaded.revision = stored.revision;
  MMFREE_ASSIGN_OR_RETURN(loaded.record, DecodeRecord(stored.record));
  if (!(loaded.record.name == name)) {
    return absl::DataLossError(
        absl::StrCat("the stored record of session \"", name.id, "\" is of another session"));
  }
  return loaded;
}

absl::StatusOr<SharedBytes> SessionTable::LoadCheckpoint(const SessionName& name,
                                                         const KeptTurn& turn, SessionTier* tier) {
  SharedBytes bytes = cache_.Get(turn.revision);
  if (!store_->in_memory()) metrics_->CountHostCache(bytes != nullptr);
  if (tier != nullptr) {
    *tier = store_->in_memory() || bytes != nullptr ? SessionTier::kHost : SessionTier::kStore;
  }
  if (bytes != nullptr) return bytes;
  absl::StatusOr<SharedBytes> stored = store_->ReadCheckpoint(name, turn.revision);
  if (stored.ok()) {
    UpdateHostCache(cache_.Put(turn.revision, *stored));
    return stored;
  }
  UpdateStored();  // it may be found out just now to be lost
  if (!absl::IsNotFound(stored.status())) return stored.status();
  // Its record names it. Either the session has moved on since that was read, or it is lost.
  MMFREE_ASSIGN_OR_RETURN(const Loaded now, Load(name));
  const bool named =
      std::any_of(now.record.kept.begin(), now.record.kept.end(),
                  [&](const KeptTurn& kept) { return kept.revision == turn.revision; });
  if (!named) return SessionMovedOn(name);
  return absl::DataLossError(absl::StrCat("the state of session \"", name.id, "\" at turn ",
                                          turn.turn, " is not in the store"));
}

std::shared_ptr<const SessionState> SessionTable::FindOnDevice(uint64_t revision) {
  for (const std::shared_ptr<DevicePool>& pool : devices_) {
    if (auto context = pool->Get(revision); context != nullptr) return context;
  }
  return nullptr;
}

void SessionTable::KeepOnDevice(uint64_t revision, SessionState context) {
  for (const std::shared_ptr<DevicePool>& pool : devices_) {
    if (context.device != nullptr && context.device->pool() == pool.get()) {
      pool->Put(revision, std::move(context));
      return;
    }
  }
}

void SessionTable::Forget(uint64_t revision) {
  cache_.Erase(revision);
  for (const std::shared_ptr<DevicePool>& pool : devices_) pool->Erase(revision);
}

void SessionTable::UpdateHostCache(int64_t evicted) {
  if (store_->in_memory()) return;
  if (evicted > 0) metrics_->CountEvictions(SessionMetrics::Tier::kHost, evicted);
  metrics_->SetHostCache(cache_.states(), cache_.bytes());
}

SharedBytes SessionTable::Serialize(const SessionState& state, const std::string& model_digest) {
  const v1::SessionCheckpoint checkpoint =
      EncodeCheckpoint(state, model_digest, v1::STATE_DTYPE_F32, options_.key);
  const std::shared_ptr<std::string> bytes = buffers_.Take(checkpoint.ByteSizeLong());
  checkpoint.AppendToString(bytes.get());
  return bytes;
}

absl::Status SessionTable::Commit(const SessionRecord& record, std::optional<uint64_t> expected,
                                  uint64_t revision, SharedBytes checkpoint,
                                  std::vector<uint64_t> obsolete) {
  StoreChange change;
  change.name = record.name;
  change.expected = expected;
  change.revision = revision;
  change.expire_time = record.expire_time();
  change.last_use_time = record.last_use_time;
  change.record = EncodeRecord(record);
  change.checkpoint = checkpoint;
  change.obsolete = std::move(obsolete);
  MMFREE_RETURN_IF_ERROR(store_->Commit(change));
  for (const uint64_t gone : change.obsolete) Forget(gone);
  UpdateHostCache(checkpoint == nullptr ? 0 : cache_.Put(revision, std::move(checkpoint)));
  return absl::OkStatus();
}

// --- Operations ---------------------------------------------------------------------------------

absl::StatusOr<SessionInfo> SessionTable::CreateWith(SessionRecord record, SharedBytes checkpoint,
                                                     const SessionState& context) {
  if (record.name.id.empty()) {
    record.name.id = absl::StrFormat("%016x%016x", NewRevision(), NewRevision());
  }
  record.create_time = options_.clock->Now();
  record.last_use_time = record.create_time;
  const uint64_t revision = NewRevision();
  KeptTurn& present = record.kept.back();
  present.revision = revision;
  present.bytes = static_cast<int64_t>(checkpoint->size());
  MMFREE_RETURN_IF_ERROR(Commit(record, std::nullopt, revision, std::move(checkpoint), {}));
  KeepOnDevice(revision, WithoutState(context));
  UpdateStored();
  return InfoOf(record);
}

absl::StatusOr<SessionInfo> SessionTable::Create(SessionName name, const std::string& model,
                                                 const std::string& model_digest,
                                                 const SessionState& state,
                                                 std::optional<absl::Duration> ttl) {
  SessionRecord record;
  record.name = std::move(name);
  record.model = model;
  record.model_digest = model_digest;
  record.ttl = ttl.value_or(options_.ttl);
  record.kept = {{.turn = state.turn, .token_count = state.context_tokens()}};
  return CreateWith(std::move(record), Serialize(state, model_digest), state);
}

absl::StatusOr<SessionInfo> SessionTable::Get(const SessionName& name) {
  MMFREE_ASSIGN_OR_RETURN(const Loaded loaded, Load(name));
  return InfoOf(loaded.record);
}

absl::StatusOr<SessionTable::Page> SessionTable::List(const std::string& owner,
                                                      const std::string& model, int32_t page_size,
                                                      const std::string& page_token) {
  std::optional<ListKey> after;
  if (!page_token.empty()) {
    MMFREE_ASSIGN_OR_RETURN(after, DecodePageToken(page_token));
  }
  std::vector<std::pair<ListKey, SessionRecord>> found;
  MMFREE_RETURN_IF_ERROR(store_->List(owner, [&](const StoredRecord& stored) {
    // A damaged record is reported to who asks for that session, and hides no other.
    absl::StatusOr<SessionRecord> record = DecodeRecord(stored.record);
    if (!record.ok() || (!model.empty() && record->model != model)) return;
    ListKey key = KeyOf(record->Info());
    if (after.has_value() && key <= *after) return;
    found.emplace_back(std::move(key), *std::move(record));
  }));
  const size_t size = std::min(found.size(), static_cast<size_t>(page_size));
  std::partial_sort(found.begin(), found.begin() + static_cast<ptrdiff_t>(size), found.end(),
                    [](const auto& a, const auto& b) { return a.first < b.first; });
  Page page;
  for (size_t i = 0; i < size; ++i) page.sessions.push_back(InfoOf(found[i].second));
  if (size < found.size()) page.next_page_token = EncodePageToken(found[size - 1].first);
  return page;
}

absl::StatusOr<SessionInfo> SessionTable::Fork(const SessionName& source,
                                               std::optional<uint64_t> turn, SessionName new_name,
                                               std::optional<absl::Duration> ttl) {
  MMFREE_ASSIGN_OR_RETURN(const Loaded loaded, Load(source));
  const KeptTurn* const kept =
      turn.has_value() ? loaded.record.Find(*turn) : &loaded.record.present();
  if (kept == nullptr) return TurnNotKept(loaded.record, *turn);
  MMFREE_ASSIGN_OR_RETURN(SharedBytes checkpoint, LoadCheckpoint(source, *kept));
  SessionRecord copy = loaded.record;
  copy.name = std::move(new_name);
  copy.kept = {*kept};
  if (ttl.has_value()) copy.ttl = *ttl;
  const std::shared_ptr<const SessionState> context = FindOnDevice(kept->revision);
  return CreateWith(std::move(copy), std::move(checkpoint),
                    context == nullptr ? SessionState() : *context);
}

absl::StatusOr<SessionInfo> SessionTable::Rewind(const SessionName& name, uint64_t turn) {
  MMFREE_ASSIGN_OR_RETURN(const std::shared_ptr<Hold> hold, Acquire(name));
  absl::Cleanup release = [&] { Release(name); };
  MMFREE_ASSIGN_OR_RETURN(Loaded loaded, Load(name));
  SessionRecord& record = loaded.record;
  const KeptTurn* const kept = record.Find(turn);
  if (kept == nullptr) return TurnNotKept(record, turn);
  std::vector<uint64_t> obsolete;
  while (record.present().turn != turn) {
    obsolete.push_back(record.present().revision);
    record.kept.pop_back();
  }
  record.last_use_time = options_.clock->Now();
  MMFREE_RETURN_IF_ERROR(
      Commit(record, loaded.revision, NewRevision(), nullptr, std::move(obsolete)));
  std::move(release).Invoke();
  return InfoOf(record);
}

absl::StatusOr<SessionTable::ReadResult> SessionTable::Read(const SessionName& name,
                                                            std::optional<uint64_t> turn,
                                                            const ModelShape& shape) {
  MMFREE_ASSIGN_OR_RETURN(const Loaded loaded, Load(name));
  const KeptTurn* const kept =
      turn.has_value() ? loaded.record.Find(*turn) : &loaded.record.present();
  if (kept == nullptr) return TurnNotKept(loaded.record, *turn);
  MMFREE_ASSIGN_OR_RETURN(const SharedBytes checkpoint, LoadCheckpoint(name, *kept));
  ReadResult result;
  MMFREE_ASSIGN_OR_RETURN(result.state, Deserialize(*checkpoint, shape, options_.key));
  result.session = InfoOf(loaded.record);
  return result;
}

absl::Status SessionTable::Delete(const SessionName& name) {
  // What to forget with it; a record that is damaged or away cannot tell, and the cache's LRU will.
  const absl::StatusOr<Loaded> loaded = Load(name);
  MMFREE_RETURN_IF_ERROR(store_->Delete(name));
  if (loaded.ok()) {
    for (const KeptTurn& kept : loaded->record.kept) Forget(kept.revision);
    UpdateHostCache(0);
  }
  UpdateStored();
  std::function<void()> on_delete;
  {
    absl::MutexLock lock(&mutex_);
    const auto found = holds_.find(name);
    if (found != holds_.end()) {
      found->second->deleted = true;
      on_delete = std::exchange(found->second->on_delete, nullptr);
    }
  }
  if (on_delete) on_delete();
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<SessionTurn>> SessionTable::Begin(
    const SessionName& name, std::optional<uint64_t> expected_turn) {
  MMFREE_ASSIGN_OR_RETURN(std::shared_ptr<Hold> hold, Acquire(name));
  absl::StatusOr<Loaded> loaded = Load(name);
  if (!loaded.ok()) {
    Release(name);
    return loaded.status();
  }
  const uint64_t present = loaded->record.present().turn;
  auto turn =
      std::unique_ptr<SessionTurn>(new SessionTurn(this, *std::move(loaded), std::move(hold)));
  if (expected_turn.has_value() && *expected_turn != present) {
    return absl::AbortedError(absl::StrCat("session \"", name.id, "\" is at turn ", present,
                                           ", not at ", *expected_turn));
  }
  return turn;
}

// --- A turn -------------------------------------------------------------------------------------

SessionTurn::~SessionTurn() {
  table_->metrics_->CountTurn(outcome_);
  table_->Release(loaded_.record.name);
}

absl::StatusOr<SessionState> SessionTurn::Load(const ModelShape& shape) {
  using Tier = SessionMetrics::Tier;
  if (loaded_.record.model_digest == shape.digest) {
    const auto context = table_->FindOnDevice(loaded_.record.present().revision);
    if (context != nullptr) {
      table_->metrics_->CountResume(Tier::kDevice);
      return *context;
    }
  }
  SessionTier tier;
  MMFREE_ASSIGN_OR_RETURN(
      const SharedBytes checkpoint,
      table_->LoadCheckpoint(loaded_.record.name, loaded_.record.present(), &tier));
  absl::StatusOr<SessionState> state = Deserialize(*checkpoint, shape, table_->options_.key);
  if (state.ok() && !state->state.empty()) {
    table_->metrics_->CountResume(tier == SessionTier::kHost ? Tier::kHost : Tier::kStore);
  }
  return state;
}

void SessionTurn::OnDelete(std::function<void()> callback) {
  {
    absl::MutexLock lock(&table_->mutex_);
    if (!hold_->deleted) {
      hold_->on_delete = std::move(callback);
      return;
    }
  }
  callback();
}

bool SessionTurn::deleted() const {
  absl::MutexLock lock(&table_->mutex_);
  return hold_->deleted;
}

absl::StatusOr<SessionInfo> SessionTurn::Commit(SessionState state) {
  SessionRecord record = loaded_.record;
  const SessionTable::Options& options = table_->options_;
  state.turn = record.present().turn + 1;
  const SharedBytes checkpoint = table_->Serialize(state, record.model_digest);
  const uint64_t revision = NewRevision();
  record.kept.push_back({.turn = state.turn,
                         .revision = revision,
                         .token_count = state.context_tokens(),
                         .bytes = static_cast<int64_t>(checkpoint->size())});
  int64_t bytes = record.Info().bytes;
  std::vector<uint64_t> obsolete;
  while (record.kept.size() > 1 &&
         (record.kept.size() > static_cast<size_t>(options.kept_turns) + 1 ||
          bytes > options.kept_bytes)) {
    bytes -= record.kept.front().bytes;
    obsolete.push_back(record.kept.front().revision);
    record.kept.erase(record.kept.begin());
  }
  record.last_use_time = options.clock->Now();
  const absl::Status committed =
      table_->Commit(record, loaded_.revision, revision, checkpoint, std::move(obsolete));
  outcome_ = committed.ok()                   ? "committed"
             : absl::IsUnavailable(committed) ? "store_unavailable"
                                              : "conflict";
  if (absl::IsNotFound(committed)) {
    return absl::AbortedError(
        absl::StrCat("session \"", record.name.id, "\" was deleted during the turn"));
  }
  MMFREE_RETURN_IF_ERROR(committed);
  // Of a session only the present is on the device.
  for (const std::shared_ptr<DevicePool>& pool : table_->devices_) {
    pool->Erase(loaded_.record.present().revision);
  }
  table_->KeepOnDevice(revision, std::move(state));
  return table_->InfoOf(record);
}

// --- Expiry -------------------------------------------------------------------------------------

void SessionTable::Sweep() {
  for (;;) {
    const absl::StatusOr<int64_t> removed = store_->RemoveExpired(kSweepBatch);
    if (!removed.ok()) {
      Log(LogLevel::kWarning,
          absl::StrCat("looking for expired sessions: ", removed.status().ToString()));
      return;
    }
    metrics_->CountExpired(*removed);
    if (*removed < kSweepBatch) break;
  }
  UpdateStored();
}

void SessionTable::UpdateStored() {
  if (const std::optional<int64_t> count = store_->count()) metrics_->SetStored(*count);
  metrics_->SetLost(store_->lost());
}

void SessionTable::RunSweeps() {
  for (;;) {
    {
      absl::MutexLock lock(&mutex_);
      if (mutex_.AwaitWithTimeout(absl::Condition(&stopping_), options_.sweep_interval)) return;
    }
    Sweep();
  }
}

}  // namespace mmfree

// mmfree-server: flags -> options -> wire the layers -> wait for signals. Only this file names
// concrete backends.
#include <prometheus/registry.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <memory>
#include <optional>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/strip.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "server/backends/cpu/cpu_backend.h"
#ifdef MMFREE_HAVE_CUDA
#include "server/backends/cuda/cuda_backend.h"
#include "server/backends/cuda/gpu_monitor.h"
#endif
#include "server/base/cpu_features.h"
#include "server/base/log.h"
#include "server/base/status_macros.h"
#include "server/engine/engine.h"
#include "server/engine/engine_group.h"
#include "server/metrics/exposer.h"
#include "server/metrics/gpu_metrics.h"
#include "server/metrics/metrics.h"
#include "server/metrics/prefix_cache_metrics.h"
#include "server/metrics/session_metrics.h"
#include "server/model/model.h"
#include "server/prefix_cache/prefix_cache.h"
#include "server/rpc/model_registry.h"
#include "server/rpc/server.h"
#include "server/rpc/tls.h"
#include "server/server_flags.h"
#include "server/sessions/memory_store.h"
#ifdef MMFREE_HAVE_REDIS
#include "server/sessions/redis_store.h"
#endif
#ifdef MMFREE_HAVE_ROCKSDB
#include "server/sessions/rocksdb_salvage.h"
#include "server/sessions/rocksdb_store.h"
#endif
#include "server/sessions/session_key.h"
#include "server/sessions/session_table.h"
#include "server/sessions/store.h"
#include "server/tokenizer/tokenizer.h"

namespace mmfree {
namespace {

constexpr int kExitFailure = 1;
constexpr int kExitUsage = 2;

// Waits for SIGTERM and SIGINT in a thread of its own. Made before any other thread, so that all of
// them leave these signals to it. Lives until the process ends.
class SignalWaiter {
 public:
  SignalWaiter() {
    signal(SIGPIPE, SIG_IGN);
    sigemptyset(&signals_);
    sigaddset(&signals_, SIGTERM);
    sigaddset(&signals_, SIGINT);
    pthread_sigmask(SIG_BLOCK, &signals_, nullptr);
    std::thread([this] { Work(); }).detach();
  }

  // From now on the first signal asks for a drain; before, it ends the process.
  void StartServing() { serving_ = true; }
  void Wait() { first_.WaitForNotification(); }

 private:
  void Work() {
    const int first = WaitForSignal();
    if (!serving_) {
      Log(LogLevel::kInfo, absl::StrCat("signal ", first, " while starting: stopped"));
      _exit(EXIT_SUCCESS);
    }
    Log(LogLevel::kInfo, absl::StrCat("signal ", first, ": draining; another one stops at once"));
    first_.Notify();
    const int second = WaitForSignal();
    Log(LogLevel::kWarning, absl::StrCat("signal ", second, ": stopped at once"));
    _exit(kExitFailure);
  }

  int WaitForSignal() {
    int signal = 0;
    sigwait(&signals_, &signal);
    return signal;
  }

  sigset_t signals_;
  std::atomic<bool> serving_{false};
  absl::Notification first_;
};

std::string Megabytes(int64_t bytes) {
  return absl::StrFormat("%.1f MB", static_cast<double>(bytes) / 1e6);
}

absl::StatusOr<std::unique_ptr<Backend>> MakeCpuBackend(const std::shared_ptr<const Model>& model,
                                                        const ServerFlags& flags) {
  CpuBackendOptions options;
  options.isa = flags.cpu_isa;
  options.threads = flags.threads;
  options.pin_threads = flags.pin_threads;
  options.numa = flags.numa;
  options.num_slots = flags.max_sessions;
  options.max_step_tokens = flags.step_token_budget;
  return CreateCpuBackend(model, options);
}

using Backends = std::vector<std::unique_ptr<Backend>>;

absl::StatusOr<Backends> MakeCpuBackends(const std::shared_ptr<const Model>& model,
                                         const ServerFlags& flags) {
  Backends backends(1);
  MMFREE_ASSIGN_OR_RETURN(backends[0], MakeCpuBackend(model, flags));
  return backends;
}

#ifdef MMFREE_HAVE_CUDA
// States of idle sessions that a device keeps.
int32_t ResidentSlots(const Model& model, const ServerFlags& flags) {
  if (flags.session_store == "none") return 0;
  const int64_t state_bytes = model.config().state_floats() * static_cast<int64_t>(sizeof(float));
  constexpr int64_t kMost = 1 << 20;  // that a backend takes
  return static_cast<int32_t>(std::min((flags.session_device_mb << 20) / state_bytes, kMost));
}
#endif

// The backends that were asked for, one a device, with the reason for the choice in `why`.
absl::StatusOr<Backends> MakeBackends(const std::shared_ptr<const Model>& model,
                                      const ServerFlags& flags, std::string* why) {
  if (flags.backend == "cpu") {
    *why = "--backend=cpu";
    return MakeCpuBackends(model, flags);
  }
#ifdef MMFREE_HAVE_CUDA
  absl::Status usable = absl::OkStatus();
  for (const int32_t device : flags.devices) usable.Update(CheckCudaDevice(device));
  if (flags.backend == "cuda" || usable.ok()) {
    *why = flags.backend == "cuda" ? "--backend=cuda" : "auto: a usable GPU";
    CudaBackendOptions options;
    options.num_slots = flags.max_sessions;
    options.max_step_tokens = flags.step_token_budget;
    options.resident_slots = ResidentSlots(*model, flags);
    Backends backends;
    for (const int32_t device : flags.devices) {
      options.device = device;
      MMFREE_ASSIGN_OR_RETURN(backends.emplace_back(), CreateCudaBackend(*model, options));
    }
    return backends;
  }
  *why = absl::StrCat("auto: ", usable.message());
#else
  if (flags.backend == "cuda") {
    return absl::InvalidArgumentError(
        "--backend=cuda: this build has no CUDA backend; configure with -DMMFREE_CUDA=ON, or use "
        "--backend=cpu");
  }
  *why = "auto: built without CUDA";
#endif
  return MakeCpuBackends(model, flags);
}

absl::StatusOr<std::shared_ptr<const Model>> LoadModel(const ModelFlag& flag) {
  absl::Time last_line = absl::Now();
  const absl::Time start = last_line;
  absl::StatusOr<std::shared_ptr<const Model>> model =
      Model::Load(flag.directory, [&](int64_t done, int64_t total) {
        if (absl::Now() - last_line < absl::Seconds(2)) return;
        last_line = absl::Now();
        Log(LogLevel::kInfo, absl::StrFormat("model %s: %d %% read", flag.name,
                                             total > 0 ? 100 * done / total : 100));
      });
  if (model.ok()) {
    Log(LogLevel::kInfo,
        absl::StrFormat("model %s: %s, %.1f M parameters, %s form, loaded in %.2f s", flag.name,
                        flag.directory, static_cast<double>((*model)->parameters()) / 1e6,
                        (*model)->packed() ? "packed" : "published",
                        absl::ToDoubleSeconds(absl::Now() - start)));
  }
  return model;
}

absl::StatusOr<std::unique_ptr<Engine>> MakeEngine(const ModelFlag& flag, const ServerFlags& flags,
                                                   Metrics* metrics, PrefixCache* prefix_cache,
                                                   SessionMetrics* session_metrics) {
  MMFREE_ASSIGN_OR_RETURN(const std::shared_ptr<const Model> model, LoadModel(flag));
  MMFREE_ASSIGN_OR_RETURN(const std::shared_ptr<const Tokenizer> tokenizer,
                          Tokenizer::Load(flag.directory, model->config().vocab_size));
  std::string why;
  MMFREE_ASSIGN_OR_RETURN(Backends backends, MakeBackends(model, flags, &why));
  const BackendInfo& info = backends.front()->info();
  Log(LogLevel::kInfo,
      absl::StrCat(
          "model ", flag.name, ": backend ", info.name, " (", why, "), ",
          backends.size() > 1 ? absl::StrCat(backends.size(), " x ") : "", info.description,
          ", weights ", Megabytes(info.weight_bytes), ", ", info.num_slots, " slots of ",
          info.state_floats * static_cast<int64_t>(sizeof(float)) / 1024, " KiB state",
          info.resident_slots > 0 ? absl::StrCat(", ", info.resident_slots, " of idle sessions")
                                  : ""));
  Engine::Options options;
  options.model_name = flag.name;
  options.max_batch = flags.max_batch;
  options.max_queue = flags.max_queue;
  options.max_queue_tokens = flags.max_queue_tokens;
  options.prefill_chunk = flags.prefill_chunk;
  options.step_token_budget = flags.step_token_budget;
  options.stalled_reader_timeout = flags.stalled_reader_timeout;
  options.step_time_target = flags.step_time_target;
  options.max_stream_backlog = static_cast<size_t>(flags.max_stream_backlog);
  options.session_metrics = session_metrics;
  options.prefix_cache = prefix_cache;
  options.prefix_cache_interval = flags.prefix_cache_interval;
  std::vector<std::unique_ptr<Engine>> members;
  for (size_t i = 0; i < backends.size(); ++i) {
    if (backends.size() > 1) options.replica = absl::StrCat(i);
    MMFREE_ASSIGN_OR_RETURN(
        members.emplace_back(),
        Engine::Create(options, model, tokenizer, std::move(backends[i]), metrics));
  }
  return GroupEngines(std::move(members));
}

// The metrics of the GPUs, when an engine runs on them. Without them the server serves all the
// same.
std::vector<std::shared_ptr<prometheus::Collectable>> DeviceMetrics(
    const ServerFlags& flags, const std::vector<std::unique_ptr<Engine>>& engines) {
  std::vector<std::shared_ptr<prometheus::Collectable>> metrics;
#ifdef MMFREE_HAVE_CUDA
  const bool used = std::any_of(engines.begin(), engines.end(), [](const auto& engine) {
    return engine->backend_info().name == "cuda";
  });
  if (!used) return metrics;
  std::vector<GpuMetrics::Gpu> gpus;
  for (const int32_t device : flags.devices) {
    absl::StatusOr<std::unique_ptr<GpuMonitor>> opened = GpuMonitor::Open(device);
    if (!opened.ok()) {
      Log(LogLevel::kWarning,
          absl::StrCat("no metrics of GPU ", device, ": ", opened.status().message()));
      continue;
    }
    const std::shared_ptr<const GpuMonitor> monitor = *std::move(opened);
    gpus.push_back({absl::StrCat(device), monitor->name(), [monitor] { return monitor->Read(); }});
  }
  metrics.push_back(std::make_shared<GpuMetrics>(std::move(gpus)));
#else
  static_cast<void>(flags);
  static_cast<void>(engines);
#endif
  return metrics;
}

#ifdef MMFREE_HAVE_ROCKSDB
absl::StatusOr<std::unique_ptr<SessionStore>> MakeRocksDbStore(const std::string& directory,
                                                               bool salvage) {
  absl::StatusOr<std::unique_ptr<SessionStore>> store = OpenRocksDbStore({.directory = directory});
  if (!salvage || !absl::IsDataLoss(store.status())) return store;
  Log(LogLevel::kWarning, store.status().message());
  MMFREE_ASSIGN_OR_RETURN(const RocksDbSalvage salvaged, SalvageRocksDb(directory));
  Log(LogLevel::kWarning,
      absl::StrCat("--session_salvage: of ", salvaged.read, " sessions with changes in the log ",
                   salvaged.lost.size(), " are not as they were committed last",
                   salvaged.cut_off ? ", and changes are missing of sessions nobody can name" : "",
                   "; the log as it was, and their names in sessions.txt: ", salvaged.copy));
  return OpenRocksDbStore({.directory = directory});
}
#endif

absl::StatusOr<std::unique_ptr<SessionStore>> MakeSessionStore(const ServerFlags& flags) {
  absl::string_view where = flags.session_store;
  if (absl::ConsumePrefix(&where, "rocksdb:")) {
#ifdef MMFREE_HAVE_ROCKSDB
    return MakeRocksDbStore(std::string(where), flags.session_salvage);
#else
    return absl::InvalidArgumentError(
        "--session_store=rocksdb: this build has no RocksDB; install librocksdb-dev and build "
        "again");
#endif
  }
  if (absl::ConsumePrefix(&where, "redis://")) {
#ifdef MMFREE_HAVE_REDIS
    MMFREE_ASSIGN_OR_RETURN(const RedisStoreOptions options, ParseRedisAddress(where));
    return MakeRedisStore(options);
#else
    return absl::InvalidArgumentError(
        "--session_store=redis: this build has no Redis; install libhiredis-dev and build again");
#endif
  }
  return MakeMemoryStore({.max_bytes = flags.session_memory_mb << 20});
}

// Null when the server keeps no sessions.
absl::StatusOr<std::unique_ptr<SessionTable>> MakeSessions(const ServerFlags& flags,
                                                           SessionMetrics* metrics) {
  if (flags.session_store == "none") return nullptr;
  SessionTable::Options options;
  options.ttl = flags.session_ttl;
  options.store_health.interval = flags.session_probe_interval;
  options.kept_turns = flags.session_kept_turns;
  options.kept_bytes = flags.session_kept_mb << 20;
  options.host_cache_bytes = flags.session_memory_mb << 20;
  if (!flags.session_key_file.empty()) {
    MMFREE_ASSIGN_OR_RETURN(options.key, SessionKey::FromFile(flags.session_key_file));
  }
  MMFREE_ASSIGN_OR_RETURN(std::unique_ptr<SessionStore> store, MakeSessionStore(flags));
  const std::optional<int64_t> count = store->count();
  Log(LogLevel::kInfo,
      absl::StrCat("sessions: store ", flags.session_store, ", ",
                   count.has_value() ? absl::StrCat(*count) : "some", " sessions in it, ",
                   options.key.empty() ? "states are not signed" : "states are signed"));
  return std::make_unique<SessionTable>(std::move(options), std::move(store), metrics);
}

Server::Options ServerOptions(const ServerFlags& flags) {
  Server::Options options;
  options.listen = flags.listen;
  options.max_message_bytes = flags.max_message_bytes;
  options.tls = {flags.tls_cert, flags.tls_key, flags.tls_client_ca};
  options.limits.max_prompt_tokens = flags.max_prompt_tokens;
  options.limits.max_new_tokens = flags.max_new_tokens;
  options.limits.default_max_new_tokens = flags.default_max_new_tokens;
  options.limits.default_speculative_tokens = flags.speculative_tokens;
  options.limits.max_queue = flags.max_queue;
  return options;
}

// Makes way for the port file, whose existence says that the server is serving: one of an earlier
// run would lie. Only ever removes a regular file.
absl::Status ClearPortFile(const std::string& path) {
  namespace fs = std::filesystem;
  std::error_code error;
  const fs::file_type type = fs::status(path, error).type();
  if (type == fs::file_type::not_found) {
    const fs::path parent = fs::path(path).parent_path();
    if (parent.empty() || fs::is_directory(parent, error)) return absl::OkStatus();
    return absl::NotFoundError(
        absl::StrCat("--port_file: cannot write ", path, ": its directory does not exist"));
  }
  if (type != fs::file_type::regular) {
    return absl::InvalidArgumentError(
        absl::StrCat("--port_file: ", path, " is there already and not a regular file"));
  }
  if (fs::remove(path, error)) return absl::OkStatus();
  return absl::InternalError(
      absl::StrCat("--port_file: cannot replace ", path, ": ", error.message()));
}

// Appears whole or not at all.
absl::Status WritePortFile(const std::string& path, const std::string& content) {
  const std::string temporary = absl::StrCat(path, ".", getpid());
  std::ofstream file(temporary, std::ios::trunc);
  file << content;
  file.close();
  std::error_code error;
  if (file.good()) std::filesystem::rename(temporary, path, error);
  if (!file.good() || error) {
    std::filesystem::remove(temporary, error);
    return absl::InternalError(absl::StrCat("--port_file: cannot write ", path));
  }
  return absl::OkStatus();
}

absl::Status Serve(const ServerFlags& flags, SignalWaiter* signals) {
  if (!flags.port_file.empty()) MMFREE_RETURN_IF_ERROR(ClearPortFile(flags.port_file));
  // Again when the server starts; here so that a wrong file is found before the models are loaded.
  MMFREE_RETURN_IF_ERROR(MakeServerCredentials(ServerOptions(flags).tls).status());
  const auto registry = std::make_shared<prometheus::Registry>();
  const std::unique_ptr<Metrics> metrics = Metrics::Create(registry.get());
  const std::unique_ptr<SessionMetrics> session_metrics = SessionMetrics::Create(registry.get());
  MMFREE_ASSIGN_OR_RETURN(const std::unique_ptr<SessionTable> sessions,
                          MakeSessions(flags, session_metrics.get()));
  const std::unique_ptr<PrefixCacheMetrics> prefix_metrics =
      PrefixCacheMetrics::Create(registry.get());
  PrefixCache prefix_cache(flags.prefix_cache_mb << 20, prefix_metrics.get());
  std::vector<std::unique_ptr<Engine>> engines;
  ModelRegistry models;
  for (const ModelFlag& flag : flags.models) {
    absl::StatusOr<std::unique_ptr<Engine>> engine =
        MakeEngine(flag, flags, metrics.get(), flags.prefix_cache_mb > 0 ? &prefix_cache : nullptr,
                   session_metrics.get());
    if (!engine.ok()) {
      return absl::Status(engine.status().code(),
                          absl::StrCat("model ", flag.name, ": ", engine.status().message()));
    }
    if (sessions != nullptr) {
      for (const auto& pool : (*engine)->device_pools()) sessions->AddDevice(pool);
    }
    engines.push_back(*std::move(engine));
    MMFREE_RETURN_IF_ERROR(models.Add(engines.back().get()));
  }
  std::unique_ptr<MetricsExposer> exposer;
  if (!flags.metrics_listen.empty()) {
    MMFREE_ASSIGN_OR_RETURN(
        exposer, StartExposer(flags.metrics_listen, registry, DeviceMetrics(flags, engines)));
  }
  Server::Options server_options = ServerOptions(flags);
  server_options.sessions = sessions.get();
  MMFREE_ASSIGN_OR_RETURN(const std::unique_ptr<Server> server,
                          Server::Start(server_options, &models, metrics.get()));
  signals->StartServing();
  std::string ports = absl::StrCat("grpc=", server->port(), "\n");
  if (exposer != nullptr) absl::StrAppend(&ports, "metrics=", exposer->port(), "\n");
  if (!flags.port_file.empty()) {
    MMFREE_RETURN_IF_ERROR(WritePortFile(flags.port_file, ports));
  }
  Log(LogLevel::kInfo,
      absl::StrCat("serving ", flags.tls_cert.empty() ? "gRPC" : "gRPC over TLS", " on ",
                   flags.listen, ", port ", server->port(),
                   exposer == nullptr ? ""
                                      : absl::StrCat("; metrics on http://", flags.metrics_listen,
                                                     "/metrics, port ", exposer->port())));
  signals->Wait();
  server->Drain(absl::Now() + flags.drain_timeout);
  Log(LogLevel::kInfo, "drained");
  return absl::OkStatus();
}

int Main(const std::vector<std::string>& arguments) {
  const absl::StatusOr<ServerFlags> flags = ParseServerFlags(arguments);
  if (!flags.ok()) {
    std::cerr << "mmfree-server: " << flags.status().message() << "; --help says more\n";
    return kExitUsage;
  }
  if (flags->help) {
    std::cout << ServerHelp();
    return EXIT_SUCCESS;
  }
  if (flags->version) {
    std::cout << "mmfree-server " MMFREE_VERSION "\n";
    return EXIT_SUCCESS;
  }
  // Leaked: its thread waits for a second signal to the end.
  auto* const signals = new SignalWaiter;
  Log(LogLevel::kInfo, absl::StrCat("mmfree-server " MMFREE_VERSION " on ", CpuModelName()));
  const absl::Status status = Serve(*flags, signals);
  if (status.ok()) return EXIT_SUCCESS;
  Log(LogLevel::kError, status.message());
  return kExitFailure;
}

}  // namespace
}  // namespace mmfree

int main(int argc, char** argv) {
  return mmfree::Main(std::vector<std::string>(argv + 1, argv + argc));
}

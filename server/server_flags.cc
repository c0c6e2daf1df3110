#include "server/server_flags.h"

#include <array>
#include <cstring>
#include <limits>
#include <utility>

#include "absl/algorithm/container.h"
#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "server/base/flag_set.h"
#include "server/base/status_macros.h"
#include "server/rpc/listen_address.h"
#include "server/rpc/model_registry.h"

namespace mmfree {
namespace {

constexpr char kIntro[] =
    R"(mmfree-server: serves MatMul-free language models over gRPC.

  mmfree-server --model=[NAME=]DIR [flags]

Examples:
  mmfree-server --model=deploy/models/tales
      the demo model on 0.0.0.0:50051, metrics on http://HOST:9090/metrics
  mmfree-server --model=big=/models/2.7b --model=small=/models/370m --listen=127.0.0.1:0 \
      --port_file=ports
      two models; picks free ports and writes them to the file `ports` once serving
  mmfree-server --model=/models/2.7b --tls_cert=server.pem --tls_key=server.key
      with TLS

SIGTERM and SIGINT drain: health becomes NOT_SERVING, new requests get UNAVAILABLE, running ones
finish. A second signal stops at once.
Exit status: 0 stopped as asked; 1 failed; 2 wrong command line.

)";

// Flags of the design that this version does not have: refused, so that nobody relies on them.
struct LaterFlags {
  static constexpr std::array<const char*, 2> kNames = {"auth_tokens_file", "model_root"};
  std::array<std::string, kNames.size()> values;
};

constexpr int32_t kMaxInt32 = std::numeric_limits<int32_t>::max();

void AddFlags(ServerFlags* flags, std::vector<std::string>* models, std::string* devices,
              FlagSet* set) {
  set->AddHeading("Models and addresses:");
  set->Add("model", models, "[NAME=]DIR",
           "model directory, published or packed; repeat for more.\n"
           "NAME defaults to the directory's name");
  set->Add("listen", &flags->listen, "HOST:PORT",
           "gRPC address (default 0.0.0.0:50051); port 0 picks a free one");
  set->Add("metrics_listen", &flags->metrics_listen, "HOST:PORT",
           "Prometheus address (default 0.0.0.0:9090); empty: none");
  set->Add("port_file", &flags->port_file, "FILE",
           "receives the lines grpc=PORT and metrics=PORT once serving");
  set->Add("tls_cert", &flags->tls_cert, "FILE", "PEM certificate chain: serve TLS");
  set->Add("tls_key", &flags->tls_key, "FILE", "PEM private key of the certificate");
  set->Add("tls_client_ca", &flags->tls_client_ca, "FILE",
           "PEM certificates; clients must show one signed by them");

  set->AddHeading("Backend:");
  set->Add("backend", &flags->backend, "NAME",
           "auto (CUDA when there is a usable GPU), cpu or cuda");
  set->Add("cpu_isa", &flags->cpu_isa, "NAME",
           "auto (the best there is), scalar, avx2, avx_vnni, avx512,\navx512_gfni or amx; same "
           "results");
  set->AddInteger(
      "threads", &flags->threads, 0, 1024, "N",
      "CPU threads of a step (default 0: one a physical core); fewer\nwhere other programs keep "
      "cores busy");
  set->Add("pin_threads", &flags->pin_threads, "", "bind each CPU thread to a core");
  set->Add("numa", &flags->numa, "",
           "on several NUMA nodes, keep each CPU thread to one of them and\ncopy its weights there "
           "(default true)");
  set->Add("devices", devices, "N,N,...",
           "GPUs to use (default 0); each holds the model and its own\n--max_sessions states");

  set->AddHeading("Scheduling:");
  set->AddInteger("max_sessions", &flags->max_sessions, 1, 1 << 20, "N",
                  "state slots: requests that run at once (default 256)");
  set->AddInteger("max_batch", &flags->max_batch, 0, 1 << 20, "N",
                  "rows of one step (default 0: all slots)");
  set->AddInteger("max_queue", &flags->max_queue, 0, 1 << 24, "N",
                  "requests that wait for a slot (default 1024); more get\nRESOURCE_EXHAUSTED");
  set->AddInteger<int64_t>("max_queue_tokens", &flags->max_queue_tokens, 1, int64_t{1} << 40, "N",
                           "prompt tokens that wait (default 4000000)");
  set->AddInteger("prefill_chunk", &flags->prefill_chunk, 1, 1 << 20, "N",
                  "prompt tokens of one request in one step (default 256)");
  set->AddInteger("step_token_budget", &flags->step_token_budget, 1, 1 << 20, "N",
                  "tokens of one step over all rows (default 1024)");
  set->AddInteger("max_stream_backlog", &flags->max_stream_backlog, 1, 1 << 20, "N",
                  "tokens a client may lag behind before its row waits\n(default 256)");

  set->Add(
      "stalled_reader_timeout", &flags->stalled_reader_timeout, "TIME",
      "a request whose client takes nothing for so long after its\nrow was paused is cancelled "
      "(default 60s)");
  set->Add("step_time_target", &flags->step_time_target, "TIME",
           "prompts make a step with decoding rows at most so long, or\ntwice as long as without "
           "prompts (default 50ms)");

  set->AddHeading("Prefix cache:");
  set->AddInteger<int64_t>("prefix_cache_mb", &flags->prefix_cache_mb, 0, 1 << 20, "N",
                           "MiB of memory for states after the beginnings of prompts\n(default "
                           "256): those that begin alike are fed once; 0: off");
  set->AddInteger("prefix_cache_interval", &flags->prefix_cache_interval, 0, 1 << 30, "N",
                  "keep a state after each so many tokens of a prompt (default\n256; 0: no), "
                  "besides those at its end and where prompts part");

  set->AddHeading("Sessions:");
  set->Add("session_store", &flags->session_store, "STORE",
           "where sessions are kept: memory (the default; they end with\nthe process), "
           "rocksdb:DIR (they survive it),\nredis://HOST:PORT (replicas share them), none");
  set->Add(
      "session_salvage", &flags->session_salvage, "",
      "rocksdb: when its log is damaged, keep a copy of it, open what\ncan be read, and list the "
      "sessions that are not as they were\ncommitted last");
  set->Add("session_key_file", &flags->session_key_file, "FILE",
           "key of at least 32 bytes: states are signed with it, and only\nthose are taken");
  set->Add("session_ttl", &flags->session_ttl, "TIME",
           "delete a session that was not used for this long (default:\nnever)");
  set->Add("session_probe_interval", &flags->session_probe_interval, "TIME",
           "write a small record to a session store that nothing was\nwritten to for so long, and "
           "read it (default 10s; inf: never),\nto know whether it can be used");
  set->AddInteger("session_kept_turns", &flags->session_kept_turns, 0, 10'000, "N",
                  "turns before the present one that a session can be rewound\nto (default 4)");
  set->AddInteger<int64_t>("session_kept_mb", &flags->session_kept_mb, 0, 1 << 20, "N",
                           "MiB that the states of one session's turns may take (default\n8); the "
                           "present one is always kept");
  set->AddInteger<int64_t>("session_memory_mb", &flags->session_memory_mb, 0, 1 << 30, "N",
                           "MiB of memory for sessions (default 1024): of all of them\nwith the "
                           "memory store, where more are refused; otherwise of\nthe most recently "
                           "used states");
  set->AddInteger<int64_t>("session_device_mb", &flags->session_device_mb, 0, 1 << 20, "N",
                           "MiB of each GPU for the most recently used states of sessions\nof each "
                           "model (default 1024; 0: none)");

  set->AddHeading("Limits:");
  set->AddInteger<int64_t>("max_prompt_tokens", &flags->max_prompt_tokens, 1, kMaxInt32, "N",
                           "tokens of one input (default 1000000)");
  set->AddInteger<int64_t>("max_new_tokens", &flags->max_new_tokens, 0,
                           std::numeric_limits<uint32_t>::max(), "N",
                           "largest max_new_tokens (default 65536)");
  set->AddInteger<int64_t>("default_max_new_tokens", &flags->default_max_new_tokens, 0,
                           std::numeric_limits<uint32_t>::max(), "N",
                           "max_new_tokens of requests that do not say (default 256)");
  set->AddInteger<uint32_t>("speculative_tokens", &flags->speculative_tokens, 0, 16, "K",
                            "speculative_tokens of requests that do not say: tokens to propose\n"
                            "and verify in one step (default 0)");
  set->AddInteger<int64_t>("max_message_bytes", &flags->max_message_bytes, 1, kMaxInt32, "N",
                           "bytes of one request (default 33554432)");
  set->Add("drain_timeout", &flags->drain_timeout, "TIME",
           "what running requests get to finish after SIGTERM (default 30s)");

  set->AddHeading("Other:");
  set->Add("version", &flags->version, "", "print the version and exit");
}

absl::StatusOr<ModelFlag> ParseModel(absl::string_view value) {
  ModelFlag model;
  const size_t equals = value.find('=');
  if (equals != absl::string_view::npos) {
    model.name = std::string(value.substr(0, equals));
    model.directory = std::string(value.substr(equals + 1));
  } else {
    model.directory = std::string(value);
    absl::string_view path = value;
    while (path.size() > 1 && absl::ConsumeSuffix(&path, "/")) {
    }
    const size_t slash = path.rfind('/');
    model.name = std::string(slash == absl::string_view::npos ? path : path.substr(slash + 1));
  }
  if (model.name.empty() || model.directory.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("--model=", value,
                     ": expected DIR or NAME=DIR, such as --model=tales=deploy/models/tales"));
  }
  return model;
}

absl::StatusOr<std::vector<int32_t>> ParseDevices(absl::string_view value) {
  constexpr int32_t kMaxDevice = 1023;
  std::vector<int32_t> devices;
  for (const absl::string_view text : absl::StrSplit(value, ',')) {
    int32_t device = -1;
    if (!absl::SimpleAtoi(text, &device) || device < 0 || device > kMaxDevice ||
        absl::c_linear_search(devices, device)) {
      return absl::InvalidArgumentError(
          absl::StrCat("--devices=", value,
                       ": expected different numbers from 0 to 1023, such as --devices=0,1"));
    }
    devices.push_back(device);
  }
  return devices;
}

absl::Status CheckOneOf(absl::string_view flag, absl::string_view value,
                        const std::vector<absl::string_view>& choices) {
  if (absl::c_linear_search(choices, value)) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("--", flag, "=", value, ": expected one of ", absl::StrJoin(choices, ", ")));
}

absl::Status CheckAddress(absl::string_view flag, const std::string& value) {
  const absl::Status status = ParseListenAddress(value).status();
  if (status.ok()) return status;
  return absl::InvalidArgumentError(absl::StrCat("--", flag, ": ", status.message()));
}

absl::Status CheckModels(const std::vector<ModelFlag>& models) {
  absl::flat_hash_set<absl::string_view> names;
  for (const ModelFlag& model : models) {
    if (!IsResourceName(model.name)) {
      return absl::InvalidArgumentError(absl::StrCat(
          "--model: the name \"", model.name,
          "\" is not 1 to 128 letters, digits, '.', '_' or '-'; give one with --model=NAME=DIR"));
    }
    if (!names.insert(model.name).second) {
      return absl::InvalidArgumentError(absl::StrCat("--model: two models are named \"", model.name,
                                                     "\"; name them with --model=NAME=DIR"));
    }
  }
  return absl::OkStatus();
}

// What can be known to be wrong before a model was loaded, which can take minutes.
absl::Status CheckSessions(const ServerFlags& flags) {
  const std::string& store = flags.session_store;
  if (store != "memory" && store != "none" &&
      !(absl::StartsWith(store, "rocksdb:") && store.size() > strlen("rocksdb:")) &&
      !absl::StartsWith(store, "redis://")) {
    return absl::InvalidArgumentError(absl::StrCat(
        "--session_store=", store, ": expected memory, rocksdb:DIR, redis://HOST:PORT or none"));
  }
  if (flags.session_salvage && !absl::StartsWith(store, "rocksdb:")) {
    return absl::InvalidArgumentError("--session_salvage needs --session_store=rocksdb:DIR");
  }
  if (flags.session_ttl <= absl::ZeroDuration()) {
    return absl::InvalidArgumentError("--session_ttl must be positive");
  }
  if (flags.session_probe_interval <= absl::ZeroDuration()) {
    return absl::InvalidArgumentError("--session_probe_interval must be positive");
  }
  return absl::OkStatus();
}

absl::Status CheckTogether(const ServerFlags& flags) {
  MMFREE_RETURN_IF_ERROR(CheckModels(flags.models));
  MMFREE_RETURN_IF_ERROR(CheckOneOf("backend", flags.backend, {"auto", "cpu", "cuda"}));
  MMFREE_RETURN_IF_ERROR(
      CheckOneOf("cpu_isa", flags.cpu_isa,
                 {"auto", "scalar", "avx2", "avx_vnni", "avx512", "avx512_gfni", "amx"}));
  MMFREE_RETURN_IF_ERROR(CheckAddress("listen", flags.listen));
  if (!flags.metrics_listen.empty()) {
    MMFREE_RETURN_IF_ERROR(CheckAddress("metrics_listen", flags.metrics_listen));
  }
  if (flags.tls_cert.empty() != flags.tls_key.empty()) {
    return absl::InvalidArgumentError("TLS needs both --tls_cert and --tls_key");
  }
  if (!flags.tls_client_ca.empty() && flags.tls_cert.empty()) {
    return absl::InvalidArgumentError("--tls_client_ca needs --tls_cert and --tls_key");
  }
  if (flags.default_max_new_tokens > flags.max_new_tokens) {
    return absl::InvalidArgumentError(
        absl::StrCat("--default_max_new_tokens=", flags.default_max_new_tokens,
                     " is more than --max_new_tokens=", flags.max_new_tokens, "; lower it"));
  }
  if (flags.stalled_reader_timeout <= absl::ZeroDuration()) {
    return absl::InvalidArgumentError("--stalled_reader_timeout must be positive");
  }
  if (flags.step_time_target <= absl::ZeroDuration()) {
    return absl::InvalidArgumentError("--step_time_target must be positive");
  }
  MMFREE_RETURN_IF_ERROR(CheckSessions(flags));
  if (flags.drain_timeout < absl::ZeroDuration()) {
    return absl::InvalidArgumentError("--drain_timeout must not be negative");
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<ServerFlags> ParseServerFlags(const std::vector<std::string>& arguments) {
  ServerFlags flags;
  std::vector<std::string> models;
  std::string devices = "0";
  LaterFlags later;
  FlagSet set;
  AddFlags(&flags, &models, &devices, &set);
  for (size_t i = 0; i < later.values.size(); ++i) {
    set.Add(LaterFlags::kNames[i], &later.values[i], "VALUE", "");
  }
  MMFREE_ASSIGN_OR_RETURN(const std::vector<std::string> rest, set.Parse(arguments));
  flags.help = set.help_requested();
  if (flags.help || flags.version) return flags;
  if (!rest.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("unexpected argument \"", rest.front(),
                                                   "\"; a model is given with --model=DIR"));
  }
  for (size_t i = 0; i < later.values.size(); ++i) {
    if (later.values[i].empty()) continue;
    return absl::UnimplementedError(
        absl::StrCat("--", LaterFlags::kNames[i], " is not implemented by this version"));
  }
  if (models.empty()) {
    return absl::InvalidArgumentError(
        "no model: give at least one, such as --model=deploy/models/tales");
  }
  for (const std::string& value : models) {
    MMFREE_ASSIGN_OR_RETURN(ModelFlag model, ParseModel(value));
    flags.models.push_back(std::move(model));
  }
  MMFREE_ASSIGN_OR_RETURN(flags.devices, ParseDevices(devices));
  MMFREE_RETURN_IF_ERROR(CheckTogether(flags));
  return flags;
}

std::string ServerHelp() {
  ServerFlags flags;
  std::vector<std::string> models;
  std::string devices = "0";
  FlagSet set;
  AddFlags(&flags, &models, &devices, &set);
  return absl::StrCat(kIntro, set.Help());
}

}  // namespace mmfree

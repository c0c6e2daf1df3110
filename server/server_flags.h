// The command line of mmfree-server.
#ifndef MMFREE_SERVER_SERVER_FLAGS_H_
#define MMFREE_SERVER_SERVER_FLAGS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace mmfree {

struct ModelFlag {
  std::string name;
  std::string directory;
};

struct ServerFlags {
  bool help = false;
  bool version = false;

  std::vector<ModelFlag> models;
  std::string listen = "0.0.0.0:50051";
  std::string metrics_listen = "0.0.0.0:9090";  // empty: no endpoint
  std::string port_file;
  std::string tls_cert;
  std::string tls_key;
  std::string tls_client_ca;

  std::string backend = "auto";
  std::string cpu_isa = "auto";
  int32_t threads = 0;
  bool pin_threads = false;
  bool numa = true;
  std::vector<int32_t> devices = {0};

  int32_t max_sessions = 256;
  int32_t max_batch = 0;
  int32_t max_queue = 1024;
  int64_t max_queue_tokens = 4'000'000;
  int32_t prefill_chunk = 256;
  int32_t step_token_budget = 1024;
  int32_t max_stream_backlog = 256;
  absl::Duration stalled_reader_timeout = absl::Seconds(60);
  absl::Duration step_time_target = absl::Milliseconds(50);

  int64_t prefix_cache_mb = 256;
  int32_t prefix_cache_interval = 256;

  std::string session_store = "memory";
  std::string session_key_file;
  absl::Duration session_ttl = absl::InfiniteDuration();
  int32_t session_kept_turns = 4;
  int64_t session_kept_mb = 8;
  bool session_salvage = false;
  absl::Duration session_probe_interval = absl::Seconds(10);
  int64_t session_memory_mb = 1024;
  int64_t session_device_mb = 1024;

  int64_t max_prompt_tokens = 1'000'000;
  int64_t max_new_tokens = 65'536;
  int64_t default_max_new_tokens = 256;
  uint32_t speculative_tokens = 0;
  int64_t max_message_bytes = 32ll << 20;
  absl::Duration drain_timeout = absl::Seconds(30);
};

// `arguments` without the program's name. INVALID_ARGUMENT says what to do; UNIMPLEMENTED names a
// flag of a later version.
absl::StatusOr<ServerFlags> ParseServerFlags(const std::vector<std::string>& arguments);

// What --help prints.
std::string ServerHelp();

}  // namespace mmfree

#endif  // MMFREE_SERVER_SERVER_FLAGS_H_

// The sizes and constants of a model, read from config.json and validated.
#ifndef MMFREE_SERVER_MODEL_CONFIG_H_
#define MMFREE_SERVER_MODEL_CONFIG_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace mmfree {

struct ModelConfig {
  int64_t vocab_size = 0;         // V
  int64_t hidden_size = 0;        // D
  int64_t intermediate_size = 0;  // F
  int64_t num_layers = 0;         // L
  float rms_norm_eps = 1e-6f;
  bool use_lower_bound = true;
  int32_t bos_token_id = 1;
  int32_t eos_token_id = 2;

  // Floats of one session's recurrent state.
  int64_t state_floats() const { return num_layers * hidden_size; }

  // Parses the text of a config.json. `source` names it in errors. INVALID_ARGUMENT names the key
  // and what was expected; UNIMPLEMENTED names a value of the reference that is not supported
  // (use_short_conv, hidden_act other than swish, expand_ratio or num_heads other than 1, tied
  // embeddings, ...).
  static absl::StatusOr<ModelConfig> FromJson(absl::string_view text, absl::string_view source);

  // A config.json that FromJson reads back as this.
  std::string ToJson() const;

  // INVALID_ARGUMENT unless every size is in its range (documented in config.cc).
  absl::Status Validate(absl::string_view source) const;

  friend bool operator==(const ModelConfig&, const ModelConfig&) = default;
};

// Sizes of a named shape: "tales" (the demo model), and the published "370m", "1.3b", "2.7b" and
// "13b". INVALID_ARGUMENT lists the names.
absl::StatusOr<ModelConfig> ConfigForShape(absl::string_view shape);

}  // namespace mmfree

#endif  // MMFREE_SERVER_MODEL_CONFIG_H_

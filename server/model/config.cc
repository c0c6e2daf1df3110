#include "server/model/config.h"

#include <cmath>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"
#include "server/base/status_macros.h"
#include "server/model/json.h"

namespace mmfree {
namespace {

using nlohmann::json;

// A product of K terms of at most 128 each stays an exact binary32 integer up to K = 2^17.
constexpr int64_t kMaxProductLength = 131072;
constexpr int64_t kMaxHidden = 65536;
constexpr int64_t kMaxLayers = 1024;
constexpr int64_t kMaxVocab = 1 << 24;
// The norms inside the reference's linear layers use this value whatever rms_norm_eps says.
constexpr float kReferenceEps = 1e-6f;

std::string Shown(const json& value) {
  std::string text = value.dump(-1, ' ', true, json::error_handler_t::replace);
  if (text.size() > 80) text = absl::StrCat(text.substr(0, 77), "...");
  return text;
}

// Typed reads from one config.json; absent and null both mean the default.
class Reader {
 public:
  Reader(const json& root, absl::string_view source) : root_(root), source_(source) {}

  absl::Status Wrong(absl::string_view key, absl::string_view expected, const json& got) const {
    return absl::InvalidArgumentError(
        absl::StrCat(source_, ": ", key, ": expected ", expected, ", got ", Shown(got)));
  }
  absl::Status Missing(absl::string_view key) const {
    return absl::InvalidArgumentError(absl::StrCat(source_, ": ", key, " is missing"));
  }
  absl::Status Unsupported(absl::string_view key, absl::string_view supported,
                           const json& got) const {
    return absl::UnimplementedError(
        absl::StrCat(source_, ": ", key, " ", Shown(got), " is not supported, only ", supported));
  }

  const json* Find(absl::string_view key) const {
    const auto it = root_.find(std::string(key));
    return it == root_.end() || it->is_null() ? nullptr : &*it;
  }

  absl::StatusOr<int64_t> Size(absl::string_view key) const {
    const json* value = Find(key);
    if (value == nullptr) return Missing(key);
    int64_t number = 0;
    if (!AsInteger(*value, &number)) return Wrong(key, "an integer", *value);
    return number;
  }

  absl::StatusOr<int32_t> TokenId(absl::string_view key, int32_t fallback) const {
    const json* value = Find(key);
    if (value == nullptr) return fallback;
    if (value->is_array()) return Unsupported(key, "a single id", *value);
    int64_t number = 0;
    if (!AsInteger(*value, &number) || number < 0 || number > std::numeric_limits<int32_t>::max()) {
      return Wrong(key, "a token id", *value);
    }
    return static_cast<int32_t>(number);
  }

  absl::StatusOr<bool> Bool(absl::string_view key, bool fallback) const {
    const json* value = Find(key);
    if (value == nullptr) return fallback;
    if (!value->is_boolean()) return Wrong(key, "true or false", *value);
    return value->get<bool>();
  }

  absl::StatusOr<double> Number(absl::string_view key, double fallback) const {
    const json* value = Find(key);
    if (value == nullptr) return fallback;
    if (!value->is_number()) return Wrong(key, "a number", *value);
    return value->get<double>();
  }

  // Fails with UNIMPLEMENTED unless the key is absent or equals `supported`.
  absl::Status Only(absl::string_view key, const json& supported) const {
    const json* value = Find(key);
    if (value == nullptr || *value == supported) return absl::OkStatus();
    if (value->type() != supported.type() && !(value->is_number() && supported.is_number())) {
      return Wrong(key, absl::StrCat("a ", supported.type_name()), *value);
    }
    return Unsupported(key, Shown(supported), *value);
  }

 private:
  static bool AsInteger(const json& value, int64_t* out) {
    if (!value.is_number_integer()) return false;
    if (value.is_number_unsigned() &&
        value.get<uint64_t>() > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
      return false;
    }
    *out = value.get<int64_t>();
    return true;
  }

  const json& root_;
  absl::string_view source_;
};

// The reference's rule when intermediate_size is null:
// 256 * ceil(int(hidden_size * hidden_ratio * 2 / 3) / 256).
absl::StatusOr<int64_t> IntermediateSize(const Reader& reader, int64_t hidden_size) {
  if (reader.Find("intermediate_size") != nullptr) return reader.Size("intermediate_size");
  MMFREE_ASSIGN_OR_RETURN(const double ratio, reader.Number("hidden_ratio", 4.0));
  const double size = static_cast<double>(hidden_size) * ratio * 2.0 / 3.0;
  if (!(size >= 1.0 && size <= static_cast<double>(kMaxProductLength))) {
    return reader.Wrong("hidden_ratio", "a ratio that gives an intermediate size in [1, 131072]",
                        json(ratio));
  }
  return (static_cast<int64_t>(size) + 255) / 256 * 256;
}

absl::Status InRange(absl::string_view source, absl::string_view key, int64_t value, int64_t low,
                     int64_t high) {
  if (value >= low && value <= high) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(source, ": ", key, ": expected a value in [", low,
                                                 ", ", high, "], got ", value));
}

}  // namespace

absl::StatusOr<ModelConfig> ModelConfig::FromJson(absl::string_view text,
                                                  absl::string_view source) {
  MMFREE_ASSIGN_OR_RETURN(const json root, ParseJsonObject(text, source, JsonLimits()));
  const Reader reader(root, source);

  const json* type = reader.Find("model_type");
  if (type == nullptr) return reader.Missing("model_type");
  if (*type != "hgrn_bit") return reader.Wrong("model_type", "\"hgrn_bit\"", *type);

  MMFREE_RETURN_IF_ERROR(reader.Only("use_short_conv", false));
  MMFREE_RETURN_IF_ERROR(reader.Only("hidden_act", "swish"));
  MMFREE_RETURN_IF_ERROR(reader.Only("expand_ratio", 1));
  MMFREE_RETURN_IF_ERROR(reader.Only("num_heads", 1));
  MMFREE_RETURN_IF_ERROR(reader.Only("tie_word_embeddings", false));
  if (const json* value = reader.Find("quantization_config"); value != nullptr) {
    return reader.Unsupported("quantization_config", "null", *value);
  }
  // Two algorithms for the same recurrence.
  if (const json* mode = reader.Find("attn_mode");
      mode != nullptr && *mode != "fused_recurrent" && *mode != "chunk") {
    return reader.Unsupported("attn_mode", "\"fused_recurrent\" or \"chunk\"", *mode);
  }

  ModelConfig config;
  MMFREE_ASSIGN_OR_RETURN(config.vocab_size, reader.Size("vocab_size"));
  MMFREE_ASSIGN_OR_RETURN(config.hidden_size, reader.Size("hidden_size"));
  MMFREE_ASSIGN_OR_RETURN(config.num_layers, reader.Size("num_hidden_layers"));
  MMFREE_RETURN_IF_ERROR(InRange(source, "hidden_size", config.hidden_size, 1, kMaxHidden));
  MMFREE_ASSIGN_OR_RETURN(config.intermediate_size, IntermediateSize(reader, config.hidden_size));
  MMFREE_ASSIGN_OR_RETURN(const double eps, reader.Number("rms_norm_eps", kReferenceEps));
  config.rms_norm_eps = static_cast<float>(eps);
  if (config.rms_norm_eps != kReferenceEps) {
    return reader.Unsupported("rms_norm_eps", "1e-06", json(eps));
  }
  MMFREE_ASSIGN_OR_RETURN(config.use_lower_bound, reader.Bool("use_lower_bound", true));
  MMFREE_ASSIGN_OR_RETURN(config.bos_token_id, reader.TokenId("bos_token_id", 1));
  MMFREE_ASSIGN_OR_RETURN(config.eos_token_id, reader.TokenId("eos_token_id", 2));
  MMFREE_RETURN_IF_ERROR(config.Validate(source));
  return config;
}

std::string ModelConfig::ToJson() const {
  const nlohmann::ordered_json config = {
      {"model_type", "hgrn_bit"},
      {"vocab_size", vocab_size},
      {"hidden_size", hidden_size},
      {"intermediate_size", intermediate_size},
      {"num_hidden_layers", num_layers},
      {"num_heads", 1},
      {"expand_ratio", 1},
      {"use_short_conv", false},
      {"use_lower_bound", use_lower_bound},
      {"hidden_act", "swish"},
      {"rms_norm_eps", static_cast<double>(rms_norm_eps)},
      {"tie_word_embeddings", false},
      {"bos_token_id", bos_token_id},
      {"eos_token_id", eos_token_id},
  };
  return config.dump(1) + "\n";
}

// Ranges: vocab_size [1, 2^24], hidden_size [1, 65536], intermediate_size [1, 131072],
// num_hidden_layers [1, 1024], token ids [0, vocab_size), rms_norm_eps (0, 1].
absl::Status ModelConfig::Validate(absl::string_view source) const {
  MMFREE_RETURN_IF_ERROR(InRange(source, "vocab_size", vocab_size, 1, kMaxVocab));
  MMFREE_RETURN_IF_ERROR(InRange(source, "hidden_size", hidden_size, 1, kMaxHidden));
  MMFREE_RETURN_IF_ERROR(
      InRange(source, "intermediate_size", intermediate_size, 1, kMaxProductLength));
  MMFREE_RETURN_IF_ERROR(InRange(source, "num_hidden_layers", num_layers, 1, kMaxLayers));
  MMFREE_RETURN_IF_ERROR(InRange(source, "bos_token_id", bos_token_id, 0, vocab_size - 1));
  MMFREE_RETURN_IF_ERROR(InRange(source, "eos_token_id", eos_token_id, 0, vocab_size - 1));
  if (!(rms_norm_eps > 0.0f && rms_norm_eps <= 1.0f)) {
    return absl::InvalidArgumentError(
        absl::StrCat(source, ": rms_norm_eps: expected a value in (0, 1], got ", rms_norm_eps));
  }
  return absl::OkStatus();
}

absl::StatusOr<ModelConfig> ConfigForShape(absl::string_view shape) {
  struct Named {
    absl::string_view name;
    int64_t vocab, hidden, layers, intermediate;
  };
  static constexpr Named kShapes[] = {
      {"tales", 4096, 512, 6, 1536},   {"370m", 32000, 1024, 24, 2816},
      {"1.3b", 32000, 2048, 24, 5632}, {"2.7b", 32000, 2560, 32, 6912},
      {"13b", 32000, 5120, 40, 13824},
  };
  for (const Named& named : kShapes) {
    if (named.name != shape) continue;
    ModelConfig config;
    config.vocab_size = named.vocab;
    config.hidden_size = named.hidden;
    config.num_layers = named.layers;
    config.intermediate_size = named.intermediate;
    return config;
  }
  return absl::InvalidArgumentError(
      absl::StrCat("unknown shape \"", shape, "\", expected tales, 370m, 1.3b, 2.7b or 13b"));
}

}  // namespace mmfree

#include "server/tokenizer/tokenizer_config.h"

#include <nlohmann/json.hpp>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "server/base/status_macros.h"

namespace mmfree {
namespace {

using Json = nlohmann::json;

absl::Status WrongType(absl::string_view key, absl::string_view expected, const Json& value) {
  return absl::InvalidArgumentError(
      absl::StrCat(key, " must be ", expected, ", but is ", value.type_name()));
}

// Absent and null are the same: `default_value`.
absl::StatusOr<bool> GetBool(const Json& object, const char* key, bool default_value) {
  const auto it = object.find(key);
  if (it == object.end() || it->is_null()) return default_value;
  if (!it->is_boolean()) return WrongType(key, "true or false", *it);
  return it->get<bool>();
}

absl::StatusOr<std::string> GetString(const Json& object, const char* key) {
  const auto it = object.find(key);
  if (it == object.end() || it->is_null()) return std::string();
  if (!it->is_string()) return WrongType(key, "a string", *it);
  return it->get<std::string>();
}

// A special token is its piece, or an object that has the piece as "content".
absl::StatusOr<std::string> GetToken(const Json& object, const char* key) {
  const auto it = object.find(key);
  if (it != object.end() && it->is_object()) {
    const auto content = it->find("content");
    if (content == it->end() || !content->is_string()) {
      return absl::InvalidArgumentError(absl::StrCat(key, ".content must be a string"));
    }
    return content->get<std::string>();
  }
  return GetString(object, key);
}

}  // namespace

absl::StatusOr<TokenizerConfig> TokenizerConfig::FromJson(absl::string_view json) {
  const Json object =
      Json::parse(json.begin(), json.end(), /*cb=*/nullptr, /*allow_exceptions=*/false);
  if (object.is_discarded()) return absl::InvalidArgumentError("not valid JSON");
  if (!object.is_object()) return absl::InvalidArgumentError("not a JSON object");

  TokenizerConfig config;
  MMFREE_ASSIGN_OR_RETURN(config.add_bos_token, GetBool(object, "add_bos_token", true));
  MMFREE_ASSIGN_OR_RETURN(config.bos_token, GetToken(object, "bos_token"));
  MMFREE_ASSIGN_OR_RETURN(config.eos_token, GetToken(object, "eos_token"));

  MMFREE_ASSIGN_OR_RETURN(const bool add_eos_token, GetBool(object, "add_eos_token", false));
  if (add_eos_token) {
    return absl::UnimplementedError(
        "add_eos_token = true: a prompt that ends in EOS is not text to continue");
  }
  MMFREE_ASSIGN_OR_RETURN(const bool add_prefix_space, GetBool(object, "add_prefix_space", true));
  if (!add_prefix_space)
    return absl::UnimplementedError("add_prefix_space = false is not supported");
  MMFREE_ASSIGN_OR_RETURN(const std::string tokenizer_class, GetString(object, "tokenizer_class"));
  if (!tokenizer_class.empty() && tokenizer_class != "LlamaTokenizer" &&
      tokenizer_class != "LlamaTokenizerFast") {
    return absl::UnimplementedError(absl::StrCat("tokenizer_class \"", tokenizer_class,
                                                 "\" is not supported, only LlamaTokenizer"));
  }
  return config;
}

}  // namespace mmfree

// tokenizer_config.json of a model directory, as far as it matters to SentencePiece tokenizers.
#ifndef MMFREE_SERVER_TOKENIZER_TOKENIZER_CONFIG_H_
#define MMFREE_SERVER_TOKENIZER_TOKENIZER_CONFIG_H_

#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace mmfree {

struct TokenizerConfig {
  bool add_bos_token = true;
  // Piece names; empty when the file does not say.
  std::string bos_token;
  std::string eos_token;

  // INVALID_ARGUMENT names the key whose type is wrong; UNIMPLEMENTED names a setting under which
  // Llama's tokenizer would encode differently from ours (add_eos_token, add_prefix_space=false,
  // another tokenizer_class). Keys that do not change the encoding are not looked at.
  static absl::StatusOr<TokenizerConfig> FromJson(absl::string_view json);
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_TOKENIZER_TOKENIZER_CONFIG_H_

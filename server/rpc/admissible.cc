#include "server/rpc/admissible.h"

#include "absl/strings/str_cat.h"
#include "server/base/status_macros.h"
#include "server/rpc/status.h"

namespace mmfree {

absl::Status CheckAdmissible(const Engine& engine, absl::string_view field, int64_t count) {
  const int64_t most = engine.limits().requests;
  if (count <= most) return absl::OkStatus();
  return InvalidField(field, absl::StrCat("makes ", count, " requests to the model, which admits ",
                                          most, " at a time at most: its slots and --max_queue"));
}

absl::Status CheckPromptAdmissible(const Engine& engine, absl::string_view field, int64_t tokens) {
  const int64_t most = engine.limits().prompt_tokens;
  if (tokens <= most) return absl::OkStatus();
  return InvalidField(field, absl::StrCat("has ", tokens, " tokens, more than the ", most,
                                          " that may ever wait (--max_queue_tokens)"));
}

absl::Status CheckPromptsAdmissible(const Engine& engine, absl::string_view field,
                                    absl::Span<const ScoreRequest> prompts) {
  MMFREE_RETURN_IF_ERROR(CheckAdmissible(engine, field, static_cast<int64_t>(prompts.size())));
  int64_t sum = 0;
  for (size_t i = 0; i < prompts.size(); ++i) {
    const int64_t tokens = static_cast<int64_t>(prompts[i].tokens.size());
    MMFREE_RETURN_IF_ERROR(CheckPromptAdmissible(engine, absl::StrCat(field, "[", i, "]"), tokens));
    sum += tokens;
  }
  const int64_t most = engine.limits().queue_tokens;
  if (sum <= most) return absl::OkStatus();
  return InvalidField(field, absl::StrCat("have ", sum, " tokens together, more than the ", most,
                                          " that may ever wait (--max_queue_tokens)"));
}

}  // namespace mmfree

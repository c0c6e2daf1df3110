// Grammars in GBNF, llama.cpp's notation, for constrained decoding.
#ifndef MMFREE_SERVER_SAMPLING_GBNF_H_
#define MMFREE_SERVER_SAMPLING_GBNF_H_

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "server/sampling/grammar.h"

namespace mmfree {

// The sentences of the rule `root`. README.md lists the syntax. INVALID_ARGUMENT says what is wrong
// and where.
absl::StatusOr<Grammar> GrammarOfGbnf(absl::string_view text);

}  // namespace mmfree

#endif  // MMFREE_SERVER_SAMPLING_GBNF_H_

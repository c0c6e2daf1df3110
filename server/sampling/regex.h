// Regular expressions, for constrained decoding.
#ifndef MMFREE_SERVER_SAMPLING_REGEX_H_
#define MMFREE_SERVER_SAMPLING_REGEX_H_

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "server/sampling/grammar.h"

namespace mmfree {

// Adds what `regex` matches as a whole to a grammar; each character is also one of `within`.
// README.md lists the syntax. INVALID_ARGUMENT says what is wrong and where, UNIMPLEMENTED names
// what is not supported.
absl::StatusOr<Grammar::Sequence> ParseRegex(absl::string_view regex, const CodePoints& within,
                                             Grammar* grammar);

// The texts that match `regex` as a whole.
absl::StatusOr<Grammar> GrammarOfRegex(absl::string_view regex);

}  // namespace mmfree

#endif  // MMFREE_SERVER_SAMPLING_REGEX_H_

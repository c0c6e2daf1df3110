// How JSON writes the characters of strings, as a grammar.
#ifndef MMFREE_SERVER_SAMPLING_JSON_TEXT_H_
#define MMFREE_SERVER_SAMPLING_JSON_TEXT_H_

#include "server/sampling/grammar.h"

namespace mmfree {

// Code points that a JSON string holds without an escape.
CodePoints PlainJsonCharacters();

// One character of a string, escaped or not.
Grammar::Sequence JsonStringCharacter(Grammar* grammar);

}  // namespace mmfree

#endif  // MMFREE_SERVER_SAMPLING_JSON_TEXT_H_

// Whether a text is a sentence of a grammar.
#ifndef MMFREE_TESTS_UNIT_SAMPLING_GRAMMAR_MATCHER_H_
#define MMFREE_TESTS_UNIT_SAMPLING_GRAMMAR_MATCHER_H_

#include "absl/strings/string_view.h"
#include "server/sampling/grammar_machine.h"

namespace mmfree {

inline bool Matches(GrammarMachine* machine, absl::string_view text) {
  GrammarMachine::State state = machine->start();
  for (const char byte : text) state = machine->Next(state, static_cast<unsigned char>(byte));
  return machine->accepting(state);
}

inline bool Matches(const Grammar& grammar, absl::string_view text) {
  GrammarMachine machine(grammar);
  return Matches(&machine, text);
}

}  // namespace mmfree

#endif  // MMFREE_TESTS_UNIT_SAMPLING_GRAMMAR_MATCHER_H_

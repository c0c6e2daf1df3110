// Command-line flags of a program or of one of its subcommands: --name=value or --name value.
//
// Unlike absl::ParseCommandLine the flags belong to an object, so that subcommands have their own;
// a flag may be repeated into a list or stay unset; a mistake is an error to return and not an
// exit.
#ifndef MMFREE_SERVER_BASE_FLAG_SET_H_
#define MMFREE_SERVER_BASE_FLAG_SET_H_

#include <cstdint>
#include <functional>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace mmfree {

namespace flag_internal {

// Each gives "" or what is expected instead of `text`.
std::string ParseFlag(absl::string_view text, std::string* value);
std::string ParseFlag(absl::string_view text, bool* value);
std::string ParseFlag(absl::string_view text, float* value);
std::string ParseFlag(absl::string_view text, absl::Duration* value);
// Adds to the list: a repeated flag.
std::string ParseFlag(absl::string_view text, std::vector<std::string>* value);
// Comma-separated: adds to the list.
std::string ParseFlag(absl::string_view text, std::vector<int32_t>* value);
// Comma-separated KEY:NUMBER: adds to the list.
std::string ParseFlag(absl::string_view text, std::vector<std::pair<int32_t, float>>* value);

template <typename Int>
std::string ParseInteger(absl::string_view text, Int low, Int high, Int* value) {
  Int parsed;
  if (absl::SimpleAtoi(text, &parsed) && parsed >= low && parsed <= high) {
    *value = parsed;
    return "";
  }
  return absl::StrCat("a whole number from ", low, " to ", high);
}
inline std::string ParseFlag(absl::string_view text, uint32_t* value) {
  return ParseInteger<uint32_t>(text, 0, std::numeric_limits<uint32_t>::max(), value);
}
inline std::string ParseFlag(absl::string_view text, uint64_t* value) {
  return ParseInteger<uint64_t>(text, 0, std::numeric_limits<uint64_t>::max(), value);
}
template <typename T>
std::string ParseFlag(absl::string_view text, std::optional<T>* value) {
  T parsed{};
  std::string expected = ParseFlag(text, &parsed);
  if (expected.empty()) *value = parsed;
  return expected;
}

template <typename T>
inline constexpr bool kIsSwitch = false;
template <>
inline constexpr bool kIsSwitch<bool> = true;
template <>
inline constexpr bool kIsSwitch<std::optional<bool>> = true;

}  // namespace flag_internal

// Not thread-safe. Targets must outlive the parsing and hold the defaults before it.
class FlagSet {
 public:
  // `value_name` stands for the value in the help ("" for switches); `help` is one or more lines.
  template <typename T>
  void Add(absl::string_view name, T* target, absl::string_view value_name,
           absl::string_view help) {
    AddParser(name, value_name, help, flag_internal::kIsSwitch<T>,
              [target](absl::string_view text) { return flag_internal::ParseFlag(text, target); });
  }
  // Gives the parsed value to `set`, each time the flag is given: for targets that are no
  // variables.
  template <typename T>
  void AddSetter(absl::string_view name, absl::string_view value_name, absl::string_view help,
                 std::function<void(const T&)> set) {
    AddParser(name, value_name, help, flag_internal::kIsSwitch<T>, [set](absl::string_view text) {
      T value{};
      std::string expected = flag_internal::ParseFlag(text, &value);
      if (expected.empty()) set(value);
      return expected;
    });
  }
  // A whole number in [low, high].
  template <typename Int>
  void AddInteger(absl::string_view name, Int* target, Int low, Int high,
                  absl::string_view value_name, absl::string_view help) {
    AddParser(name, value_name, help, /*is_switch=*/false,
              [target, low, high](absl::string_view text) {
                return flag_internal::ParseInteger(text, low, high, target);
              });
  }
  // One of a few words, each standing for a value.
  template <typename T>
  void AddChoice(absl::string_view name, std::vector<std::pair<std::string, T>> choices,
                 absl::string_view value_name, absl::string_view help, std::function<void(T)> set) {
    AddParser(name, value_name, help, /*is_switch=*/false,
              [choices = std::move(choices), set](absl::string_view text) {
                std::string expected = "one of";
                for (const auto& [word, value] : choices) {
                  if (text == word) {
                    set(value);
                    return std::string();
                  }
                  absl::StrAppend(&expected, " ", word);
                }
                return expected;
              });
  }
  // Starts a group of flags in the help.
  void AddHeading(absl::string_view heading);

  // Sets the targets; gives what is not a flag. "--" ends the flags. With `stop_at_first`, parsing
  // stops at the first argument that is not a flag and the rest is given as it is. -h and --help
  // only set help_requested(). INVALID_ARGUMENT says which flag, what was expected, and a known
  // flag with a similar name.
  absl::StatusOr<std::vector<std::string>> Parse(const std::vector<std::string>& arguments,
                                                 bool stop_at_first = false);

  bool help_requested() const { return help_requested_; }

  // The flags, in order, one or more lines each.
  std::string Help() const;

 private:
  struct Flag {
    std::string name;  // empty: a heading, in `help`
    std::string value_name;
    std::string help;
    bool is_switch = false;
    std::function<std::string(absl::string_view)> parse;
  };

  void AddParser(absl::string_view name, absl::string_view value_name, absl::string_view help,
                 bool is_switch, std::function<std::string(absl::string_view)> parse);
  const Flag* Find(absl::string_view name) const;
  absl::Status UnknownFlag(absl::string_view name) const;

  std::vector<Flag> flags_;
  bool help_requested_ = false;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_BASE_FLAG_SET_H_

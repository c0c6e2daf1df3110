#include "server/base/flag_set.h"

#include <algorithm>
#include <cstddef>
#include <utility>

#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"

namespace mmfree {
namespace flag_internal {

std::string ParseFlag(absl::string_view text, std::string* value) {
  value->assign(text.data(), text.size());
  return "";
}

std::string ParseFlag(absl::string_view text, bool* value) {
  return absl::SimpleAtob(text, value) ? "" : "true or false";
}

std::string ParseFlag(absl::string_view text, float* value) {
  return absl::SimpleAtof(text, value) ? "" : "a number";
}

std::string ParseFlag(absl::string_view text, absl::Duration* value) {
  return absl::ParseDuration(text, value) ? "" : "a time with its unit, such as 500ms, 30s or 2m";
}

std::string ParseFlag(absl::string_view text, std::vector<std::string>* value) {
  value->emplace_back(text);
  return "";
}

std::string ParseFlag(absl::string_view text, std::vector<int32_t>* value) {
  if (text.empty()) return "";
  for (const absl::string_view item : absl::StrSplit(text, ',')) {
    int32_t parsed;
    if (!absl::SimpleAtoi(item, &parsed)) return "whole numbers separated by commas, such as 1,2,3";
    value->push_back(parsed);
  }
  return "";
}

std::string ParseFlag(absl::string_view text, std::vector<std::pair<int32_t, float>>* value) {
  for (const absl::string_view item : absl::StrSplit(text, ',')) {
    const std::pair<absl::string_view, absl::string_view> parts =
        absl::StrSplit(item, absl::MaxSplits(':', 1));
    std::pair<int32_t, float> parsed;
    if (!absl::SimpleAtoi(parts.first, &parsed.first) ||
        !absl::SimpleAtof(parts.second, &parsed.second)) {
      return "KEY:NUMBER pairs separated by commas, such as 5:1.5,7:-2";
    }
    value->push_back(parsed);
  }
  return "";
}

}  // namespace flag_internal

namespace {

// Levenshtein distance.
size_t EditDistance(absl::string_view a, absl::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t substituted = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({substituted, row[j] + 1, row[j - 1] + 1});
    }
  }
  return row[b.size()];
}

}  // namespace

void FlagSet::AddParser(absl::string_view name, absl::string_view value_name,
                        absl::string_view help, bool is_switch,
                        std::function<std::string(absl::string_view)> parse) {
  flags_.push_back(
      {std::string(name), std::string(value_name), std::string(help), is_switch, std::move(parse)});
}

void FlagSet::AddHeading(absl::string_view heading) {
  flags_.push_back({"", "", std::string(heading), false, nullptr});
}

const FlagSet::Flag* FlagSet::Find(absl::string_view name) const {
  for (const Flag& flag : flags_) {
    if (!flag.name.empty() && flag.name == name) return &flag;
  }
  return nullptr;
}

absl::Status FlagSet::UnknownFlag(absl::string_view name) const {
  const Flag* nearest = nullptr;
  size_t nearest_distance = name.size() / 3 + 2;
  for (const Flag& flag : flags_) {
    if (flag.name.empty()) continue;
    const size_t distance = EditDistance(name, flag.name);
    if (distance < nearest_distance) {
      nearest = &flag;
      nearest_distance = distance;
    }
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "unknown flag --", name,
      nearest == nullptr ? "" : absl::StrCat("; did you mean --", nearest->name, "?")));
}

absl::StatusOr<std::vector<std::string>> FlagSet::Parse(const std::vector<std::string>& arguments,
                                                        bool stop_at_first) {
  std::vector<std::string> rest;
  for (size_t i = 0; i < arguments.size(); ++i) {
    absl::string_view argument = arguments[i];
    if (argument == "--") {
      rest.insert(rest.end(), arguments.begin() + i + 1, arguments.end());
      break;
    }
    if (argument == "-h" || argument == "--help") {
      help_requested_ = true;
      continue;
    }
    if (!absl::ConsumePrefix(&argument, "--")) {
      if (stop_at_first) {
        rest.insert(rest.end(), arguments.begin() + i, arguments.end());
        break;
      }
      if (argument.size() > 1 && argument.front() == '-') {
        return absl::InvalidArgumentError(
            absl::StrCat("unexpected ", argument, "; flags start with --"));
      }
      rest.emplace_back(argument);
      continue;
    }
    const size_t equals = argument.find('=');
    const absl::string_view name = argument.substr(0, equals);
    const Flag* const flag = Find(name);
    if (flag == nullptr) return UnknownFlag(name);
    absl::string_view value;
    if (equals != absl::string_view::npos) {
      value = argument.substr(equals + 1);
    } else if (flag->is_switch) {
      value = "true";
    } else if (i + 1 < arguments.size()) {
      value = arguments[++i];
    } else {
      return absl::InvalidArgumentError(absl::StrCat("--", name, " needs a value"));
    }
    if (const std::string expected = flag->parse(value); !expected.empty()) {
      return absl::InvalidArgumentError(
          absl::StrCat("--", name, "=", value, ": expected ", expected));
    }
  }
  return rest;
}

std::string FlagSet::Help() const {
  constexpr size_t kColumn = 30;
  std::string out;
  for (const Flag& flag : flags_) {
    if (flag.name.empty()) {
      absl::StrAppend(&out, out.empty() ? "" : "\n", flag.help, "\n");
      continue;
    }
    std::string line =
        absl::StrCat("  --", flag.name, flag.value_name.empty() ? "" : "=", flag.value_name);
    for (const absl::string_view help : absl::StrSplit(flag.help, '\n')) {
      if (line.size() + 1 >= kColumn) {
        absl::StrAppend(&out, line, "\n");
        line.clear();
      }
      line.resize(kColumn, ' ');
      absl::StrAppend(&out, line, help, "\n");
      line.clear();
    }
  }
  return out;
}

}  // namespace mmfree

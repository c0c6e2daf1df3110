#include "server/sampling/json_schema.h"

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "server/base/status_macros.h"
#include "server/sampling/distinct_items.h"
#include "server/sampling/exact_json.h"
#include "server/sampling/json_schema_keywords.h"
#include "server/sampling/json_schema_numbers.h"
#include "server/sampling/json_text.h"
#include "server/sampling/regex.h"

namespace mmfree {
namespace {

using Json = ExactJson;
using Sequence = Grammar::Sequence;

constexpr int kMaxDepth = 100;
constexpr int64_t kMaxCount = 10'000;

std::string Escaped(absl::string_view key) {
  return absl::StrReplaceAll(key, {{"~", "~0"}, {"/", "~1"}});
}

// Before anything recurses into it. Brackets in strings count, too: no schema has so many.
bool NestedTooDeeply(absl::string_view json) {
  constexpr int kMaxBrackets = 500;
  int open = 0;
  for (const char c : json) {
    if (c == '[' || c == '{') ++open;
    if (c == ']' || c == '}') --open;
    if (open > kMaxBrackets) return true;
  }
  return false;
}

class SchemaCompiler {
 public:
  explicit SchemaCompiler(const Json& schema) : schema_(schema) {}

  absl::StatusOr<Grammar> Compile() {
    const Grammar::Rule root = grammar_.AddRule();
    MMFREE_ASSIGN_OR_RETURN(Sequence value, ValueAt(""));
    grammar_.AddAlternative(root, std::move(value));
    const absl::Status status = grammar_.Finish(root);
    if (absl::IsInvalidArgument(status) && grammar_.rules()[root].empty() && !nothing_.empty()) {
      return absl::InvalidArgumentError(absl::StrCat(status.message(), ": ", nothing_));
    }
    MMFREE_RETURN_IF_ERROR(status);
    return std::move(grammar_);
  }

 private:
  static absl::Status Invalid(const std::string& at, absl::string_view what) {
    return absl::InvalidArgumentError(absl::StrCat("at \"", at, "\": ", what));
  }
  static absl::Status Unsupported(const std::string& at, absl::string_view what) {
    return absl::UnimplementedError(absl::StrCat("at \"", at, "\": ", what, " is not supported"));
  }

  // No value validates at this place. What is around it may do without one: only the whole schema
  // must leave something, and the first such place is named when it does not.
  Sequence Nothing(const std::string& at, absl::string_view why) {
    if (nothing_.empty()) nothing_ = absl::StrCat("at \"", at, "\": ", why);
    return {grammar_.AddRule()};
  }

  Sequence Text(absl::string_view literal) { return grammar_.Bytes(literal); }
  Sequence Character(const CodePoints& points) { return grammar_.Character(points); }
  static Sequence Join(std::initializer_list<Sequence> parts) {
    Sequence all;
    for (const Sequence& part : parts) all.insert(all.end(), part.begin(), part.end());
    return all;
  }
  // A space may follow what separates: one, so that no output is endless for its spaces.
  Sequence Separator(absl::string_view mark) {
    return Join({Text(mark), grammar_.Optional(Text(" "))});
  }

  // The schema at a JSON pointer, as a rule: recursive schemas refer back to it.
  absl::StatusOr<Sequence> ValueAt(const std::string& pointer) {
    const auto [it, added] = rules_.try_emplace(pointer, -1);
    if (!added) return Sequence{it->second};
    const Grammar::Rule rule = grammar_.AddRule();
    it->second = rule;
    const Json* target = nullptr;
    try {
      target = &schema_.at(Json::json_pointer(pointer));
    } catch (const Json::exception&) {
      return Invalid(pointer, "there is no such place in the schema");
    }
    if (++depth_ > kMaxDepth) return Invalid(pointer, "is nested too deeply");
    MMFREE_ASSIGN_OR_RETURN(Sequence value, Value(*target, pointer));
    --depth_;
    grammar_.AddAlternative(rule, std::move(value));
    return Sequence{rule};
  }

  absl::StatusOr<Sequence> Value(const Json& schema, const std::string& at) {
    if (schema.is_boolean()) {
      if (!schema.get<bool>()) return Nothing(at, "false allows nothing");
      return AnyValue();
    }
    if (!schema.is_object()) return Invalid(at, "a schema is an object, true or false");
    for (const absl::string_view key : {"$ref", "const", "enum", "anyOf", "oneOf", "allOf"}) {
      if (!schema.contains(std::string(key))) continue;
      for (const auto& [other, ignored] : schema.items()) {
        const bool filter = other == "type" && (key == "const" || key == "enum");
        if (other != key && !filter && !IsAnnotation(other)) {
          return Unsupported(at, absl::StrCat("\"", other, "\" beside \"", key, "\""));
        }
      }
      if (key == "$ref") return Reference(schema["$ref"], at);
      if (key == "const") return Constants(Json::array({schema["const"]}), schema, at);
      if (key == "enum") return Constants(schema["enum"], schema, at);
      return Combination(std::string(key), schema, at);
    }
    return Typed(schema, at);
  }

  absl::StatusOr<Sequence> Reference(const Json& reference, const std::string& at) {
    if (!reference.is_string()) return Invalid(at, "\"$ref\" is not a string");
    const std::string target = reference.get<std::string>();
    if (!absl::StartsWith(target, "#")) return Unsupported(at, "a \"$ref\" to another document");
    if (target.size() > 1 && target[1] != '/') return Unsupported(at, "a \"$ref\" to an anchor");
    const std::optional<std::string> pointer = PointerOf(target);
    if (!pointer.has_value()) return Invalid(at, "\"$ref\" is not percent-encoded as URIs are");
    return ValueAt(*pointer);
  }

  absl::StatusOr<Sequence> Constants(const Json& values, const Json& schema,
                                     const std::string& at) {
    if (!values.is_array()) return Invalid(at, "\"enum\" is not an array");
    MMFREE_ASSIGN_OR_RETURN(const std::vector<std::string> types, Types(schema, at));
    std::vector<Sequence> alternatives;
    for (const Json& value : values) {
      if (schema.contains("type") &&
          std::none_of(types.begin(), types.end(),
                       [&](const auto& type) { return HasType(value, type); })) {
        continue;
      }
      alternatives.push_back(Text(Written(value)));
    }
    if (alternatives.empty()) return Nothing(at, "no constant is of the type");
    return grammar_.OneOf(std::move(alternatives));
  }

  absl::StatusOr<Sequence> Combination(const std::string& key, const Json& schema,
                                       const std::string& at) {
    const Json& parts = schema[key];
    if (!parts.is_array() || parts.empty()) {
      return Invalid(at, absl::StrCat("\"", key, "\" is not a list of schemas"));
    }
    if (key == "allOf" && parts.size() > 1) {
      return Unsupported(at, "\"allOf\" of more than one schema");
    }
    // Any of them is exactly one of them when no value can be of two.
    if (key == "oneOf" && !ExcludeEachOther(schema_, parts)) {
      return Unsupported(
          at,
          "\"oneOf\" of schemas that differ neither in \"type\", nor in \"const\" or "
          "\"enum\", nor in that of a required property");
    }
    std::vector<Sequence> alternatives;
    for (size_t i = 0; i < parts.size(); ++i) {
      MMFREE_ASSIGN_OR_RETURN(Sequence value, ValueAt(absl::StrCat(at, "/", key, "/", i)));
      alternatives.push_back(std::move(value));
    }
    return grammar_.OneOf(std::move(alternatives));
  }

  static absl::StatusOr<std::vector<std::string>> Types(const Json& schema, const std::string& at) {
    std::optional<std::vector<std::string>> types = TypesOf(schema);
    if (!types.has_value()) return Invalid(at, "\"type\" is not a type or a list of types");
    return *std::move(types);
  }

  absl::StatusOr<Sequence> Typed(const Json& schema, const std::string& at) {
    MMFREE_ASSIGN_OR_RETURN(const std::vector<std::string> types, Types(schema, at));
    for (const auto& [key, ignored] : schema.items()) {
      if (key != "type" && !IsAnnotation(key) && TypeOfKeyword(key).empty()) {
        return Unsupported(at, absl::StrCat("\"", key, "\""));
      }
    }
    std::vector<Sequence> alternatives;
    for (const std::string& type : types) {
      MMFREE_ASSIGN_OR_RETURN(Sequence value, OfType(type, schema, at));
      alternatives.push_back(std::move(value));
    }
    return grammar_.OneOf(std::move(alternatives));
  }

  absl::StatusOr<Sequence> OfType(const std::string& type, const Json& schema,
                                  const std::string& at) {
    if (type == "null") return Text("null");
    if (type == "boolean") return grammar_.OneOf({Text("true"), Text("false")});
    if (type == "string") return String(schema, at);
    if (type == "integer" || type == "number") return Number(type, schema, at);
    if (type == "array") return Array(schema, at);
    return Object(schema, at);
  }

  // A count keyword; `absent` when it is not there.
  static absl::StatusOr<int64_t> Count(const Json& schema, const char* key, int64_t absent,
                                       const std::string& at) {
    if (!schema.contains(key)) return absent;
    const Json& value = schema[key];
    if (!IsNumber(value) || !IsWhole(value) || NearestDouble(value) < 0) {
      return Invalid(at, absl::StrCat("\"", key, "\" is not a count"));
    }
    const int64_t count = FloorWithin(value, kMaxCount + 1);
    if (count > kMaxCount) {
      return Unsupported(at, absl::StrCat("\"", key, "\" of more than ", kMaxCount));
    }
    return count;
  }

  struct Counts {
    int64_t min = 0;
    int64_t max = -1;  // none

    bool possible() const { return max < 0 || max >= min; }
  };
  static absl::StatusOr<Counts> CountsOf(const Json& schema, const char* min, const char* max,
                                         const std::string& at) {
    Counts counts;
    MMFREE_ASSIGN_OR_RETURN(counts.min, Count(schema, min, 0, at));
    MMFREE_ASSIGN_OR_RETURN(counts.max, Count(schema, max, -1, at));
    return counts;
  }

  Sequence StringCharacter() {
    if (string_character_.empty()) string_character_ = JsonStringCharacter(&grammar_);
    return string_character_;
  }

  absl::StatusOr<Sequence> String(const Json& schema, const std::string& at) {
    MMFREE_ASSIGN_OR_RETURN(const Counts counts, CountsOf(schema, "minLength", "maxLength", at));
    if (!counts.possible()) return Nothing(at, "\"maxLength\" is less than \"minLength\"");
    if (schema.contains("pattern")) {
      if (counts.min > 0 || counts.max >= 0) {
        return Unsupported(at, "\"pattern\" beside \"minLength\" or \"maxLength\"");
      }
      if (!schema["pattern"].is_string()) return Invalid(at, "\"pattern\" is not a string");
      const CodePoints plain = PlainJsonCharacters();
      const absl::StatusOr<Sequence> pattern =
          ParseRegex(schema["pattern"].get<std::string>(), plain, &grammar_);
      if (!pattern.ok()) {
        return absl::Status(pattern.status().code(), absl::StrCat("at \"", at, "\": \"pattern\" ",
                                                                  pattern.status().message()));
      }
      return Join({Text("\""), *pattern, Text("\"")});
    }
    return Join(
        {Text("\""), grammar_.Repeat(StringCharacter(), counts.min, counts.max), Text("\"")});
  }

  absl::StatusOr<Sequence> Number(const std::string& type, const Json& schema,
                                  const std::string& at) {
    absl::StatusOr<std::optional<Sequence>> numbers =
        NumbersOfSchema(schema, type == "integer", &grammar_);
    if (!numbers.ok()) {
      return absl::Status(numbers.status().code(),
                          absl::StrCat("at \"", at, "\": ", numbers.status().message()));
    }
    if (!numbers->has_value()) {
      const std::string what = schema.contains("multipleOf") ? "multiple" : type;
      return Nothing(at, absl::StrCat("no ", what, " is within the bounds"));
    }
    return **std::move(numbers);
  }

  absl::StatusOr<Sequence> AnyValue() {
    if (any_value_ < 0) {
      any_value_ = grammar_.AddRule();
      MMFREE_ASSIGN_OR_RETURN(Sequence value, Typed(Json::object(), ""));
      grammar_.AddAlternative(any_value_, std::move(value));
    }
    return Sequence{any_value_};
  }

  // The schema under `key`; any value when there is none. `exists` when it allows something.
  struct Part {
    Sequence value;
    bool exists = true;
  };
  absl::StatusOr<Part> PartAt(const Json& schema, const std::string& key, const std::string& at) {
    Part part;
    if (!schema.contains(key)) {
      MMFREE_ASSIGN_OR_RETURN(part.value, AnyValue());
      return part;
    }
    if (schema[key] == false) return Part{{grammar_.AddRule()}, false};
    MMFREE_ASSIGN_OR_RETURN(part.value, ValueAt(absl::StrCat(at, "/", Escaped(key))));
    return part;
  }

  // With "uniqueItems": some of a few constants, in their order.
  absl::StatusOr<Sequence> DistinctArray(const Counts& counts, const Json& schema,
                                         const std::string& at) {
    const auto values = schema.contains("items") ? ConstantsOf(schema_, schema["items"])
                                                 : std::optional<std::vector<Json>>();
    if (!values.has_value() || schema.contains("prefixItems") ||
        values->size() > kMaxDistinctItems) {
      return Unsupported(at, absl::StrCat("\"uniqueItems\" of anything but at most ",
                                          kMaxDistinctItems, " constants as \"items\""));
    }
    std::vector<Sequence> items;
    for (auto value = values->begin(); value != values->end(); ++value) {
      const bool again = std::any_of(values->begin(), value, [&value](const Json& earlier) {
        return SameValue(earlier, *value);
      });
      if (!again) items.push_back(Text(Written(*value)));
    }
    const std::optional<Sequence> list =
        DistinctItems(items, Separator(","), counts.min, counts.max, &grammar_);
    if (!list.has_value()) {
      return Nothing(at, "\"minItems\" is more than there are distinct items");
    }
    return Join({Text("["), *list, Text("]")});
  }

  absl::StatusOr<Sequence> Array(const Json& schema, const std::string& at) {
    MMFREE_ASSIGN_OR_RETURN(const Counts counts, CountsOf(schema, "minItems", "maxItems", at));
    if (!counts.possible()) return Nothing(at, "\"maxItems\" is less than \"minItems\"");
    if (schema.contains("uniqueItems") && schema["uniqueItems"] != false &&
        (counts.max < 0 || counts.max > 1)) {
      return DistinctArray(counts, schema, at);
    }
    std::vector<Sequence> first;
    if (schema.contains("prefixItems")) {
      if (!schema["prefixItems"].is_array()) return Invalid(at, "\"prefixItems\" is not a list");
      for (size_t i = 0; i < schema["prefixItems"].size(); ++i) {
        MMFREE_ASSIGN_OR_RETURN(Sequence item, ValueAt(absl::StrCat(at, "/prefixItems/", i)));
        first.push_back(std::move(item));
      }
    }
    MMFREE_ASSIGN_OR_RETURN(const Part items, PartAt(schema, "items", at));
    const auto prefix = static_cast<int64_t>(first.size());
    const int64_t last = counts.max < 0 ? prefix : std::min(prefix, counts.max);
    // Built from the end: what may follow when n items are there.
    const Sequence comma = Separator(",");
    Sequence rest;
    if (counts.max < 0 || counts.max > prefix) {
      const int64_t min = std::max<int64_t>(counts.min - prefix, 0);
      const int64_t max = !items.exists ? 0 : counts.max < 0 ? -1 : counts.max - prefix;
      if (max == 0) {
        rest = min == 0 ? Sequence() : Sequence{grammar_.AddRule()};  // nothing
      } else if (prefix > 0) {
        rest = grammar_.Repeat(Join({comma, items.value}), min, max);
      } else {
        rest = Join(
            {items.value, grammar_.Repeat(Join({comma, items.value}), std::max<int64_t>(min - 1, 0),
                                          max < 0 ? -1 : max - 1)});
        if (min == 0) rest = grammar_.Optional(rest);
      }
    }
    for (int64_t n = last; n-- > 0;) {
      Sequence more = n == 0 ? Join({first[0], rest}) : Join({comma, first[n], rest});
      rest = n >= counts.min ? grammar_.Optional(more) : more;
    }
    return Join({Text("["), rest, Text("]")});
  }

  absl::StatusOr<Sequence> Object(const Json& schema, const std::string& at) {
    MMFREE_ASSIGN_OR_RETURN(const Counts counts,
                            CountsOf(schema, "minProperties", "maxProperties", at));
    if (!counts.possible()) {
      return Nothing(at, "\"maxProperties\" is less than \"minProperties\"");
    }
    std::vector<std::string> required;
    if (schema.contains("required")) {
      if (!schema["required"].is_array()) return Invalid(at, "\"required\" is not a list");
      for (const Json& name : schema["required"]) {
        if (!name.is_string()) return Invalid(at, "\"required\" is not a list of names");
        required.push_back(name.get<std::string>());
      }
    }
    std::vector<std::string> names;
    if (schema.contains("properties")) {
      if (!schema["properties"].is_object()) return Invalid(at, "\"properties\" is not an object");
      for (const auto& [name, ignored] : schema["properties"].items()) names.push_back(name);
    }
    const size_t described = names.size();
    for (const std::string& name : required) {
      if (std::find(names.begin(), names.end(), name) == names.end()) names.push_back(name);
    }
    MMFREE_ASSIGN_OR_RETURN(const Part additional, PartAt(schema, "additionalProperties", at));
    if (names.empty()) return Map(additional, counts, schema, at);
    if (schema.contains("minProperties") || schema.contains("maxProperties")) {
      return Unsupported(at, "\"minProperties\" or \"maxProperties\" beside named properties");
    }

    // Built from the end. `rest`: after some member; `begin`: before any.
    Sequence rest, begin;
    for (size_t i = names.size(); i-- > 0;) {
      Sequence value = additional.value;
      if (i < described) {
        MMFREE_ASSIGN_OR_RETURN(value,
                                ValueAt(absl::StrCat(at, "/properties/", Escaped(names[i]))));
      }
      const Sequence member = Join({Text(Json(names[i]).dump()), Separator(":"), value});
      const bool must = std::find(required.begin(), required.end(), names[i]) != required.end();
      std::vector<Sequence> from_begin = {Join({member, rest})};
      std::vector<Sequence> from_rest = {Join({Separator(","), member, rest})};
      if (!must) {
        from_begin.push_back(begin);
        from_rest.push_back(rest);
      }
      begin = AsRule(std::move(from_begin));
      rest = AsRule(std::move(from_rest));
    }
    return Join({Text("{"), begin, Text("}")});
  }

  // Always one symbol, so that what contains it does not grow with it.
  Sequence AsRule(std::vector<Sequence> alternatives) {
    const Grammar::Rule rule = grammar_.AddRule();
    for (Sequence& sequence : alternatives) grammar_.AddAlternative(rule, std::move(sequence));
    return {rule};
  }

  // An object of any names.
  absl::StatusOr<Sequence> Map(const Part& additional, const Counts& counts, const Json& schema,
                               const std::string& at) {
    if (schema.contains("properties") && !schema.contains("additionalProperties") &&
        counts.min == 0) {
      return Text("{}");  // none was described
    }
    // A name that comes twice counts once.
    if (counts.min > 1)
      return Unsupported(at, "\"minProperties\" above 1 without named properties");
    if (!additional.exists || counts.max == 0) {
      if (counts.min > 0) return Nothing(at, "no property is allowed and one is needed");
      return Text("{}");
    }
    const Sequence name = Join({Text("\""), grammar_.Repeat(StringCharacter(), 0, -1), Text("\"")});
    const Sequence member = Join({name, Separator(":"), additional.value});
    const Sequence members = Join({member, grammar_.Repeat(Join({Separator(","), member}), 0,
                                                           counts.max < 0 ? -1 : counts.max - 1)});
    return Join({Text("{"), counts.min > 0 ? members : grammar_.Optional(members), Text("}")});
  }

  const Json& schema_;
  Grammar grammar_;
  absl::flat_hash_map<std::string, Grammar::Rule> rules_;  // by JSON pointer
  Grammar::Rule any_value_ = -1;
  Sequence string_character_;
  std::string nothing_;  // the first place where nothing validates, and why
  int depth_ = 0;
};

}  // namespace

absl::StatusOr<Grammar> GrammarOfJsonSchema(absl::string_view schema) {
  if (NestedTooDeeply(schema)) return absl::InvalidArgumentError("is nested too deeply");
  MMFREE_ASSIGN_OR_RETURN(const Json json, ParseExactJson(schema));
  return SchemaCompiler(json).Compile();
}

}  // namespace mmfree

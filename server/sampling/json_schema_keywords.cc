#include "server/sampling/json_schema_keywords.h"

#include <algorithm>
#include <initializer_list>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "server/tokenizer/utf8.h"

namespace mmfree {
namespace {

using Json = ExactJson;

// References to references, at most: more go in a circle.
constexpr int kMaxReferences = 20;

constexpr absl::string_view kAnnotations[] = {
    "$schema", "$id",         "$comment", "$defs",    "$anchor",   "definitions", "title",
    "default", "description", "examples", "readOnly", "writeOnly", "deprecated",  "format",
};

bool Contains(std::initializer_list<absl::string_view> keys, absl::string_view key) {
  return std::find(keys.begin(), keys.end(), key) != keys.end();
}

// The schema that a reference leads to; null when there is none in this document.
const Json* Resolved(const Json& document, const Json* schema) {
  for (int i = 0; i < kMaxReferences; ++i) {
    if (!schema->is_object()) return nullptr;
    const auto reference = schema->find("$ref");
    if (reference == schema->end()) return schema;
    if (!reference->is_string()) return nullptr;
    const std::string target = reference->get<std::string>();
    if (!absl::StartsWith(target, "#/")) return nullptr;
    const std::optional<std::string> pointer = PointerOf(target);
    if (!pointer.has_value()) return nullptr;
    try {
      schema = &document.at(Json::json_pointer(*pointer));
    } catch (const Json::exception&) {
      return nullptr;
    }
  }
  return nullptr;
}

// The values of a "const" or an "enum" that are of its "type"; nullopt when a schema is neither.
std::optional<std::vector<Json>> ConstantsOf(const Json& schema) {
  std::vector<Json> values;
  if (schema.contains("const")) {
    values = {schema["const"]};
  } else if (schema.contains("enum") && schema["enum"].is_array()) {
    values.assign(schema["enum"].begin(), schema["enum"].end());
  } else {
    return std::nullopt;
  }
  if (!schema.contains("type")) return values;
  const std::optional<std::vector<std::string>> types = TypesOf(schema);
  if (!types.has_value()) return std::nullopt;
  const auto is_of_none = [&types](const Json& value) {
    return std::none_of(types->begin(), types->end(),
                        [&value](const std::string& type) { return HasType(value, type); });
  };
  values.erase(std::remove_if(values.begin(), values.end(), is_of_none), values.end());
  return values;
}

bool HaveDistinctConstants(const Json& a, const Json& b) {
  const auto of_a = ConstantsOf(a);
  const auto of_b = ConstantsOf(b);
  return of_a.has_value() && of_b.has_value() &&
         std::none_of(of_a->begin(), of_a->end(), [&](const Json& value) {
           return std::any_of(of_b->begin(), of_b->end(),
                              [&value](const Json& other) { return SameValue(value, other); });
         });
}

// The types of the values that validate, integers as numbers; nullopt when any may.
std::optional<std::vector<std::string>> RestrictedTypes(const Json& schema) {
  std::optional<std::vector<std::string>> types;
  if (const auto constants = ConstantsOf(schema); constants.has_value()) {
    types.emplace();
    for (const Json& value : *constants) types->emplace_back(TypeName(value));
  } else if (schema.contains("type")) {
    types = TypesOf(schema);
  }
  if (types.has_value()) {
    std::replace(types->begin(), types->end(), std::string("integer"), std::string("number"));
  }
  return types;
}

bool HaveDistinctTypes(const Json& a, const Json& b) {
  const auto of_a = RestrictedTypes(a);
  const auto of_b = RestrictedTypes(b);
  return of_a.has_value() && of_b.has_value() &&
         std::none_of(of_a->begin(), of_a->end(), [&](const std::string& type) {
           return std::find(of_b->begin(), of_b->end(), type) != of_b->end();
         });
}

bool Requires(const Json& schema, const std::string& name) {
  if (!schema.contains("required") || !schema["required"].is_array()) return false;
  const Json& required = schema["required"];
  return std::find(required.begin(), required.end(), Json(name)) != required.end();
}

// Objects with a property that tells them apart.
bool HaveDistinctTags(const Json& document, const Json& a, const Json& b) {
  const auto is_object = [](const Json& schema) {
    return TypesOf(schema) == std::vector<std::string>{"object"} && schema.contains("properties") &&
           schema["properties"].is_object();
  };
  if (!is_object(a) || !is_object(b)) return false;
  for (const auto& [name, of_a] : a["properties"].items()) {
    if (!b["properties"].contains(name) || !Requires(a, name) || !Requires(b, name)) continue;
    const Json* const tag_a = Resolved(document, &of_a);
    const Json* const tag_b = Resolved(document, &b["properties"][name]);
    if (tag_a != nullptr && tag_b != nullptr && HaveDistinctConstants(*tag_a, *tag_b)) return true;
  }
  return false;
}

}  // namespace

bool IsAnnotation(absl::string_view key) {
  return std::find(std::begin(kAnnotations), std::end(kAnnotations), key) != std::end(kAnnotations);
}

absl::string_view TypeOfKeyword(absl::string_view key) {
  if (Contains({"properties", "required", "additionalProperties", "minProperties", "maxProperties"},
               key)) {
    return "object";
  }
  if (Contains({"items", "prefixItems", "minItems", "maxItems", "uniqueItems"}, key)) {
    return "array";
  }
  if (Contains({"minLength", "maxLength", "pattern"}, key)) return "string";
  if (Contains({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}, key)) {
    return "number";
  }
  return "";
}

std::optional<std::string> PointerOf(absl::string_view reference) {
  std::string pointer;
  for (size_t i = 1; i < reference.size(); ++i) {
    if (reference[i] != '%') {
      pointer.push_back(reference[i]);
      continue;
    }
    const absl::string_view digits = reference.substr(i + 1, 2);
    if (digits.size() < 2 || !absl::ascii_isxdigit(static_cast<unsigned char>(digits[0])) ||
        !absl::ascii_isxdigit(static_cast<unsigned char>(digits[1]))) {
      return std::nullopt;
    }
    pointer += absl::HexStringToBytes(digits);
    i += 2;
  }
  if (FindInvalidUtf8(pointer) != pointer.size()) return std::nullopt;  // messages name it
  return pointer;
}

bool HasType(const Json& value, absl::string_view type) {
  if (type == "integer") return IsNumber(value) && IsWhole(value);
  return TypeName(value) == type;
}

std::optional<std::vector<std::string>> TypesOf(const Json& schema) {
  static const auto* const kAll =
      new std::vector<std::string>{"object", "array", "string", "number", "boolean", "null"};
  std::vector<std::string> types;
  if (schema.contains("type")) {
    const Json& given = schema["type"];
    for (const Json& type : given.is_array() ? given : Json::array({given})) {
      if (!type.is_string() ||
          (std::find(kAll->begin(), kAll->end(), type.get<std::string>()) == kAll->end() &&
           type.get<std::string>() != "integer")) {
        return std::nullopt;
      }
      types.push_back(type.get<std::string>());
    }
    return types;
  }
  for (const auto& [key, ignored] : schema.items()) {
    const std::string type(TypeOfKeyword(key));
    if (!type.empty() && std::find(types.begin(), types.end(), type) == types.end()) {
      types.push_back(type);
    }
  }
  return types.empty() ? *kAll : types;
}

std::optional<std::vector<Json>> ConstantsOf(const Json& document, const Json& schema) {
  const Json* const resolved = Resolved(document, &schema);
  return resolved == nullptr ? std::nullopt : ConstantsOf(*resolved);
}

bool ExcludeEachOther(const Json& document, const Json& schemas) {
  std::vector<const Json*> resolved;
  for (const Json& schema : schemas) {
    resolved.push_back(Resolved(document, &schema));
    if (resolved.back() == nullptr) return false;
  }
  for (size_t i = 0; i < resolved.size(); ++i) {
    for (size_t j = 0; j < i; ++j) {
      const Json& a = *resolved[i];
      const Json& b = *resolved[j];
      if (!HaveDistinctTypes(a, b) && !HaveDistinctConstants(a, b) &&
          !HaveDistinctTags(document, a, b)) {
        return false;
      }
    }
  }
  return true;
}

}  // namespace mmfree

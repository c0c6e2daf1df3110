// JSON Schemas as grammars: what is written validates, what would not be enforced is refused.
#include "server/sampling/json_schema.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "absl/strings/str_cat.h"
#include "server/sampling/exact_json.h"
#include "tests/support/status_is.h"
#include "tests/unit/sampling/grammar_matcher.h"

namespace mmfree {
namespace {

using ::testing::HasSubstr;

bool Validates(const char* schema, const char* text) {
  const absl::StatusOr<Grammar> grammar = GrammarOfJsonSchema(schema);
  EXPECT_THAT(grammar, IsOk()) << schema;
  return grammar.ok() && Matches(*grammar, text);
}

TEST(JsonSchemaTest, AllowsWhatValidatesInItsForm) {
  EXPECT_TRUE(Validates("true", R"({"a": [1, -2.5e3, "x\n\u00e9", null, true]})"));
  EXPECT_FALSE(Validates("true", R"({"a" : 1})"));
  EXPECT_FALSE(Validates("true", R"("\ud800")"));
  EXPECT_FALSE(Validates("true", "01"));
  const char* person = R"({"type": "object", "required": ["name"], "additionalProperties": false,
    "properties": {"id": {"type": "integer", "minimum": 1, "maximum": 99},
                   "name": {"type": "string", "minLength": 1, "maxLength": 3},
                   "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2}}})";
  for (const char* text :
       {R"({"name":"x"})", R"({"id": 42, "name": "abc"})", R"({"name":"\"\\n","tags":[]})",
        R"({"id":1, "name":"é😀x", "tags":["b", "a"]})"}) {
    EXPECT_TRUE(Validates(person, text)) << text;
  }
  for (const char* text : {"{}", R"({"name":""})", R"({"name":"abcd"})", R"({"id":0,"name":"x"})",
                           R"({"id":100,"name":"x"})", R"({"name":"x","tags":["c"]})",
                           R"({"name":"x","tags":["a","a","a"]})", R"({"name":"x","more":1})",
                           R"({"name":"x",})", R"({"name":"x"}x)"}) {
    EXPECT_FALSE(Validates(person, text)) << text;
  }
  const char* list = R"({"$defs": {"node": {"type": "object", "required": ["next"],
    "properties": {"next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}}}},
    "$ref": "#/$defs/node"})";
  EXPECT_TRUE(Validates(list, R"({"next":{"next":{"next":null}}})"));
  EXPECT_FALSE(Validates(list, R"({"next":{"next":{}}})"));
  EXPECT_TRUE(Validates(R"({"pattern": "^[A-Z]{2}-\\d+$"})", R"("AB-12")"));
  EXPECT_FALSE(Validates(R"({"pattern": "^[A-Z]{2}-\\d+$"})", R"("AB-")"));
  EXPECT_TRUE(Validates(R"({"prefixItems": [{"const": 1}, {"const": "x"}], "items": false,
                            "minItems": 1})",
                        R"([1, "x"])"));
  EXPECT_FALSE(Validates(R"({"prefixItems": [{"const": 1}], "items": false})", "[1,1]"));
  EXPECT_TRUE(Validates(R"({"type": "number", "minimum": 0, "exclusiveMaximum": 1})", "0.25"));
  EXPECT_FALSE(Validates(R"({"type": "number", "minimum": 0, "exclusiveMaximum": 1})", "1.0"));
  EXPECT_TRUE(Validates(R"({"type": "number", "multipleOf": 12})", "-144"));
  EXPECT_FALSE(Validates(R"({"type": "integer", "multipleOf": 12})", "6"));
  const char* colours = R"json({"uniqueItems": true, "minItems": 1, "maxItems": 2,
                                "items": {"$ref": "#/$defs/colour"},
                                "$defs": {"colour": {"enum": ["red", "green", "blue"]}}})json";
  for (const char* text : {R"(["red"])", R"(["red","blue"])", R"(["green", "blue"])"}) {
    EXPECT_TRUE(Validates(colours, text)) << text;
  }
  for (const char* text : {"[]", R"(["red","red"])", R"(["red","green","blue"])"}) {
    EXPECT_FALSE(Validates(colours, text)) << text;
  }
  EXPECT_TRUE(Validates(R"({"minimum": 2.5})", "3"));
  EXPECT_FALSE(Validates(R"({"minimum": 2.5})", "2.4"));
}

// Tagged unions, as generators of schemas write them.
TEST(JsonSchemaTest, OneOfTakesWhatExcludesEachOther) {
  const char* pets = R"json({"oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}], "$defs": {
    "cat": {"type": "object", "required": ["kind"], "properties": {
      "kind": {"const": "cat"}, "lives": {"type": "integer", "minimum": 0, "maximum": 9}}},
    "dog": {"type": "object", "required": ["kind"], "properties": {
      "kind": {"enum": ["dog", "wolf"]}, "name": {"type": "string"}}}}})json";
  EXPECT_TRUE(Validates(pets, R"({"kind":"cat","lives":9})"));
  EXPECT_TRUE(Validates(pets, R"({"kind":"wolf","name":"x"})"));
  EXPECT_FALSE(Validates(pets, R"({"kind":"cat","name":"x"})"));
  EXPECT_TRUE(Validates(R"({"oneOf": [{"const": 1}, {"enum": ["a", null]}]})", "null"));
  EXPECT_TRUE(Validates(R"({"oneOf": [{"type": "integer"}, {"enum": ["a", null]}]})", "7"));
  const auto refused = [](const std::string& parts) {
    EXPECT_THAT(GrammarOfJsonSchema(R"({"oneOf": [)" + parts + "]}"),
                StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("\"oneOf\"")))
        << parts;
  };
  refused(R"({"const": 1}, {"const": 1.0})");
  refused(R"({"type": "integer"}, {"type": "number"})");
  refused(R"({"type": "integer"}, {"enum": ["a", 3]})");
  refused(R"({"type": "integer"}, {"minLength": 2})");
  refused(R"({"type": ["null", "string"]}, {"type": "string"})");
  // A tag that is not needed, that is the same, or that only one of them has.
  refused(R"({"properties": {"k": {"const": 1}}}, {"properties": {"k": {"const": 2}}})");
  refused(R"({"properties": {"k": {"const": 1}}, "required": ["k"]},
             {"properties": {"k": {"enum": [2, 1]}}, "required": ["k"]})");
  refused(R"({"properties": {"k": {"const": 1}}, "required": ["k"]},
             {"properties": {"l": {"const": 2}}, "required": ["l"]})");
  refused(R"({"$ref": "#/oneOf/1"}, {"$ref": "#/oneOf/0"})");
}

TEST(JsonSchemaTest, RefusesByNameWhatItWouldNotEnforce) {
  const auto expect = [](const char* schema, absl::StatusCode code, const char* what) {
    EXPECT_THAT(GrammarOfJsonSchema(schema), StatusIs(code, HasSubstr(what))) << schema;
  };
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  constexpr auto kUnimplemented = absl::StatusCode::kUnimplemented;
  expect("{", kInvalid, "not JSON");
  expect("3", kInvalid, "a schema is");
  expect("false", kInvalid, "nothing can ever match");
  expect(R"({"type": "thing"})", kInvalid, "\"type\"");
  expect(R"({"properties": {"a": {"not": {}}}})", kUnimplemented, "at \"/properties/a\": \"not\"");
  expect(R"({"type": "number", "exclusiveMinimum": 1, "maximum": 1})", kInvalid, "no number");
  expect(R"({"multipleOf": 0.5})", kUnimplemented, "multipleOf");
  expect(R"({"multipleOf": 201})", kUnimplemented, "multipleOf");
  expect(R"({"multipleOf": 0})", kInvalid, "multipleOf");
  expect(R"({"multipleOf": 7, "minimum": 1, "maximum": 6})", kInvalid,
         "no multiple is within the bounds");
  expect(R"({"type": "integer", "minimum": 0.2, "maximum": 0.8})", kInvalid,
         "no integer is within the bounds");
  expect(R"({"uniqueItems": true})", kUnimplemented, "uniqueItems");
  expect(R"({"uniqueItems": true, "items": {"enum": [1, 1.0]}, "minItems": 2})", kInvalid,
         "minItems");
  expect(R"({"patternProperties": {}})", kUnimplemented, "patternProperties");
  expect(R"({"$ref": "http://example.com/x"})", kUnimplemented, "another document");
  expect(R"({"$ref": "#/$defs/none"})", kInvalid, "no such place");
  expect(R"({"$ref": "#"})", kInvalid, "nothing can ever match");
  expect(R"({"anyOf": [{}], "minLength": 1})", kUnimplemented, "beside \"anyOf\"");
  expect(R"({"oneOf": [{"type": "string"}, {"minLength": 2}]})", kUnimplemented, "oneOf");
  expect(R"({"minItems": 3, "maxItems": 2})", kInvalid, "maxItems");
  expect(R"({"minLength": 1e9})", kUnimplemented, "minLength");
  expect(R"json({"pattern": "(?=x)"})json", kUnimplemented, "pattern");
  expect((std::string(5000, '[') + std::string(5000, ']')).c_str(), kInvalid, "nested too deeply");
}

// Numbers come out as they were written, to the digit.
TEST(JsonSchemaTest, ConstantsKeepTheirNumbers) {
  for (const char* number :
       {"9223372036854775807", "18446744073709551615", "18446744073709551616",
        "18446744073709551617", "-9223372036854775809", "123456789012345678901234567890", "0.1",
        "1e3", "1.50", "-0.0", "1E+2", "0.30000000000000001"}) {
    const std::string constant = absl::StrCat(R"({"const": )", number, "}");
    EXPECT_TRUE(Validates(constant.c_str(), number)) << number;
    const std::string list = absl::StrCat(R"({"enum": [{"a": [)", number, R"(, "x"]}]})");
    EXPECT_TRUE(Validates(list.c_str(), absl::StrCat(R"({"a":[)", number, R"(,"x"]})").c_str()));
  }
  EXPECT_FALSE(Validates(R"({"const": 18446744073709551616})", "18446744073709551617"));
  EXPECT_THAT(GrammarOfJsonSchema(R"({"const": 1e400})"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("range of binary64")));
}

TEST(JsonSchemaTest, WholeNumbersAreIntegersHoweverTheyAreWritten) {
  EXPECT_TRUE(Validates(R"({"type": "integer", "const": 1.0})", "1.0"));
  EXPECT_TRUE(Validates(R"({"type": "integer", "enum": [1.5, 2e1, 18446744073709551616]})", "2e1"));
  EXPECT_FALSE(Validates(R"({"type": "integer", "enum": [1.5, 2e1]})", "1.5"));
  EXPECT_TRUE(Validates(R"({"type": "integer", "minimum": 2.0, "exclusiveMaximum": 3.0})", "2"));
  EXPECT_TRUE(Validates(R"({"type": "string", "maxLength": 2.0})", R"("ab")"));
  EXPECT_THAT(GrammarOfJsonSchema(R"({"type": "string", "maxLength": 2.5})"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("not a count")));
}

TEST(JsonSchemaTest, BoundsBeyondFifteenDigits) {
  EXPECT_TRUE(
      Validates(R"({"type": "integer", "minimum": 1e15, "maximum": 1e16})", "1234567890123456"));
  EXPECT_FALSE(
      Validates(R"({"type": "integer", "minimum": 1e15, "maximum": 1e16})", "999999999999999"));
  EXPECT_TRUE(Validates(R"({"type": "number", "minimum": 1e15})", "1000000000000000"));
  EXPECT_TRUE(Validates(R"({"type": "number", "exclusiveMaximum": -1e15})", "-1000000000000001"));
  EXPECT_FALSE(Validates(R"({"type": "number", "exclusiveMaximum": -1e15})", "-1000000000000000"));
  // Exactly, also where binary64 has a gap.
  const char* one =
      R"({"type": "integer", "exclusiveMinimum": 9007199254740992, "maximum": 9007199254740993})";
  EXPECT_TRUE(Validates(one, "9007199254740993"));
  EXPECT_FALSE(Validates(one, "9007199254740992"));
  EXPECT_FALSE(Validates(one, "9007199254740994"));
  EXPECT_TRUE(Validates(R"({"multipleOf": 7, "minimum": 1e15, "maximum": 1000000000000006})",
                        "1000000000000001"));
  // A bound that is part of the range, where nothing shorter is.
  EXPECT_TRUE(Validates(R"({"type": "number", "minimum": 1e30})", "1e30"));
  EXPECT_TRUE(Validates(
      R"({"type": "number", "exclusiveMinimum": 0.12345678901234567, "maximum": 0.12345678901234569})",
      "0.12345678901234569"));
  for (const char* schema : {R"({"type": "integer", "minimum": 1e30})",
                             R"({"type": "integer", "exclusiveMaximum": -1000000000000000000})",
                             R"({"multipleOf": 3, "minimum": 9007199254740992})",
                             R"({"type": "number", "exclusiveMinimum": 1e30})"}) {
    EXPECT_THAT(GrammarOfJsonSchema(schema),
                StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("is not supported")))
        << schema;
  }
}

// Only where nothing at all is left is the schema refused.
TEST(JsonSchemaTest, APlaceWithoutAValueStaysEmpty) {
  for (const char* nothing :
       {R"({"type": "integer", "minimum": 3, "maximum": 2})",
        R"({"type": "number", "exclusiveMinimum": 1, "maximum": 1})",
        R"({"multipleOf": 7, "minimum": 1, "maximum": 6})", R"({"minLength": 3, "maxLength": 2})",
        R"({"minItems": 3, "maxItems": 2})", R"({"type": "string", "const": 1})", "false",
        R"({"minProperties": 1, "additionalProperties": false})",
        R"({"uniqueItems": true, "items": {"enum": [1, 1.0]}, "minItems": 2})"}) {
    const std::string optional =
        absl::StrCat(R"({"properties": {"a": )", nothing, R"(, "b": {"const": 1}}})");
    EXPECT_TRUE(Validates(optional.c_str(), R"({"b":1})")) << nothing;
    EXPECT_TRUE(Validates(absl::StrCat(R"({"items": )", nothing, "}").c_str(), "[]")) << nothing;
    EXPECT_TRUE(
        Validates(absl::StrCat(R"({"anyOf": [)", nothing, R"(, {"const": 1}]})").c_str(), "1"))
        << nothing;
    const std::string needed =
        absl::StrCat(R"({"required": ["a"], "properties": {"a": )", nothing, "}}");
    EXPECT_THAT(GrammarOfJsonSchema(needed),
                StatusIs(absl::StatusCode::kInvalidArgument,
                         HasSubstr("nothing can ever match it: at \"/properties/a\"")));
  }
}

TEST(JsonSchemaTest, ReferencesArePercentDecoded) {
  const char* schema =
      R"json({"$defs": {"a b": {"const": 1}, "c/d": {"const": 2}, "e~f": {"const": 3},
    "100%": {"const": 4}, "\u00e9": {"const": 5}}, "anyOf": [{"$ref": "#/$defs/a%20b"},
    {"$ref": "#/%24defs/c~1d"}, {"$ref": "#/$defs/e~0f"}, {"$ref": "#/$defs/100%25"},
    {"$ref": "#/$defs/%C3%a9"}]})json";
  for (const char* number : {"1", "2", "3", "4", "5"})
    EXPECT_TRUE(Validates(schema, number)) << number;
  // A tag that is told apart through a reference.
  EXPECT_TRUE(Validates(
      R"json({"$defs": {"a b": {"const": 1}}, "oneOf": [{"$ref": "#/$defs/a%20b"}, {"const": 2}]})json",
      "1"));
  for (const char* reference : {"#/$defs/%", "#/$defs/%2", "#/$defs/%zz", "#/$defs/%ff"}) {
    EXPECT_THAT(GrammarOfJsonSchema(absl::StrCat(R"({"$ref": ")", reference, R"("})")),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("percent-encoded")))
        << reference;
  }
}

TEST(JsonSchemaTest, EqualConstantsDoNotExcludeEachOther) {
  const auto one_of = [](const char* a, const char* b) {
    return GrammarOfJsonSchema(
        absl::StrCat(R"({"oneOf": [{"const": )", a, R"(}, {"const": )", b, "}]}"));
  };
  for (const auto& [a, b] : {std::pair{"1", "1.0"},
                             {"100", "1e2"},
                             {R"({"a": 1, "b": 2})", R"({"b": 2, "a": 1.0})"},
                             {"[18446744073709551616]", "[18446744073709551616]"},
                             {"0.1", "0.10000000000000000001"}}) {
    EXPECT_THAT(one_of(a, b), StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("oneOf")))
        << a << " " << b;
  }
  for (const auto& [a, b] : {std::pair{"1", "true"},
                             {"18446744073709551616", "18446744073709551617"},
                             {R"({"a": 1})", R"({"a": 2})"},
                             {"[1]", "[1, 1]"}}) {
    EXPECT_THAT(one_of(a, b), IsOk()) << a << " " << b;
  }
}

TEST(ExactJsonTest, RoundsToIntegersWithinALimit) {
  const auto floor = [](const char* text) { return FloorWithin(*ParseExactJson(text), 1000); };
  const auto ceil = [](const char* text) { return CeilWithin(*ParseExactJson(text), 1000); };
  EXPECT_EQ(floor("2.5"), 2);
  EXPECT_EQ(ceil("2.5"), 3);
  EXPECT_EQ(floor("-2.5"), -3);
  EXPECT_EQ(ceil("-2.5"), -2);
  EXPECT_EQ(floor("7"), 7);
  EXPECT_EQ(ceil("7.0"), 7);
  for (const char* large :
       {"1e30", "1000.5", "18446744073709551615", "123456789012345678901234567890"}) {
    EXPECT_EQ(floor(large), 1000) << large;
    EXPECT_EQ(ceil(large), 1000) << large;
    EXPECT_EQ(floor(absl::StrCat("-", large).c_str()), -1000) << large;
    EXPECT_EQ(ceil(absl::StrCat("-", large).c_str()), -1000) << large;
  }
}

}  // namespace
}  // namespace mmfree

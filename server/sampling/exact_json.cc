#include "server/sampling/exact_json.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace mmfree {
namespace {

// Builds the document from the parser's events: unlike its own builder it sees the numbers' texts.
class Builder final : public nlohmann::json_sax<ExactJson> {
 public:
  ExactJson Take() { return std::move(root_); }
  bool out_of_range() const { return out_of_range_; }

  bool null() override { return Add(nullptr); }
  bool boolean(bool value) override { return Add(value); }
  bool number_integer(number_integer_t value) override { return Add(value); }
  bool number_unsigned(number_unsigned_t value) override { return Add(value); }
  bool number_float(number_float_t /*value*/, const string_t& text) override {
    return Add(ExactJson::binary(std::vector<uint8_t>(text.begin(), text.end())));
  }
  bool string(string_t& value) override { return Add(std::move(value)); }
  bool binary(binary_t& /*value*/) override { return false; }
  bool start_object(size_t /*size*/) override { return Open(ExactJson::object()); }
  bool key(string_t& name) override {
    key_ = std::move(name);
    return true;
  }
  bool end_object() override { return Close(); }
  bool start_array(size_t /*size*/) override { return Open(ExactJson::array()); }
  bool end_array() override { return Close(); }
  bool parse_error(size_t /*position*/, const std::string& /*token*/,
                   const ExactJson::exception& error) override {
    out_of_range_ = dynamic_cast<const ExactJson::out_of_range*>(&error) != nullptr;
    return false;
  }

 private:
  bool Add(ExactJson value) {
    Place() = std::move(value);
    return true;
  }
  bool Open(ExactJson value) {
    ExactJson& place = Place();
    place = std::move(value);
    open_.push_back(&place);
    return true;
  }
  bool Close() {
    open_.pop_back();
    return true;
  }
  // Where the next value goes. What is open stays where it is: only the last of a container is.
  ExactJson& Place() {
    if (open_.empty()) return root_;
    if (open_.back()->is_object()) return (*open_.back())[key_];
    return open_.back()->emplace_back();
  }

  ExactJson root_;
  std::vector<ExactJson*> open_;
  std::string key_;
  bool out_of_range_ = false;
};

bool HasText(const ExactJson& value) { return value.is_binary(); }

std::string TextOf(const ExactJson& number) {
  const auto& bytes = number.get_binary();
  return {bytes.begin(), bytes.end()};
}

// Whether a number's text has neither a fraction nor an exponent.
bool WrittenAsInteger(const ExactJson& number) {
  return !HasText(number) || TextOf(number).find_first_of(".eE") == std::string::npos;
}

bool SameNumber(const ExactJson& a, const ExactJson& b) {
  if (!WrittenAsInteger(a) || !WrittenAsInteger(b)) return NearestDouble(a) == NearestDouble(b);
  return Written(a) == Written(b);
}

bool SameMembers(const ExactJson& a, const ExactJson& b) {
  if (a.size() != b.size()) return false;
  for (const auto& [name, value] : a.items()) {
    const auto other = b.find(name);
    if (other == b.end() || !SameValue(value, *other)) return false;
  }
  return true;
}

}  // namespace

absl::StatusOr<ExactJson> ParseExactJson(absl::string_view text) {
  Builder builder;
  if (!ExactJson::sax_parse(text.begin(), text.end(), &builder)) {
    return absl::InvalidArgumentError(
        builder.out_of_range() ? "has a number beyond the range of binary64" : "is not JSON");
  }
  return builder.Take();
}

bool IsNumber(const ExactJson& value) { return value.is_number() || HasText(value); }

bool IsWhole(const ExactJson& value) {
  if (!HasText(value)) return value.is_number();
  const double nearest = NearestDouble(value);
  return nearest == std::floor(nearest);
}

double NearestDouble(const ExactJson& number) {
  if (!HasText(number)) return number.get<double>();
  double value = 0.0;
  (void)absl::SimpleAtod(TextOf(number), &value);
  return value;
}

int64_t FloorWithin(const ExactJson& number, int64_t limit) {
  if (number.is_number_unsigned()) {
    const auto value = number.get<uint64_t>();
    return value > static_cast<uint64_t>(limit) ? limit : static_cast<int64_t>(value);
  }
  if (number.is_number_integer()) return std::clamp(number.get<int64_t>(), -limit, limit);
  // Integers beyond 64 bits are beyond the limit, too.
  const double floor = std::floor(NearestDouble(number));
  if (floor >= static_cast<double>(limit)) return limit;
  if (floor <= -static_cast<double>(limit)) return -limit;
  return static_cast<int64_t>(floor);
}

int64_t CeilWithin(const ExactJson& number, int64_t limit) {
  const int64_t floor = FloorWithin(number, limit);
  return IsWhole(number) || floor == limit || NearestDouble(number) <= -static_cast<double>(limit)
             ? floor
             : floor + 1;
}

absl::string_view TypeName(const ExactJson& value) {
  return IsNumber(value) ? "number" : value.type_name();
}

bool SameValue(const ExactJson& a, const ExactJson& b) {
  if (IsNumber(a) && IsNumber(b)) return SameNumber(a, b);
  if (a.type() != b.type()) return false;
  if (a.is_object()) return SameMembers(a, b);
  if (a.is_array()) return std::equal(a.begin(), a.end(), b.begin(), b.end(), SameValue);
  return a == b;
}

std::string Written(const ExactJson& value) {
  if (HasText(value)) return TextOf(value);
  if (!value.is_structured()) return value.dump();
  std::string text = value.is_object() ? "{" : "[";
  const char* separator = "";
  for (const auto& [key, member] : value.items()) {
    absl::StrAppend(&text, separator);
    if (value.is_object()) absl::StrAppend(&text, ExactJson(key).dump(), ":");
    absl::StrAppend(&text, Written(member));
    separator = ",";
  }
  text += value.is_object() ? '}' : ']';
  return text;
}

}  // namespace mmfree

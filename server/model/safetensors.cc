#include "server/model/safetensors.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "server/base/status_macros.h"
#include "server/model/json.h"

namespace mmfree {
namespace {

using nlohmann::json;

constexpr int64_t kLengthBytes = 8;
// Root, tensor, array.
constexpr int kHeaderDepth = 3;

struct TypeEntry {
  TensorType type;
  absl::string_view name;
  int64_t bytes;
};
constexpr TypeEntry kTypes[] = {{TensorType::kF32, "F32", 4},
                                {TensorType::kF16, "F16", 2},
                                {TensorType::kBF16, "BF16", 2},
                                {TensorType::kU8, "U8", 1},
                                {TensorType::kI32, "I32", 4}};

uint64_t ReadLittleEndian64(const uint8_t* data) {
  uint64_t value = 0;
  for (int k = 7; k >= 0; --k) value = (value << 8) | data[k];
  return value;
}

// A JSON integer in [0, 2^63).
std::optional<int64_t> AsSize(const json& value) {
  if (!value.is_number_unsigned()) return std::nullopt;
  const uint64_t number = value.get<uint64_t>();
  if (number > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) return std::nullopt;
  return static_cast<int64_t>(number);
}

absl::Status Wrong(absl::string_view source, absl::string_view tensor, absl::string_view problem) {
  return absl::InvalidArgumentError(
      absl::StrCat(source, ": tensor ", QuotedName(tensor), ": ", problem));
}

struct Entry {
  TensorView view;
  int64_t begin = 0;
  int64_t end = 0;
};

absl::StatusOr<Entry> ParseEntry(absl::string_view source, const std::string& name,
                                 const json& value, int64_t data_bytes) {
  if (!value.is_object()) return Wrong(source, name, "expected an object in the header");
  Entry entry;
  entry.view.name = name;

  const auto dtype = value.find("dtype");
  if (dtype == value.end() || !dtype->is_string()) {
    return Wrong(source, name, "dtype: expected a string");
  }
  const std::string& type_name = dtype->get_ref<const std::string&>();
  const auto* const type =
      std::find_if(std::begin(kTypes), std::end(kTypes),
                   [&](const TypeEntry& candidate) { return candidate.name == type_name; });
  if (type == std::end(kTypes)) {
    return Wrong(
        source, name,
        absl::StrCat("dtype: expected F32, F16, BF16, U8 or I32, got ", QuotedName(type_name)));
  }
  entry.view.type = type->type;

  const auto shape = value.find("shape");
  if (shape == value.end() || !shape->is_array()) {
    return Wrong(source, name, "shape: expected an array");
  }
  if (shape->size() > SafetensorsFile::kMaxDimensions) {
    return Wrong(source, name,
                 absl::StrCat("shape: expected at most ", SafetensorsFile::kMaxDimensions,
                              " dimensions, got ", shape->size()));
  }
  int64_t bytes = type->bytes;
  for (const json& extent : *shape) {
    const std::optional<int64_t> size = AsSize(extent);
    if (!size.has_value()) return Wrong(source, name, "shape: expected sizes of at least 0");
    if (__builtin_mul_overflow(bytes, *size, &bytes)) {
      return Wrong(source, name, "shape: the size in bytes overflows 64 bits");
    }
    entry.view.shape.push_back(*size);
  }
  entry.view.bytes = bytes;

  const auto offsets = value.find("data_offsets");
  if (offsets == value.end() || !offsets->is_array() || offsets->size() != 2) {
    return Wrong(source, name, "data_offsets: expected [begin, end]");
  }
  const std::optional<int64_t> begin = AsSize((*offsets)[0]);
  const std::optional<int64_t> end = AsSize((*offsets)[1]);
  if (!begin.has_value() || !end.has_value() || *begin > *end) {
    return Wrong(source, name, "data_offsets: expected 0 <= begin <= end");
  }
  if (*end > data_bytes) {
    return Wrong(source, name,
                 absl::StrCat("truncated: its data ends at byte ", *end,
                              " of the data, but the file has only ", data_bytes));
  }
  if (*end - *begin != bytes) {
    return Wrong(source, name,
                 absl::StrCat("data_offsets: expected ", bytes, " bytes for ", type->name, " ",
                              ShapeName(entry.view.shape), ", got ", *end - *begin));
  }
  entry.begin = *begin;
  entry.end = *end;
  return entry;
}

// The format has no holes: each tensor begins where the one before it ends, the last one at the end
// of the file. `entries` are sorted by offset.
absl::Status CheckContiguous(absl::string_view source, absl::Span<const Entry> entries,
                             int64_t data_bytes) {
  int64_t expected = 0;
  for (const Entry& entry : entries) {
    if (entry.begin != expected) {
      return Wrong(source, entry.view.name,
                   absl::StrCat("data_offsets: begins at ", entry.begin,
                                entry.begin < expected ? ", overlapping" : ", leaving a hole after",
                                " the tensor that ends at ", expected));
    }
    expected = entry.end;
  }
  if (expected != data_bytes) {
    return absl::InvalidArgumentError(absl::StrCat(source, ": oversized: the tensors take ",
                                                   expected, " bytes of data, the file has ",
                                                   data_bytes));
  }
  return absl::OkStatus();
}

}  // namespace

absl::string_view TensorTypeName(TensorType type) {
  for (const TypeEntry& entry : kTypes) {
    if (entry.type == type) return entry.name;
  }
  return "?";
}

int64_t TensorTypeBytes(TensorType type) {
  for (const TypeEntry& entry : kTypes) {
    if (entry.type == type) return entry.bytes;
  }
  return 0;
}

std::string ShapeName(absl::Span<const int64_t> shape) {
  return absl::StrCat("[", absl::StrJoin(shape, ", "), "]");
}

std::string QuotedName(absl::string_view name) {
  constexpr size_t kLongest = 100;
  const bool cut = name.size() > kLongest;
  return absl::StrCat("\"", absl::CEscape(name.substr(0, kLongest)), cut ? "...\"" : "\"");
}

absl::StatusOr<SafetensorsFile> SafetensorsFile::Open(const std::string& path) {
  MMFREE_ASSIGN_OR_RETURN(Region region, Region::MapFile(path));
  MMFREE_ASSIGN_OR_RETURN(SafetensorsFile file, Parse(region.bytes(), path));
  file.region_ = std::move(region);
  return file;
}

absl::StatusOr<SafetensorsFile> SafetensorsFile::Parse(absl::Span<const uint8_t> bytes,
                                                       absl::string_view source) {
  const int64_t size = static_cast<int64_t>(bytes.size());
  if (size < kLengthBytes) {
    return absl::InvalidArgumentError(absl::StrCat(source, ": truncated: expected at least ",
                                                   kLengthBytes, " bytes, the file has ", size));
  }
  const uint64_t header_length = ReadLittleEndian64(bytes.data());
  if (header_length > static_cast<uint64_t>(kMaxHeaderBytes)) {
    return absl::InvalidArgumentError(
        absl::StrCat(source, ": not a safetensors file: its header length is ", header_length,
                     " bytes, at most ", kMaxHeaderBytes, " are accepted"));
  }
  const int64_t header_bytes = static_cast<int64_t>(header_length);
  if (header_bytes > size - kLengthBytes) {
    return absl::InvalidArgumentError(absl::StrCat(source, ": truncated: its header needs ",
                                                   header_bytes, " bytes, the file has ",
                                                   size - kLengthBytes, " after the length"));
  }
  const absl::string_view text(reinterpret_cast<const char*>(bytes.data()) + kLengthBytes,
                               static_cast<size_t>(header_bytes));
  JsonLimits limits;
  limits.max_bytes = static_cast<size_t>(kMaxHeaderBytes);
  limits.max_depth = kHeaderDepth;
  MMFREE_ASSIGN_OR_RETURN(const json header,
                          ParseJsonObject(text, absl::StrCat(source, ": header"), limits));

  SafetensorsFile file;
  file.source_ = std::string(source);
  const uint8_t* const data = bytes.data() + kLengthBytes + header_bytes;
  const int64_t data_bytes = size - kLengthBytes - header_bytes;
  std::vector<Entry> entries;
  entries.reserve(header.size());
  for (const auto& [name, value] : header.items()) {
    if (name == "__metadata__") {
      if (!value.is_object()) {
        return absl::InvalidArgumentError(
            absl::StrCat(source, ": __metadata__: expected an object"));
      }
      for (const auto& [key, text_value] : value.items()) {
        if (!text_value.is_string()) {
          return absl::InvalidArgumentError(
              absl::StrCat(source, ": __metadata__: ", QuotedName(key), ": expected a string"));
        }
        file.metadata_.emplace(key, text_value.get_ref<const std::string&>());
      }
      continue;
    }
    MMFREE_ASSIGN_OR_RETURN(Entry entry, ParseEntry(source, name, value, data_bytes));
    entry.view.data = data + entry.begin;
    entries.push_back(std::move(entry));
  }
  // Empty tensors first among equals, then by name, so that the order is fixed.
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    if (a.begin != b.begin) return a.begin < b.begin;
    if (a.end != b.end) return a.end < b.end;
    return a.view.name < b.view.name;
  });
  MMFREE_RETURN_IF_ERROR(CheckContiguous(source, entries, data_bytes));
  file.tensors_.reserve(entries.size());
  for (Entry& entry : entries) {
    file.index_.emplace(entry.view.name, file.tensors_.size());
    file.tensors_.push_back(std::move(entry.view));
  }
  return file;
}

const TensorView* SafetensorsFile::Find(absl::string_view name) const {
  const auto it = index_.find(name);
  return it == index_.end() ? nullptr : &tensors_[it->second];
}

}  // namespace mmfree

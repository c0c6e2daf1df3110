#include "server/model/packed.h"

#include <algorithm>
#include <atomic>
#include <charconv>
#include <cmath>
#include <cstring>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "server/base/numerics.h"
#include "server/base/status_macros.h"
#include "server/model/checkpoint.h"
#include "server/model/parallel.h"
#include "server/model/sha256.h"
#include "server/model/weight_table.h"

namespace mmfree {
namespace {

constexpr absl::string_view kFormatKey = "format";
constexpr absl::string_view kVersionKey = "format_version";
constexpr absl::string_view kDigestKey = "digest";

std::string ScaleKey(absl::string_view tensor) { return absl::StrCat("scale:", tensor); }
std::string Sha256Key(absl::string_view tensor) { return absl::StrCat("sha256:", tensor); }

// The shortest decimal that reads back as the same binary32.
std::string FloatText(float value) {
  char text[32];
  const std::to_chars_result end = std::to_chars(text, text + sizeof(text), value);
  return std::string(text, end.ptr);
}

const std::string* FindMetadata(const SafetensorsFile& file, absl::string_view key) {
  const auto it = file.metadata().find(key);
  return it == file.metadata().end() ? nullptr : &it->second;
}

TensorType StoredType(const PackedTensor& tensor, DType embedding_dtype) {
  switch (tensor.kind) {
    case PackedTensor::Kind::kTernary:
      return TensorType::kU8;
    case PackedTensor::Kind::kVector:
      return TensorType::kF32;
    case PackedTensor::Kind::kEmbedding:
      break;
  }
  switch (embedding_dtype) {
    case DType::kF16:
      return TensorType::kF16;
    case DType::kBF16:
      return TensorType::kBF16;
    case DType::kF32:
      break;
  }
  return TensorType::kF32;
}

bool IsSha256(absl::string_view text) {
  return text.size() == 64 && std::all_of(text.begin(), text.end(), [](char c) {
           return absl::ascii_isdigit(c) || (c >= 'a' && c <= 'f');
         });
}

class Reader {
 public:
  Reader(const ModelConfig& config, SafetensorsFile file, const LoadOptions& options)
      : config_(config), file_(std::move(file)), options_(options) {}

  absl::StatusOr<StoredModel::Parts> Run() {
    MMFREE_RETURN_IF_ERROR(CheckVersion());
    MMFREE_ASSIGN_OR_RETURN(parts_.embedding_dtype, EmbeddingDType());
    parts_.config = config_;
    parts_.packed = true;
    parts_.layout = MakePackedLayout(config_, parts_.embedding_dtype);
    for (const PackedTensor& tensor : parts_.layout.tensors) {
      MMFREE_RETURN_IF_ERROR(ReadTensor(tensor));
    }
    MMFREE_RETURN_IF_ERROR(CheckNothingElse());
    MMFREE_RETURN_IF_ERROR(CheckDigest());
    if (options_.verify) MMFREE_RETURN_IF_ERROR(Verify());
    if (options_.progress) options_.progress(parts_.layout.bytes, parts_.layout.bytes);
    parts_.region = std::move(file_).TakeRegion();
    return std::move(parts_);
  }

 private:
  absl::Status Wrong(absl::string_view problem) const {
    return absl::InvalidArgumentError(absl::StrCat(file_.source(), ": ", problem));
  }
  absl::Status WrongTensor(absl::string_view name, absl::string_view problem) const {
    return Wrong(absl::StrCat("tensor ", QuotedName(name), ": ", problem));
  }
  absl::Status WrongMetadata(absl::string_view key, absl::string_view problem) const {
    return Wrong(absl::StrCat("__metadata__ ", QuotedName(key), ": ", problem));
  }

  absl::StatusOr<std::string> Metadata(absl::string_view key) const {
    const std::string* const value = FindMetadata(file_, key);
    if (value == nullptr) return WrongMetadata(key, "is missing");
    return *value;
  }

  absl::Status CheckVersion() const {
    MMFREE_ASSIGN_OR_RETURN(const std::string version, Metadata(kVersionKey));
    if (version == kPackedFormatVersion) return absl::OkStatus();
    return absl::UnimplementedError(absl::StrCat(
        file_.source(), ": packed format version ", QuotedName(version),
        " is not supported, only \"", kPackedFormatVersion, "\"; pack the checkpoint again"));
  }

  absl::StatusOr<DType> EmbeddingDType() const {
    const TensorView* const tensor = file_.Find(kEmbeddingName);
    if (tensor == nullptr) return WrongTensor(kEmbeddingName, "is missing");
    for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
      if (TensorTypeName(tensor->type) == DTypeName(dtype)) return dtype;
    }
    return WrongTensor(kEmbeddingName, absl::StrCat("dtype: expected F32, F16 or BF16, got ",
                                                    TensorTypeName(tensor->type)));
  }

  absl::Status ReadTensor(const PackedTensor& expected) {
    const TensorView* const tensor = file_.Find(expected.name);
    if (tensor == nullptr) return WrongTensor(expected.name, "is missing");
    const TensorType type = StoredType(expected, parts_.embedding_dtype);
    if (tensor->type != type) {
      return WrongTensor(expected.name, absl::StrCat("dtype: expected ", TensorTypeName(type),
                                                     ", got ", TensorTypeName(tensor->type)));
    }
    if (tensor->shape != expected.shape) {
      return WrongTensor(expected.name, absl::StrCat("shape: expected ", ShapeName(expected.shape),
                                                     ", got ", ShapeName(tensor->shape)));
    }
    if (reinterpret_cast<uintptr_t>(tensor->data) % kTensorAlign != 0) {
      return WrongTensor(expected.name,
                         absl::StrCat("does not begin at a multiple of ", kTensorAlign,
                                      " bytes in the file; pack the checkpoint again"));
    }
    MMFREE_ASSIGN_OR_RETURN(const std::string sha256, Metadata(Sha256Key(expected.name)));
    if (!IsSha256(sha256)) {
      return WrongMetadata(
          Sha256Key(expected.name),
          absl::StrCat("expected 64 lower-case hex digits, got ", QuotedName(sha256)));
    }
    float scale = 0.0f;
    if (expected.kind == PackedTensor::Kind::kTernary) {
      MMFREE_ASSIGN_OR_RETURN(scale, ReadScale(expected.name));
    } else if (expected.kind == PackedTensor::Kind::kVector) {
      const float* const values = reinterpret_cast<const float*>(tensor->data);
      if (!std::all_of(values, values + expected.shape[0],
                       [](float value) { return std::isfinite(value); })) {
        return WrongTensor(expected.name, "has a value that is infinite or NaN");
      }
    }
    parts_.data.push_back(tensor->data);
    parts_.scales.push_back(scale);
    parts_.sha256.push_back(sha256);
    return absl::OkStatus();
  }

  absl::StatusOr<float> ReadScale(const std::string& name) const {
    MMFREE_ASSIGN_OR_RETURN(const std::string text, Metadata(ScaleKey(name)));
    float scale = 0.0f;
    const char* const end = text.data() + text.size();
    const std::from_chars_result result = std::from_chars(text.data(), end, scale);
    if (result.ec != std::errc() || result.ptr != end || !std::isfinite(scale) || scale <= 0.0f) {
      return WrongMetadata(ScaleKey(name), absl::StrCat("expected a positive finite number, got ",
                                                        QuotedName(text)));
    }
    return scale;
  }

  absl::Status CheckNothingElse() const {
    if (file_.tensors().size() == parts_.layout.tensors.size()) return absl::OkStatus();
    absl::flat_hash_set<absl::string_view> expected;
    for (const PackedTensor& tensor : parts_.layout.tensors) expected.insert(tensor.name);
    for (const TensorView& tensor : file_.tensors()) {
      if (!expected.contains(tensor.name)) {
        return WrongTensor(tensor.name, absl::StrCat("not part of a packed model with ",
                                                     config_.num_layers, " layers"));
      }
    }
    return absl::OkStatus();
  }

  // Catches a config.json, a scale or a hash that is not the one the file was written with.
  absl::Status CheckDigest() {
    MMFREE_ASSIGN_OR_RETURN(const std::string stored, Metadata(kDigestKey));
    parts_.digest =
        ModelDigest(config_, parts_.embedding_dtype, parts_.layout, parts_.scales, parts_.sha256);
    if (stored == parts_.digest) return absl::OkStatus();
    return WrongMetadata(kDigestKey, absl::StrCat("expected ", parts_.digest, " from ", kConfigFile,
                                                  " and the header, got ", QuotedName(stored),
                                                  ": one of them was changed after packing"));
  }

  absl::Status Verify() const {
    const std::vector<PackedTensor>& tensors = parts_.layout.tensors;
    std::vector<absl::Status> statuses(tensors.size());
    std::atomic<int64_t> done{0};
    ParallelFor(
        static_cast<int64_t>(tensors.size()), options_.threads,
        [&](int64_t t) {
          statuses[t] = VerifyTensor(t);
          done += tensors[t].bytes;
        },
        [&] {
          if (options_.progress && done < parts_.layout.bytes) {
            options_.progress(done, parts_.layout.bytes);
          }
        });
    for (absl::Status& status : statuses) MMFREE_RETURN_IF_ERROR(std::move(status));
    return absl::OkStatus();
  }

  absl::Status VerifyTensor(int64_t t) const {
    const PackedTensor& tensor = parts_.layout.tensors[t];
    const absl::Span<const uint8_t> bytes(parts_.data[t], static_cast<size_t>(tensor.bytes));
    const std::string sha256 = Sha256Hex(bytes);
    if (sha256 != parts_.sha256[t]) {
      return WrongTensor(tensor.name, absl::StrCat("damaged: expected SHA-256 ", parts_.sha256[t],
                                                   ", got ", sha256));
    }
    if (tensor.kind == PackedTensor::Kind::kTernary &&
        !ValidTernaryCodes(tensor.rows, tensor.cols, bytes.data())) {
      return WrongTensor(tensor.name, "has a code of 3, or padding that is not weight 0");
    }
    return absl::OkStatus();
  }

  const ModelConfig& config_;
  SafetensorsFile file_;
  const LoadOptions& options_;
  StoredModel::Parts parts_;
};

}  // namespace

bool IsPacked(const SafetensorsFile& file) {
  const std::string* const format = FindMetadata(file, kFormatKey);
  return format != nullptr && *format == kPackedFormat;
}

absl::StatusOr<StoredModel::Parts> LoadPacked(const ModelConfig& config, SafetensorsFile file,
                                              const LoadOptions& options) {
  return Reader(config, std::move(file), options).Run();
}

std::string PackedHeader(const StoredModel& model) {
  // Every name and value is plain ASCII without quotes, so nothing needs escaping.
  std::string json = absl::StrCat("{\"__metadata__\":{\"", kFormatKey, "\":\"", kPackedFormat,
                                  "\",\"", kVersionKey, "\":\"", kPackedFormatVersion, "\",\"",
                                  kDigestKey, "\":\"", model.digest(), "\"");
  const std::vector<PackedTensor>& tensors = model.layout().tensors;
  for (size_t t = 0; t < tensors.size(); ++t) {
    if (tensors[t].kind == PackedTensor::Kind::kTernary) {
      absl::StrAppend(&json, ",\"", ScaleKey(tensors[t].name), "\":\"", FloatText(model.scale(t)),
                      "\"");
    }
    absl::StrAppend(&json, ",\"", Sha256Key(tensors[t].name), "\":\"", model.sha256(t), "\"");
  }
  absl::StrAppend(&json, "}");
  for (const PackedTensor& tensor : tensors) {
    absl::StrAppend(&json, ",\"", tensor.name, "\":{\"dtype\":\"",
                    TensorTypeName(StoredType(tensor, model.embedding().dtype)), "\",\"shape\":[",
                    absl::StrJoin(tensor.shape, ","), "],\"data_offsets\":[", tensor.offset, ",",
                    tensor.offset + tensor.bytes, "]}");
  }
  absl::StrAppend(&json, "}");
  constexpr size_t kLengthBytes = 8;
  const size_t padded = (kLengthBytes + json.size() + kTensorAlign - 1) / kTensorAlign *
                        static_cast<size_t>(kTensorAlign);
  json.resize(padded - kLengthBytes, ' ');
  std::string header;
  for (size_t k = 0; k < kLengthBytes; ++k) {
    header.push_back(static_cast<char>((json.size() >> (8 * k)) & 0xff));
  }
  return header + json;
}

std::string ModelDigest(const ModelConfig& config, DType embedding_dtype,
                        const PackedLayout& layout, absl::Span<const float> scales,
                        absl::Span<const std::string> sha256) {
  std::string text = absl::StrCat(
      "mmfree model 1\n", "vocab_size ", config.vocab_size, "\nhidden_size ", config.hidden_size,
      "\nintermediate_size ", config.intermediate_size, "\nnum_hidden_layers ", config.num_layers,
      "\nrms_norm_eps ", absl::Hex(FloatToBits(config.rms_norm_eps), absl::kZeroPad8),
      "\nuse_lower_bound ", config.use_lower_bound ? 1 : 0, "\nbos_token_id ", config.bos_token_id,
      "\neos_token_id ", config.eos_token_id, "\n");
  for (size_t t = 0; t < layout.tensors.size(); ++t) {
    const PackedTensor& tensor = layout.tensors[t];
    absl::StrAppend(&text, tensor.name, " ", TensorTypeName(StoredType(tensor, embedding_dtype)),
                    " ", sha256[t]);
    if (tensor.kind == PackedTensor::Kind::kTernary) {
      absl::StrAppend(&text, " ", absl::Hex(FloatToBits(scales[t]), absl::kZeroPad8));
    }
    absl::StrAppend(&text, "\n");
  }
  return Sha256Hex(text);
}

}  // namespace mmfree

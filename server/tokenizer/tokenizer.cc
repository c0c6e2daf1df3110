#include "server/tokenizer/tokenizer.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <system_error>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/strip.h"
#include "server/base/status_macros.h"
#include "server/tokenizer/bpe_encoder.h"
#include "server/tokenizer/sentencepiece_model.h"
#include "server/tokenizer/tokenizer_config.h"
#include "server/tokenizer/utf8.h"

namespace mmfree {
namespace {

constexpr absl::string_view kSpace = "\u2581";

// Far above any real file; keeps a wrong path from filling the memory.
constexpr uintmax_t kMaxModelFileBytes = uintmax_t{256} << 20;
constexpr uintmax_t kMaxConfigFileBytes = uintmax_t{16} << 20;
// The encoder counts in int32, and a space takes three bytes once it is U+2581.
constexpr size_t kMaxTextBytes = size_t{512} << 20;

absl::Status Annotate(const absl::Status& status, const std::string& path) {
  return absl::Status(status.code(), absl::StrCat(path, ": ", status.message()));
}

absl::StatusOr<std::string> ReadFile(const std::string& path, uintmax_t max_bytes) {
  std::error_code error;
  const auto file = std::filesystem::status(path, error);
  if (!std::filesystem::exists(file))
    return absl::NotFoundError(absl::StrCat(path, ": no such file"));
  if (!std::filesystem::is_regular_file(file)) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": not a regular file"));
  }
  const uintmax_t size = std::filesystem::file_size(path, error);
  if (error) return absl::InvalidArgumentError(absl::StrCat(path, ": ", error.message()));
  if (size > max_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": ", size, " bytes; at most ", max_bytes, " are allowed"));
  }
  std::string content(size, '\0');
  std::ifstream stream(path, std::ios::binary);
  if (!stream.read(content.data(), static_cast<std::streamsize>(size))) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": cannot be read"));
  }
  return content;
}

// What SentencePiece does to text before BPE: with the identity normalizer only spaces matter.
std::string Normalize(absl::string_view text, bool dummy_prefix, bool remove_extra_whitespaces) {
  std::string out;
  if (remove_extra_whitespaces) {
    while (absl::ConsumePrefix(&text, " ")) {
    }
  }
  if (text.empty()) return out;
  out.reserve(text.size() + text.size() / 2 + kSpace.size());
  const auto append = [&out](absl::string_view s) { out.append(s.data(), s.size()); };
  if (dummy_prefix) append(kSpace);
  bool after_space = remove_extra_whitespaces;
  while (!text.empty()) {
    const size_t space = std::min(text.find(' '), text.size());
    append(text.substr(0, space));
    text.remove_prefix(space);
    if (space > 0) after_space = false;
    if (absl::ConsumePrefix(&text, " ")) {
      if (!after_space) append(kSpace);
      after_space = remove_extra_whitespaces;
    }
  }
  if (remove_extra_whitespaces) {
    absl::string_view kept = out;
    while (absl::ConsumeSuffix(&kept, kSpace)) {
    }
    out.resize(kept.size());
  }
  return out;
}

class BpeTokenizer final : public Tokenizer {
 public:
  BpeTokenizer(SentencePieceModel model, bool add_bos)
      : model_(std::move(model)), encoder_(model_), add_bos_(add_bos) {
    token_bytes_.reserve(model_.pieces.size());
    for (const SentencePieceModel::Piece& piece : model_.pieces) {
      token_bytes_.push_back(BytesOf(piece));
    }
  }

  absl::StatusOr<std::vector<int32_t>> Encode(absl::string_view text,
                                              const EncodeOptions& options) const override {
    if (text.size() > kMaxTextBytes) {
      return absl::InvalidArgumentError(absl::StrCat("text has ", text.size(), " bytes; at most ",
                                                     kMaxTextBytes, " are allowed"));
    }
    if (const size_t bad = FindInvalidUtf8(text); bad != text.size()) {
      return absl::InvalidArgumentError(absl::StrCat("text is not valid UTF-8 at byte ", bad));
    }
    std::vector<int32_t> ids;
    if (options.continuation) {
      encoder_.Encode(Normalize(text, /*dummy_prefix=*/false, /*remove_extra_whitespaces=*/false),
                      &ids);
      return ids;
    }
    if (options.bos && add_bos_) ids.push_back(bos_id());
    encoder_.Encode(Normalize(text, model_.add_dummy_prefix, model_.remove_extra_whitespaces),
                    &ids);
    return ids;
  }

  absl::StatusOr<std::string> Decode(absl::Span<const int32_t> ids,
                                     bool starts_text) const override {
    StreamDecoder decoder(this, starts_text);
    std::string text;
    for (size_t i = 0; i < ids.size(); ++i) {
      if (ids[i] < 0 || ids[i] >= size()) {
        return absl::InvalidArgumentError(
            absl::StrCat("token id ", ids[i], " at index ", i, " is not in [0, ", size(), ")"));
      }
      text += decoder.Append(ids[i]);
    }
    text += decoder.Finish();
    return text;
  }

  absl::string_view TokenBytes(int32_t id) const override {
    if (id < 0 || id >= size()) return {};
    return token_bytes_[static_cast<size_t>(id)];
  }
  absl::string_view Piece(int32_t id) const override {
    if (id < 0 || id >= size()) return {};
    return model_.pieces[static_cast<size_t>(id)].text;
  }
  int32_t bos_id() const override { return model_.bos_id; }
  int32_t eos_id() const override { return model_.eos_id; }
  int32_t size() const override { return static_cast<int32_t>(model_.pieces.size()); }
  bool adds_dummy_prefix() const override { return model_.add_dummy_prefix; }

 private:
  std::string BytesOf(const SentencePieceModel::Piece& piece) const {
    switch (piece.type) {
      case SentencePieceModel::Type::kControl:
        return "";
      case SentencePieceModel::Type::kUnknown:
        return model_.unk_surface;
      case SentencePieceModel::Type::kByte:
        return std::string(1, static_cast<char>(piece.byte));
      default:
        return absl::StrReplaceAll(piece.text, {{kSpace, " "}});
    }
  }

  const SentencePieceModel model_;
  const BpeEncoder encoder_;  // refers to model_
  const bool add_bos_;
  std::vector<std::string> token_bytes_;  // by id
};

absl::StatusOr<TokenizerConfig> ReadConfig(const std::string& path) {
  const absl::StatusOr<std::string> json = ReadFile(path, kMaxConfigFileBytes);
  if (absl::IsNotFound(json.status())) return TokenizerConfig();
  if (!json.ok()) return json.status();
  absl::StatusOr<TokenizerConfig> config = TokenizerConfig::FromJson(*json);
  if (!config.ok()) return Annotate(config.status(), path);
  return config;
}

// `expected` is what tokenizer_config.json says, empty when it says nothing.
absl::Status CheckSpecial(absl::string_view key, const SentencePieceModel& model, int32_t id,
                          absl::string_view expected) {
  if (id < 0) return absl::InvalidArgumentError(absl::StrCat("no control piece is its ", key));
  const std::string& piece = model.pieces[static_cast<size_t>(id)].text;
  if (expected.empty() || expected == piece) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      "its ", key, " is \"", piece, "\", but tokenizer_config.json says \"", expected, "\""));
}

absl::StatusOr<SentencePieceModel> ReadModel(const std::string& path, const TokenizerConfig& config,
                                             int64_t vocab_size) {
  MMFREE_ASSIGN_OR_RETURN(const std::string serialized, ReadFile(path, kMaxModelFileBytes));
  absl::StatusOr<SentencePieceModel> model = SentencePieceModel::Parse(serialized);
  if (!model.ok()) return Annotate(model.status(), path);
  if (static_cast<int64_t>(model->pieces.size()) > vocab_size) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": ", model->pieces.size(),
                                                   " pieces, more than the model's vocabulary of ",
                                                   vocab_size));
  }
  for (const absl::Status& status :
       {CheckSpecial("bos_token", *model, model->bos_id, config.bos_token),
        CheckSpecial("eos_token", *model, model->eos_id, config.eos_token)}) {
    if (!status.ok()) return Annotate(status, path);
  }
  return model;
}

}  // namespace

absl::StatusOr<std::shared_ptr<const Tokenizer>> Tokenizer::Load(const std::string& directory,
                                                                 int64_t vocab_size) {
  MMFREE_ASSIGN_OR_RETURN(const TokenizerConfig config,
                          ReadConfig(absl::StrCat(directory, "/tokenizer_config.json")));
  MMFREE_ASSIGN_OR_RETURN(
      SentencePieceModel model,
      ReadModel(absl::StrCat(directory, "/tokenizer.model"), config, vocab_size));
  return std::make_shared<const BpeTokenizer>(std::move(model), config.add_bos_token);
}

}  // namespace mmfree

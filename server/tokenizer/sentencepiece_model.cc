#include "server/tokenizer/sentencepiece_model.h"

#include <algorithm>
#include <bitset>
#include <cmath>
#include <cstring>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "server/base/status_macros.h"
#include "server/tokenizer/utf8.h"

namespace mmfree {
namespace {

using Piece = SentencePieceModel::Piece;
using Type = SentencePieceModel::Type;

absl::Status Damaged(absl::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat("not a SentencePiece model: ", what));
}

// One field of a protobuf message.
struct Field {
  enum class Wire : uint8_t { kVarint = 0, kFixed64 = 1, kBytes = 2, kFixed32 = 5 };
  uint64_t number = 0;
  Wire wire = Wire::kVarint;
  uint64_t varint = 0;      // kVarint
  absl::string_view bytes;  // kBytes: the payload; kFixed32, kFixed64: little-endian
};

bool TakeVarint(absl::string_view* input, uint64_t* value) {
  *value = 0;
  for (int shift = 0; shift < 64 && !input->empty(); shift += 7) {
    const uint8_t byte = static_cast<uint8_t>(input->front());
    input->remove_prefix(1);
    *value |= uint64_t{byte & 0x7Fu} << shift;
    if (byte < 0x80) return true;
  }
  return false;
}

bool TakeBytes(absl::string_view* input, uint64_t size, absl::string_view* bytes) {
  if (size > input->size()) return false;
  *bytes = input->substr(0, size);
  input->remove_prefix(size);
  return true;
}

bool TakeField(absl::string_view* input, Field* field) {
  uint64_t tag = 0;
  if (!TakeVarint(input, &tag) || tag >> 3 == 0) return false;
  *field = Field{tag >> 3, static_cast<Field::Wire>(tag & 7), 0, {}};
  switch (field->wire) {
    case Field::Wire::kVarint:
      return TakeVarint(input, &field->varint);
    case Field::Wire::kFixed64:
      return TakeBytes(input, 8, &field->bytes);
    case Field::Wire::kFixed32:
      return TakeBytes(input, 4, &field->bytes);
    case Field::Wire::kBytes: {
      uint64_t size = 0;
      return TakeVarint(input, &size) && TakeBytes(input, size, &field->bytes);
    }
  }
  return false;  // groups and what protobuf does not define
}

// Calls `visit` for every field of a message; `name` is the message's in errors.
absl::Status ForEachField(absl::string_view message, absl::string_view name,
                          absl::FunctionRef<absl::Status(const Field&)> visit) {
  absl::string_view rest = message;
  while (!rest.empty()) {
    const size_t offset = message.size() - rest.size();
    Field field;
    if (!TakeField(&rest, &field)) {
      return Damaged(absl::StrCat(name, " is damaged or cut short at its byte ", offset, " of ",
                                  message.size()));
    }
    MMFREE_RETURN_IF_ERROR(visit(field));
  }
  return absl::OkStatus();
}

// The getters leave `value` alone when the field has another wire type, as protobuf does.
void Get(const Field& field, bool* value) {
  if (field.wire == Field::Wire::kVarint) *value = field.varint != 0;
}
void Get(const Field& field, uint64_t* value) {
  if (field.wire == Field::Wire::kVarint) *value = field.varint;
}
void Get(const Field& field, float* value) {
  if (field.wire != Field::Wire::kFixed32) return;
  uint32_t bits = 0;
  for (size_t i = sizeof(bits); i-- > 0;) bits = bits << 8 | static_cast<uint8_t>(field.bytes[i]);
  std::memcpy(value, &bits, sizeof(bits));
}
void Get(const Field& field, std::string* value) {
  if (field.wire == Field::Wire::kBytes) *value = std::string(field.bytes);
}

// "<0x0A>" is 10; false for anything else.
bool ParseBytePiece(absl::string_view text, uint8_t* byte) {
  uint32_t value = 0;
  if (!absl::ConsumePrefix(&text, "<0x") || !absl::ConsumeSuffix(&text, ">") || text.size() != 2 ||
      !absl::SimpleHexAtoi(text, &value)) {
    return false;
  }
  *byte = static_cast<uint8_t>(value);
  return true;
}

absl::StatusOr<Piece> ParsePiece(absl::string_view message, size_t id) {
  const std::string name = absl::StrCat("piece ", id);
  Piece piece;
  uint64_t type = static_cast<uint64_t>(Type::kNormal);
  MMFREE_RETURN_IF_ERROR(ForEachField(message, name, [&](const Field& field) {
    if (field.number == 1) Get(field, &piece.text);
    if (field.number == 2) Get(field, &piece.score);
    if (field.number == 3) Get(field, &type);
    return absl::OkStatus();
  }));
  if (piece.text.empty()) return Damaged(absl::StrCat(name, " is empty"));
  if (FindInvalidUtf8(piece.text) != piece.text.size()) {
    return Damaged(absl::StrCat(name, " is not UTF-8"));
  }
  if (std::isnan(piece.score)) return Damaged(absl::StrCat(name, " has a score of NaN"));
  if (type < static_cast<uint64_t>(Type::kNormal) || type > static_cast<uint64_t>(Type::kByte)) {
    return Damaged(absl::StrCat(name, " has the unknown type ", type));
  }
  piece.type = static_cast<Type>(type);
  if (piece.type == Type::kUserDefined || piece.type == Type::kUnused) {
    return absl::UnimplementedError(absl::StrCat(
        "piece ", id, " \"", piece.text, "\" is ",
        piece.type == Type::kUnused ? "unused" : "user-defined", ", which is not supported"));
  }
  if (piece.type == Type::kByte && !ParseBytePiece(piece.text, &piece.byte)) {
    return Damaged(absl::StrCat(name, " is a byte, but not spelled like \"<0x0A>\""));
  }
  return piece;
}

struct TrainerSettings {
  uint64_t model_type = 1;  // unigram
  bool treat_whitespace_as_suffix = false;
  bool byte_fallback = false;
  std::string bos_piece = "<s>";
  std::string eos_piece = "</s>";
};

absl::Status ParseTrainerSpec(absl::string_view message, TrainerSettings* settings,
                              std::string* unk_surface) {
  return ForEachField(message, "trainer_spec", [&](const Field& field) {
    if (field.number == 3) Get(field, &settings->model_type);
    if (field.number == 24) Get(field, &settings->treat_whitespace_as_suffix);
    if (field.number == 35) Get(field, &settings->byte_fallback);
    if (field.number == 44) Get(field, unk_surface);
    if (field.number == 46) Get(field, &settings->bos_piece);
    if (field.number == 47) Get(field, &settings->eos_piece);
    return absl::OkStatus();
  });
}

struct NormalizerSettings {
  std::string name;
  std::string charsmap;
  bool escape_whitespaces = true;
};

absl::Status ParseNormalizerSpec(absl::string_view message, NormalizerSettings* settings,
                                 SentencePieceModel* model) {
  return ForEachField(message, "normalizer_spec", [&](const Field& field) {
    if (field.number == 1) Get(field, &settings->name);
    if (field.number == 2) Get(field, &settings->charsmap);
    if (field.number == 3) Get(field, &model->add_dummy_prefix);
    if (field.number == 4) Get(field, &model->remove_extra_whitespaces);
    if (field.number == 5) Get(field, &settings->escape_whitespaces);
    return absl::OkStatus();
  });
}

absl::Status CheckSupported(const TrainerSettings& trainer, const NormalizerSettings& normalizer) {
  constexpr uint64_t kBpe = 2;
  if (trainer.model_type != kBpe) {
    return absl::UnimplementedError(
        absl::StrCat("model_type ", trainer.model_type, " is not supported, only 2 (BPE)"));
  }
  if (trainer.treat_whitespace_as_suffix) {
    return absl::UnimplementedError("treat_whitespace_as_suffix = true is not supported");
  }
  if (!trainer.byte_fallback) {
    return absl::UnimplementedError("byte_fallback = false is not supported");
  }
  if (!normalizer.charsmap.empty()) {
    return absl::UnimplementedError(
        absl::StrCat("normalizer \"", normalizer.name, "\" is not supported, only \"identity\""));
  }
  if (!normalizer.escape_whitespaces) {
    return absl::UnimplementedError("escape_whitespaces = false is not supported");
  }
  return absl::OkStatus();
}

absl::Status CheckVocabulary(const std::vector<Piece>& pieces) {
  absl::flat_hash_set<absl::string_view> seen;
  std::bitset<256> bytes;
  for (size_t id = 0; id < pieces.size(); ++id) {
    if (!seen.insert(pieces[id].text).second) {
      return Damaged(absl::StrCat("piece ", id, " \"", pieces[id].text, "\" stands there twice"));
    }
    if (pieces[id].type == Type::kByte) bytes.set(pieces[id].byte);
  }
  if (!bytes.all()) {
    return Damaged(absl::StrCat("it has ", bytes.count(), " of the 256 byte pieces"));
  }
  return absl::OkStatus();
}

int32_t FindControl(const std::vector<Piece>& pieces, absl::string_view text) {
  const auto it = std::find_if(pieces.begin(), pieces.end(), [&](const Piece& piece) {
    return piece.type == Type::kControl && piece.text == text;
  });
  return it == pieces.end() ? -1 : static_cast<int32_t>(it - pieces.begin());
}

}  // namespace

absl::StatusOr<SentencePieceModel> SentencePieceModel::Parse(absl::string_view serialized) {
  SentencePieceModel model;
  TrainerSettings trainer;
  NormalizerSettings normalizer;
  bool has_trainer = false;
  bool has_normalizer = false;
  // Protobuf merges a repeated embedded message into the first; so do the settings here.
  MMFREE_RETURN_IF_ERROR(ForEachField(serialized, "the file", [&](const Field& field) {
    if (field.wire != Field::Wire::kBytes) return absl::OkStatus();
    if (field.number == 1) {
      absl::StatusOr<Piece> piece = ParsePiece(field.bytes, model.pieces.size());
      if (!piece.ok()) return piece.status();
      model.pieces.push_back(*std::move(piece));
    } else if (field.number == 2) {
      has_trainer = true;
      return ParseTrainerSpec(field.bytes, &trainer, &model.unk_surface);
    } else if (field.number == 3) {
      has_normalizer = true;
      return ParseNormalizerSpec(field.bytes, &normalizer, &model);
    }
    return absl::OkStatus();
  }));
  if (model.pieces.empty()) return Damaged("it has no pieces");
  if (!has_trainer || !has_normalizer) {
    return Damaged("it ends before its trainer and normalizer settings (cut short?)");
  }
  MMFREE_RETURN_IF_ERROR(CheckSupported(trainer, normalizer));
  MMFREE_RETURN_IF_ERROR(CheckVocabulary(model.pieces));
  model.bos_id = FindControl(model.pieces, trainer.bos_piece);
  model.eos_id = FindControl(model.pieces, trainer.eos_piece);
  return model;
}

}  // namespace mmfree

#include "tests/unit/tokenizer/sentencepiece_library.h"

#include <sentencepiece_processor.h>

namespace mmfree {

struct SentencePieceLibrary::Impl {
  sentencepiece::SentencePieceProcessor processor;
};

SentencePieceLibrary::SentencePieceLibrary(const std::string& serialized_model)
    : impl_(std::make_unique<Impl>()),
      ok_(impl_->processor.LoadFromSerializedProto(serialized_model).ok()) {}

SentencePieceLibrary::~SentencePieceLibrary() = default;

std::vector<int32_t> SentencePieceLibrary::Encode(const std::string& text) const {
  std::vector<int> ids;
  impl_->processor.Encode(text, &ids).IgnoreError();
  return ids;
}

std::string SentencePieceLibrary::Decode(const std::vector<int32_t>& ids) const {
  std::string text;
  impl_->processor.Decode(ids, &text).IgnoreError();
  return text;
}

}  // namespace mmfree

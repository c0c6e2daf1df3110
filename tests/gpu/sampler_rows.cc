#include "tests/gpu/sampler_rows.h"

#include <random>
#include <utility>

#include "absl/strings/strip.h"

namespace mmfree {
namespace {

// All bytes, and pieces of letters.
Vocabulary MakeVocabulary(int64_t vocab) {
  std::mt19937 random(2);
  std::vector<std::string> bytes(3);
  for (int byte = 0; byte < 256; ++byte) bytes.push_back(std::string(1, static_cast<char>(byte)));
  while (static_cast<int64_t>(bytes.size()) < vocab) {
    std::string piece = random() % 2 == 0 ? " " : "";
    for (size_t n = 1 + random() % 8; n > 0; --n) {
      piece.push_back("etaoinshrdlu{}[]\",:0123456789"[random() % 29]);
    }
    bytes.push_back(piece);
  }
  const auto trie = std::make_shared<const TokenTrie>(bytes);
  return {trie, trie};
}

bool SetOption(const std::string& option, ConstraintCache* constraints,
               RequestSampler::Options* options) {
  options->logprobs = DrawLogprobs::kNone;
  const bool all = option == "all";
  const bool filters = all || option == "filters";
  const bool constrained = all || option == "mask";
  if (constrained) {
    options->constraint =
        *constraints->Compile(ConstraintCache::Kind::kRegex, "(( ?[a-z]+){1,9} ?[0-9]{1,3},)*");
    options->end_tokens = {2};
  }
  const bool allowed = option == "allowed";
  for (int32_t id = 0; allowed && id < 20'000; ++id) options->allowed.push_back(id);
  const bool bias = all || option == "bias";
  for (int32_t id = 0; bias && id < 16; ++id) options->bias.emplace_back(31 * id, 1.0f);
  const bool penalties = all || option == "penalties";
  if (penalties) options->penalties = {1.1f, 64, 0.1f, 0.1f};
  if (filters || option == "top_k") options->filters.top_k = filters ? 400 : 40;
  if (filters || option == "typical_p") options->filters.typical_p = 0.95f;
  if (filters || option == "top_p") options->filters.top_p = 0.9f;
  if (filters || option == "min_p") options->filters.min_p = 0.05f;
  const bool logprobs = all || option == "logprobs";
  if (logprobs) {
    options->logprobs = DrawLogprobs::kModel;
    options->top_logprobs = 5;
  }
  return constrained || allowed || bias || penalties || logprobs || options->filters.any();
}

}  // namespace

class SamplerRows::OnHost final : public TokenSampler {
 public:
  explicit OnHost(TokenSampler* sampler) : sampler_(sampler) {}
  SampledToken Sample(absl::Span<const float> logits, const SamplingParams& params,
                      uint64_t position) override {
    return sampler_->Sample(logits, params, position);
  }

 private:
  TokenSampler* sampler_;
};

std::unique_ptr<SamplerRows> SamplerRows::Create(const std::string& option, int64_t vocab,
                                                 int32_t rows) {
  auto made = std::make_unique<SamplerRows>();
  made->samplers_.resize(static_cast<size_t>(rows), nullptr);
  if (option == "none" || option == "temperature") return made;
  absl::string_view name = option;
  const bool on_host = absl::ConsumeSuffix(&name, "-host");
  ConstraintCache constraints([vocab] { return MakeVocabulary(vocab); });
  RequestSampler::Options options;
  if (!SetOption(std::string(name), &constraints, &options)) return nullptr;
  const std::vector<int32_t> context(64, 7);
  for (int32_t n = 0; n < rows; ++n) {
    made->requests_.push_back(std::make_unique<RequestSampler>(options, vocab, context));
    made->samplers_[n] = made->requests_.back().get();
    if (!on_host) continue;
    made->wrappers_.push_back(std::make_unique<OnHost>(made->samplers_[n]));
    made->samplers_[n] = made->wrappers_.back().get();
  }
  return made;
}

void SamplerRows::Append(int32_t row, int32_t token) {
  if (!requests_.empty()) requests_[row]->Append(token);
}

}  // namespace mmfree

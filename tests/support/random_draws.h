// Draws of every kind over logits of every kind, for comparing those who make them.
#ifndef MMFREE_TESTS_SUPPORT_RANDOM_DRAWS_H_
#define MMFREE_TESTS_SUPPORT_RANDOM_DRAWS_H_

#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "server/backends/backend.h"
#include "server/sampling/token_draw.h"

namespace mmfree {

// A draw, the logits it is of, and what its spans are over.
class RandomDraw final : public TokenSampler {
 public:
  SampledToken Sample(absl::Span<const float> logits, const SamplingParams& params,
                      uint64_t position) override {
    return DrawToken(draw, logits, params, position);
  }
  bool Describe(const SamplingParams& /*params*/, TokenDraw* out) const override {
    *out = draw;
    return true;
  }
  // What the draw is, for failures.
  std::string Name() const;

  std::vector<float> logits;
  std::string logits_name;
  SamplingParams params;  // whose sampler this is
  uint64_t position = 0;
  TokenDraw draw;

  std::vector<int32_t> ends;
  std::vector<int32_t> banned;
  std::vector<std::pair<int32_t, float>> bias;
  std::vector<TokenCount> window;
  std::vector<TokenCount> emitted;
};

class RandomDraws {
 public:
  explicit RandomDraws(uint64_t seed) : random_(seed) {}

  // Of a vocabulary of this size: ties, NaNs, infinities, masks that leave nothing, shares at
  // their ends and more, each now and then.
  std::unique_ptr<RandomDraw> Make(int32_t vocab);

 private:
  bool OneIn(int n) { return random_() % static_cast<uint64_t>(n) == 0; }
  int32_t Below(int64_t end) {
    return static_cast<int32_t>(random_() % static_cast<uint64_t>(end));
  }
  float Share() { return static_cast<float>(Below(1000) + 1) * 0.001f; }
  void FillLogits(int32_t vocab, RandomDraw* draw);
  std::shared_ptr<const TokenMask> Mask(int32_t vocab);
  std::vector<int32_t> DistinctIds(int32_t vocab, int32_t most);

  std::mt19937_64 random_;
  std::shared_ptr<const TokenMask> last_mask_;  // so that masks come again
};

// The same token, and the same bits of every logprob; a NaN is a NaN.
bool SameDraw(const SampledToken& a, const SampledToken& b);
std::string ToString(const SampledToken& sampled);

}  // namespace mmfree

#endif  // MMFREE_TESTS_SUPPORT_RANDOM_DRAWS_H_

#include "tests/support/random_draws.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <sstream>

namespace mmfree {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

bool SameFloat(float a, float b) {
  return std::bit_cast<uint32_t>(a) == std::bit_cast<uint32_t>(b) ||
         (std::isnan(a) && std::isnan(b));
}

}  // namespace

std::string RandomDraw::Name() const {
  std::ostringstream out;
  out << logits.size() << " logits (" << logits_name << "), temperature " << params.temperature;
  if (draw.allowed != nullptr) out << ", " << draw.allowed->Count() << " allowed";
  if (draw.constraint != nullptr) out << ", " << draw.constraint->Count() << " in the constraint";
  out << ", " << ends.size() << " ends (" << draw.may_end << "), " << banned.size() << " banned, "
      << bias.size() << " biases, " << window.size() << " in the window x"
      << draw.penalties.repetition << ", " << emitted.size() << " emitted -"
      << draw.penalties.frequency << " -" << draw.penalties.presence << ", top_k "
      << draw.filters.top_k << ", typical_p " << draw.filters.typical_p << ", top_p "
      << draw.filters.top_p << ", min_p " << draw.filters.min_p << ", logprobs "
      << static_cast<int>(draw.logprobs) << " top " << draw.top_logprobs;
  return out.str();
}

void RandomDraws::FillLogits(int32_t vocab, RandomDraw* draw) {
  std::normal_distribution<float> normal;
  const float spreads[] = {3.0f, 0.01f, 1.0f, 30.0f, 1e-30f};
  const float spread = spreads[OneIn(2) ? 0 : Below(5)];
  const float center = OneIn(4) ? 20.0f * normal(random_) : 0.0f;
  draw->logits.resize(static_cast<size_t>(vocab));
  for (float& logit : draw->logits) logit = center + spread * normal(random_);
  draw->logits_name = "spread " + std::to_string(spread);
  const auto some = [&](float value) {
    for (int32_t n = 1 + Below(3); n > 0; --n) draw->logits[Below(vocab)] = value;
  };
  switch (Below(12)) {
    case 0:
      for (float& logit : draw->logits) logit = std::floor(logit * 2.0f);
      draw->logits_name += ", ties";
      break;
    case 1:
      for (float& logit : draw->logits) logit = logit > center ? center + 1.0f : center;
      draw->logits_name += ", two values";
      break;
    case 2: {
      const float values[] = {0.0f, 2.5f, -1e30f, kNaN, kInf, -kInf};
      const float value = values[Below(6)];
      std::fill(draw->logits.begin(), draw->logits.end(), value);
      draw->logits_name = "all " + std::to_string(value);
      break;
    }
    case 3:
      some(kNaN);
      some(-kInf);
      draw->logits_name += ", NaN and -inf";
      break;
    case 4:
      some(kInf);
      some(kNaN);
      draw->logits_name += ", NaN and inf";
      break;
    case 5:
      for (float& logit : draw->logits) logit = OneIn(2) ? 0.0f : -0.0f;
      some(-1.0f);
      draw->logits_name = "zeros of both signs";
      break;
    case 6:
      for (float& logit : draw->logits) logit = OneIn(3) ? kNaN : OneIn(2) ? -kInf : logit;
      draw->logits_name += ", many NaN and -inf";
      break;
    case 7:
      some(3e38f);
      some(-3e38f);
      draw->logits_name += ", huge";
      break;
    default:
      break;
  }
}

std::shared_ptr<const TokenMask> RandomDraws::Mask(int32_t vocab) {
  if (last_mask_ != nullptr && last_mask_->size() == vocab && OneIn(2)) return last_mask_;
  const bool most = OneIn(2);
  auto mask = std::make_shared<TokenMask>(vocab, most);
  if (OneIn(3)) {  // any ids
    const int n = 1 + Below(4);
    for (int32_t id = 0; id < vocab; ++id) {
      if (!OneIn(n)) continue;
      most ? mask->Remove(id) : mask->Add(id);
    }
  } else if (!OneIn(20)) {  // a few
    for (int32_t n = 1 + Below(20); n > 0; --n) {
      const int32_t id = Below(vocab);
      most ? mask->Remove(id) : mask->Add(id);
    }
  }
  last_mask_ = mask;
  return mask;
}

std::vector<int32_t> RandomDraws::DistinctIds(int32_t vocab, int32_t most) {
  std::vector<int32_t> ids(static_cast<size_t>(Below(most + 1)));
  for (int32_t& id : ids) id = Below(vocab);
  std::sort(ids.begin(), ids.end());
  ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
  std::shuffle(ids.begin(), ids.end(), random_);
  return ids;
}

std::unique_ptr<RandomDraw> RandomDraws::Make(int32_t vocab) {
  auto made = std::make_unique<RandomDraw>();
  FillLogits(vocab, made.get());
  TokenDraw& draw = made->draw;
  if (OneIn(3)) draw.allowed = Mask(vocab);
  if (OneIn(3)) draw.constraint = Mask(vocab);
  if (OneIn(3)) made->ends = DistinctIds(vocab, 4);
  draw.may_end = OneIn(2);
  if (OneIn(3)) made->banned = DistinctIds(vocab, 64);
  if (OneIn(3)) {
    for (const int32_t id : DistinctIds(vocab, OneIn(10) ? 1024 : 8)) {
      made->bias.emplace_back(id, 16.0f * (Share() - 0.5f));
    }
  }
  if (OneIn(3)) {
    for (const int32_t id : DistinctIds(vocab, OneIn(10) ? 1024 : 64)) {
      made->window.push_back({id, 1 + Below(3)});
    }
    draw.penalties.repetition = OneIn(4) ? 10.0f : 0.3f + 2.0f * Share();
  }
  if (OneIn(3)) {
    for (const int32_t id : DistinctIds(vocab, OneIn(10) ? 3000 : 100)) {
      made->emitted.push_back({id, 1 + Below(9)});
    }
    draw.penalties.frequency = 4.0f * Share() - 2.0f;
    draw.penalties.presence = OneIn(2) ? 0.0f : 4.0f * Share() - 2.0f;
  }
  FilterOptions& filters = draw.filters;
  if (OneIn(3)) {
    filters.top_k = static_cast<uint32_t>(1 + Below(OneIn(2) ? 50 : 2 * int64_t{vocab}));
  }
  if (OneIn(3)) filters.typical_p = OneIn(8) ? 1e-9f : Share();
  if (OneIn(3)) filters.top_p = OneIn(4) ? 0.0f : OneIn(4) ? 0.9999999f : Share();
  if (OneIn(3)) filters.min_p = OneIn(8) ? 1.0f : OneIn(4) ? 1e-30f : 0.3f * Share();
  draw.logprobs = static_cast<DrawLogprobs>(Below(3));
  draw.top_logprobs = OneIn(2) ? 0 : 1 + Below(20);
  draw.ends = made->ends;
  draw.banned = made->banned;
  draw.bias = made->bias;
  draw.window = made->window;
  draw.emitted = made->emitted;

  SamplingParams& params = made->params;
  const float temperatures[] = {0.0f, 0.8f, 1e-6f, 100.0f, 1e-45f};
  params.temperature = OneIn(2) ? temperatures[Below(5)] : 0.2f + 2.0f * Share();
  params.seed = random_();
  params.candidate = static_cast<uint32_t>(Below(4));
  params.sampler = made.get();
  made->position = random_() >> 20;
  return made;
}

bool SameDraw(const SampledToken& a, const SampledToken& b) {
  if (a.token != b.token || !SameFloat(a.logprob, b.logprob)) return false;
  if ((a.top == nullptr) != (b.top == nullptr)) return false;
  if (a.top == nullptr) return true;
  return std::equal(a.top->begin(), a.top->end(), b.top->begin(), b.top->end(),
                    [](const TokenAlternative& x, const TokenAlternative& y) {
                      return x.token == y.token && SameFloat(x.logprob, y.logprob);
                    });
}

std::string ToString(const SampledToken& sampled) {
  std::ostringstream out;
  out << "token " << sampled.token << " (" << sampled.logprob << ")";
  if (sampled.top == nullptr) return out.str();
  out << " of";
  for (const TokenAlternative& top : *sampled.top) out << " " << top.token << ":" << top.logprob;
  return out.str();
}

}  // namespace mmfree

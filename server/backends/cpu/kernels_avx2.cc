// The elementwise kernels on AVX2; the products are in product_avx2.cc.
#include <immintrin.h>

#include "server/backends/cpu/avx2_math.h"
#include "server/backends/cpu/kernels.h"
#include "server/backends/cpu/product_avx2.h"

namespace mmfree::cpu {
namespace avx2 {
namespace {

constexpr int kWidth = 8;  // floats of a vector

// Calls body(k, mask) for each vector of [0, n), body(k) for the full ones.
template <typename Full, typename Masked>
void ForEachVector(int64_t n, const Full& full, const Masked& masked) {
  int64_t k = 0;
  for (; k + kWidth <= n; k += kWidth) full(k);
  if (k < n) masked(k, FirstMask(n - k));
}

void Gather(FloatType type, const void* values, int64_t n, float* out) {
  int64_t k = 0;
  if (type == FloatType::kF32) {
    const float* from = static_cast<const float*>(values);
    ForEachVector(
        n, [&](int64_t k) { _mm256_storeu_ps(out + k, _mm256_loadu_ps(from + k)); },
        [&](int64_t k, __m256i mask) {
          _mm256_maskstore_ps(out + k, mask, _mm256_maskload_ps(from + k, mask));
        });
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(values);
  const auto convert = [type](__m128i bits) {
    return type == FloatType::kF16
               ? _mm256_cvtph_ps(bits)
               : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  };
  for (; k + kWidth <= n; k += kWidth) {
    _mm256_storeu_ps(out + k, convert(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + k))));
  }
  if (k < n) {
    alignas(16) uint16_t last[kWidth] = {};
    for (int64_t j = k; j < n; ++j) last[j - k] = from[j];
    _mm256_maskstore_ps(out + k, FirstMask(n - k),
                        convert(_mm_load_si128(reinterpret_cast<const __m128i*>(last))));
  }
}

enum class NormKind { kOne, kStacked, kGiven };

template <NormKind kind>
__m256 NormOutput(const NormInput& in, int64_t k, __m256 x) {
  if constexpr (kind == NormKind::kStacked) return _mm256_mul_ps(x, _mm256_loadu_ps(in.w1 + k));
  if constexpr (kind == NormKind::kGiven) return _mm256_loadu_ps(in.y + k);
  return x;
}

template <NormKind kind>
__m256 NormOutput(const NormInput& in, int64_t k, __m256 x, __m256i mask) {
  if constexpr (kind == NormKind::kStacked) {
    return _mm256_mul_ps(x, _mm256_maskload_ps(in.w1 + k, mask));
  }
  if constexpr (kind == NormKind::kGiven) return _mm256_maskload_ps(in.y + k, mask);
  return x;
}

// (e0 + e1) + (e2 + e3) and so on: neighbours pairwise within each of four vectors. Element i of
// the result is the sum of vector i.
__m128 SumNeighbours(__m256 a, __m256 b, __m256 c, __m256 d) {
  const __m256 quads = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(quads), _mm256_extractf128_ps(quads, 1));
}

// The balanced tree over kNormLanes lane sums.
float TreeSum(const __m256* lanes) {
  constexpr int kVectors = kNormLanes / kWidth;
  __m128 sums[kVectors / 4];
  for (int i = 0; i < kVectors / 4; ++i) {
    sums[i] = SumNeighbours(lanes[4 * i], lanes[4 * i + 1], lanes[4 * i + 2], lanes[4 * i + 3]);
  }
  for (int width = kVectors / 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) sums[i] = _mm_hadd_ps(sums[2 * i], sums[2 * i + 1]);
  }
  const __m128 pairs = _mm_hadd_ps(sums[0], sums[0]);
  return _mm_cvtss_f32(_mm_hadd_ps(pairs, pairs));
}

float MaxElement(__m256 v) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

// Walks the lanes two vectors at a time, so that all sums of the walk stay in registers.
template <NormKind kind, int num_w2>
void ComputeNormStats(const NormInput& in, NormStats* stats) {
  constexpr int kStep = 2;
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  __m256 xx[kNormLanes / kWidth];
  __m256 yy[kNormLanes / kWidth];
  __m256 max_t[num_w2];
  for (__m256& m : max_t) m = _mm256_setzero_ps();
  for (int lane = 0; lane < kNormLanes; lane += kStep * kWidth) {
    __m256 sum_xx[kStep] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    __m256 sum_yy[kStep] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    const auto add = [&](int j, __m256 x, __m256 y, const auto& load_w2) {
      sum_xx[j] = _mm256_fmadd_ps(x, x, sum_xx[j]);
      if constexpr (kind != NormKind::kOne) sum_yy[j] = _mm256_fmadd_ps(y, y, sum_yy[j]);
      for (int w = 0; w < num_w2; ++w) {
        const __m256 t = _mm256_and_ps(_mm256_mul_ps(y, load_w2(in.w2[w])), magnitude);
        max_t[w] = _mm256_max_ps(t, max_t[w]);
      }
    };
    for (int64_t k = lane; k < in.n; k += kNormLanes) {
      for (int j = 0; j < kStep; ++j) {
        const int64_t at = k + j * kWidth;
        if (at + kWidth <= in.n) {
          const __m256 x = _mm256_loadu_ps(in.x + at);
          add(j, x, NormOutput<kind>(in, at, x),
              [at](const float* w) { return _mm256_loadu_ps(w + at); });
        } else if (at < in.n) {
          // Zeros beyond the end change neither the sums nor the maxima.
          const __m256i mask = FirstMask(in.n - at);
          const __m256 x = _mm256_maskload_ps(in.x + at, mask);
          add(j, x, NormOutput<kind>(in, at, x, mask),
              [at, mask](const float* w) { return _mm256_maskload_ps(w + at, mask); });
        }
      }
    }
    for (int j = 0; j < kStep; ++j) {
      xx[lane / kWidth + j] = sum_xx[j];
      yy[lane / kWidth + j] = sum_yy[j];
    }
  }
  stats->sum_xx = TreeSum(xx);
  stats->sum_yy = kind == NormKind::kOne ? 0.0f : TreeSum(yy);
  for (int w = 0; w < num_w2; ++w) stats->max_t[w] = MaxElement(max_t[w]);
}

void DispatchNormStats(const NormInput& in, NormStats* stats) {
  if (in.w1 != nullptr) {
    if (in.num_w2 == 3) {
      ComputeNormStats<NormKind::kStacked, 3>(in, stats);
    } else {
      ComputeNormStats<NormKind::kStacked, 1>(in, stats);
    }
  } else if (in.y != nullptr) {
    ComputeNormStats<NormKind::kGiven, 1>(in, stats);
  } else {
    ComputeNormStats<NormKind::kOne, 1>(in, stats);
  }
}

// Stores 32 codes, columns k .. k+31.
void StoreCodes(const CodePlace& place, int64_t k, __m256i codes) {
  int8_t* to = place.codes + k / place.chunk * place.stride;
  switch (place.chunk) {
    case 32:
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), codes);
      return;
    case 16:
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(codes));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + place.stride),
                       _mm256_extracti128_si256(codes, 1));
      return;
    case 8: {
      alignas(32) int64_t words[4];
      _mm256_store_si256(reinterpret_cast<__m256i*>(words), codes);
      for (int i = 0; i < 4; ++i) __builtin_memcpy(to + i * place.stride, words + i, 8);
      return;
    }
    default: {
      alignas(32) int32_t words[8];
      _mm256_store_si256(reinterpret_cast<__m256i*>(words), codes);
      for (int i = 0; i < 8; ++i) __builtin_memcpy(to + i * place.stride, words + i, 4);
      return;
    }
  }
}

template <NormKind kind>
int32_t Quantize(const NormInput& in, const float* w2, float multiplier, int64_t padded_cols,
                 const CodePlace& place) {
  const __m256 m = _mm256_set1_ps(multiplier);
  __m256i sum = _mm256_setzero_si256();
  for (int64_t k = 0; k < padded_cols; k += 32) {
    __m256i q[4];
    for (int j = 0; j < 4; ++j) {
      const int64_t at = k + j * kWidth;
      if (at + kWidth <= in.n) {
        const __m256 y = NormOutput<kind>(in, at, _mm256_loadu_ps(in.x + at));
        q[j] = QuantizeCodes(_mm256_mul_ps(y, _mm256_loadu_ps(w2 + at)), m);
      } else if (at < in.n) {
        const __m256i mask = FirstMask(in.n - at);
        const __m256 y = NormOutput<kind>(in, at, _mm256_maskload_ps(in.x + at, mask), mask);
        const __m256i codes = QuantizeCodes(_mm256_mul_ps(y, _mm256_maskload_ps(w2 + at, mask)), m);
        q[j] = _mm256_and_si256(codes, mask);  // 0 * inf would be a code, too
      } else {
        q[j] = _mm256_setzero_si256();
      }
      sum = _mm256_add_epi32(sum, q[j]);
    }
    // The packs interleave the 128-bit halves; the permutation puts the columns back in order.
    const __m256i packed =
        _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
    StoreCodes(place, k,
               _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
  }
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
  s = _mm_hadd_epi32(s, s);
  return _mm_cvtsi128_si32(_mm_hadd_epi32(s, s));
}

int32_t DispatchQuantize(const NormInput& in, int which, float multiplier, int64_t padded_cols,
                         const CodePlace& place) {
  const float* w2 = in.w2[which];
  if (in.w1 != nullptr) return Quantize<NormKind::kStacked>(in, w2, multiplier, padded_cols, place);
  if (in.y != nullptr) return Quantize<NormKind::kGiven>(in, w2, multiplier, padded_cols, place);
  return Quantize<NormKind::kOne>(in, w2, multiplier, padded_cols, place);
}

// Eight channels over all tokens, the state in a register; `load` and `store` mask the last ones.
template <typename Load, typename Store>
void ScanChannels(const ScanArgs& args, int64_t c, const Load& load, const Store& store) {
  const __m256 lower_bound = load(args.lower_bound + c);
  const __m256 one_minus = _mm256_sub_ps(_mm256_set1_ps(1.0f), lower_bound);
  const __m256 g_norm = load(args.g_norm + c);
  __m256 state = load(args.state + c);
  for (int64_t t = 0; t < args.tokens; ++t) {
    const int64_t gate = t * args.ld_gates + c;
    state = Recur(state, load(args.forget + gate), load(args.input + gate), lower_bound, one_minus);
    const int64_t at = t * args.ld + c;
    store(args.y + at, GateOutput(load(args.g + at), g_norm, state));
  }
  store(args.state + c, state);
}

void Scan(const ScanArgs& args) {
  ForEachVector(
      args.channels,
      [&](int64_t c) {
        ScanChannels(
            args, c, [](const float* p) { return _mm256_loadu_ps(p); },
            [](float* p, __m256 v) { _mm256_storeu_ps(p, v); });
      },
      [&](int64_t c, __m256i mask) {
        ScanChannels(
            args, c, [mask](const float* p) { return _mm256_maskload_ps(p, mask); },
            [mask](float* p, __m256 v) { _mm256_maskstore_ps(p, mask, v); });
      });
}

void SwiGlu(const float* p, const float* r, int64_t n, float* z) {
  ForEachVector(
      n,
      [&](int64_t k) {
        _mm256_storeu_ps(z + k,
                         _mm256_mul_ps(Silu(_mm256_loadu_ps(p + k)), _mm256_loadu_ps(r + k)));
      },
      [&](int64_t k, __m256i mask) {
        const __m256 gate = Silu(_mm256_maskload_ps(p + k, mask));
        _mm256_maskstore_ps(z + k, mask, _mm256_mul_ps(gate, _mm256_maskload_ps(r + k, mask)));
      });
}

int64_t ArgMax(const float* logits, int64_t n) {
  const __m256 lowest = _mm256_set1_ps(-__builtin_inff());
  __m256 best = lowest;
  // max passes over a NaN in its first operand.
  ForEachVector(
      n, [&](int64_t k) { best = _mm256_max_ps(_mm256_loadu_ps(logits + k), best); },
      [&](int64_t k, __m256i mask) {
        const __m256 last = _mm256_maskload_ps(logits + k, mask);
        best = _mm256_max_ps(_mm256_blendv_ps(lowest, last, _mm256_castsi256_ps(mask)), best);
      });
  const float largest = MaxElement(best);
  const __m256 equal_to = _mm256_set1_ps(largest);
  int64_t k = 0;
  for (; k + kWidth <= n; k += kWidth) {
    const int equal =
        _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(logits + k), equal_to, _CMP_EQ_OQ));
    if (equal != 0) return k + __builtin_ctz(static_cast<unsigned>(equal));
  }
  for (; k < n; ++k) {
    if (logits[k] == largest) return k;
  }
  return 0;
}

// Fixed-point weights as the bits of double(2^52 + weight), four at a time: a double holds every
// weight below 2^41 and the 2^52 exactly.
__m256i WeightBits(__m128 weights) {
  const __m256d whole = _mm256_floor_pd(_mm256_cvtps_pd(weights));
  return _mm256_castpd_si256(_mm256_add_pd(whole, _mm256_set1_pd(4503599627370496.0)));
}

uint64_t TotalWeight(const float* logits, int64_t n, float max_logit, float inverse_temperature) {
  const __m256 max = _mm256_set1_ps(max_logit);
  const __m256 inverse = _mm256_set1_ps(inverse_temperature);
  const __m256 low = _mm256_set1_ps(ExpConstants::kLow);
  const __m256 one = _mm256_set1_ps(1099511627776.0f);  // kWeightOne
  __m256i sum = _mm256_setzero_si256();
  uint64_t added = 0;
  const auto add = [&](__m256 logit, __m256 mask) {
    const __m256 x = _mm256_mul_ps(_mm256_sub_ps(logit, max), inverse);
    mask = _mm256_and_ps(mask, _mm256_cmp_ps(x, low, _CMP_GT_OQ));
    const __m256 weight = _mm256_and_ps(_mm256_mul_ps(Exp(x), one), mask);
    sum = _mm256_add_epi64(sum, WeightBits(_mm256_castps256_ps128(weight)));
    sum = _mm256_add_epi64(sum, WeightBits(_mm256_extractf128_ps(weight, 1)));
    added += kWidth;
  };
  ForEachVector(
      n,
      [&](int64_t k) {
        add(_mm256_loadu_ps(logits + k), _mm256_castsi256_ps(_mm256_set1_epi32(-1)));
      },
      [&](int64_t k, __m256i mask) {
        add(_mm256_maskload_ps(logits + k, mask), _mm256_castsi256_ps(mask));
      });
  alignas(32) uint64_t parts[4];
  _mm256_store_si256(reinterpret_cast<__m256i*>(parts), sum);
  // Without the bits of 2^52, modulo 2^64.
  return parts[0] + parts[1] + parts[2] + parts[3] - added * 0x4330000000000000u;
}

}  // namespace
}  // namespace avx2

const Kernels& Avx2Kernels() {
  static constexpr Kernels kKernels = {
      .name = "avx2",
      .vector_bytes = 32,
      .shapes = {{1, 1}, {1, 2}, {2, 2}, {4, 2}, {8, 2}},
      .num_shapes = 5,
      .gather = avx2::Gather,
      .norm_stats = avx2::DispatchNormStats,
      .quantize = avx2::DispatchQuantize,
      .product = avx2::Product,
      .scan = avx2::Scan,
      .swiglu = avx2::SwiGlu,
      .arg_max = avx2::ArgMax,
      .total_weight = avx2::TotalWeight,
  };
  return kKernels;
}

}  // namespace mmfree::cpu

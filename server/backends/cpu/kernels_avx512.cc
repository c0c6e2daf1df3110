// The elementwise kernels on AVX-512; the products are in product_avx512.cc.
#include <immintrin.h>

#include "server/backends/cpu/avx512_math.h"
#include "server/backends/cpu/kernels.h"
#include "server/backends/cpu/product_avx512.h"

namespace mmfree::cpu {
namespace avx512 {
namespace {

constexpr int kWidth = 16;  // floats of a vector

void Gather(FloatType type, const void* values, int64_t n, float* out) {
  for (int64_t k = 0; k < n; k += kWidth) {
    const __mmask16 mask = FirstMask(n - k);
    if (type == FloatType::kF32) {
      const float* from = static_cast<const float*>(values);
      _mm512_mask_storeu_ps(out + k, mask, _mm512_maskz_loadu_ps(mask, from + k));
      continue;
    }
    const __m256i bits = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(values) + k);
    const __m512 floats =
        type == FloatType::kF16
            ? _mm512_cvtph_ps(bits)
            : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    _mm512_mask_storeu_ps(out + k, mask, floats);
  }
}

enum class NormKind { kOne, kStacked, kGiven };

template <NormKind kind>
__m512 NormOutput(const NormInput& in, int64_t k, __m512 x, __mmask16 mask) {
  if constexpr (kind == NormKind::kStacked) {
    return _mm512_mul_ps(x, _mm512_maskz_loadu_ps(mask, in.w1 + k));
  }
  if constexpr (kind == NormKind::kGiven) return _mm512_maskz_loadu_ps(mask, in.y + k);
  return x;
}

__m256 Half(__m512 v, int half) {
  return half == 0 ? _mm512_castps512_ps256(v) : _mm512_extractf32x8_ps(v, 1);
}

// (e0 + e1) + (e2 + e3) and so on: neighbours pairwise within eights of two vectors, in order: four
// sums, each of eight elements.
__m128 SumNeighbours(__m512 a, __m512 b) {
  const __m256 quads = _mm256_hadd_ps(_mm256_hadd_ps(Half(a, 0), Half(a, 1)),
                                      _mm256_hadd_ps(Half(b, 0), Half(b, 1)));
  return _mm_add_ps(_mm256_castps256_ps128(quads), _mm256_extractf128_ps(quads, 1));
}

// The balanced tree over kNormLanes lane sums.
float TreeSum(const __m512* lanes) {
  constexpr int kVectors = kNormLanes / kWidth;
  __m128 sums[kVectors / 2];
  for (int i = 0; i < kVectors / 2; ++i) {
    sums[i] = SumNeighbours(lanes[2 * i], lanes[2 * i + 1]);
  }
  for (int width = kVectors / 4; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) sums[i] = _mm_hadd_ps(sums[2 * i], sums[2 * i + 1]);
  }
  const __m128 pairs = _mm_hadd_ps(sums[0], sums[0]);
  return _mm_cvtss_f32(_mm_hadd_ps(pairs, pairs));
}

// Walks the lanes four vectors at a time, so that all sums of the walk stay in registers.
template <NormKind kind, int num_w2>
void ComputeNormStats(const NormInput& in, NormStats* stats) {
  constexpr int kStep = 4;
  __m512 xx[kNormLanes / kWidth];
  __m512 yy[kNormLanes / kWidth];
  __m512 max_t[num_w2];
  for (__m512& m : max_t) m = _mm512_setzero_ps();
  for (int lane = 0; lane < kNormLanes; lane += kStep * kWidth) {
    __m512 sum_xx[kStep];
    __m512 sum_yy[kStep];
    for (int j = 0; j < kStep; ++j) sum_xx[j] = sum_yy[j] = _mm512_setzero_ps();
    const auto add = [&](int64_t k, bool whole) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int j = 0; j < kStep; ++j) {
        // Zeros beyond the end change neither the sums nor the maxima.
        const int64_t at = k + j * kWidth;
        const __mmask16 mask = whole ? static_cast<__mmask16>(0xffff) : FirstMask(in.n - at);
        const __m512 x = _mm512_maskz_loadu_ps(mask, in.x + at);
        const __m512 y = NormOutput<kind>(in, at, x, mask);
        sum_xx[j] = _mm512_fmadd_ps(x, x, sum_xx[j]);
        if constexpr (kind != NormKind::kOne) sum_yy[j] = _mm512_fmadd_ps(y, y, sum_yy[j]);
        for (int w = 0; w < num_w2; ++w) {
          const __m512 t = _mm512_mul_ps(y, _mm512_maskz_loadu_ps(mask, in.w2[w] + at));
          max_t[w] = _mm512_max_ps(_mm512_abs_ps(t), max_t[w]);
        }
      }
    };
    int64_t k = lane;
    for (; k + kStep * kWidth <= in.n; k += kNormLanes) add(k, true);
    if (k < in.n) add(k, false);
    for (int j = 0; j < kStep; ++j) {
      xx[lane / kWidth + j] = sum_xx[j];
      yy[lane / kWidth + j] = sum_yy[j];
    }
  }
  stats->sum_xx = TreeSum(xx);
  stats->sum_yy = kind == NormKind::kOne ? 0.0f : TreeSum(yy);
  for (int w = 0; w < num_w2; ++w) stats->max_t[w] = _mm512_reduce_max_ps(max_t[w]);
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

// Stores 64 codes, columns k .. k+63. Large chunks straight from the register: loads that span
// several stores would wait for them.
void StoreCodes(const CodePlace& place, int64_t k, __m512i codes) {
  const int64_t chunk = place.chunk;
  int8_t* to = place.codes + k / chunk * place.stride;
  if (chunk == 64) {
    _mm512_storeu_si512(to, codes);
    return;
  }
  if (chunk == 32) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(codes));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + place.stride),
                        _mm512_extracti64x4_epi64(codes, 1));
    return;
  }
  const __m128i quarters[4] = {_mm512_castsi512_si128(codes), _mm512_extracti32x4_epi32(codes, 1),
                               _mm512_extracti32x4_epi32(codes, 2),
                               _mm512_extracti32x4_epi32(codes, 3)};
  for (const __m128i& quarter : quarters) {
    if (chunk == 16) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), quarter);
      to += place.stride;
    } else if (chunk == 8) {
      _mm_storel_epi64(reinterpret_cast<__m128i*>(to), quarter);
      _mm_storeh_pd(reinterpret_cast<double*>(to + place.stride), _mm_castsi128_pd(quarter));
      to += 2 * place.stride;
    } else {
      const int words[4] = {_mm_extract_epi32(quarter, 0), _mm_extract_epi32(quarter, 1),
                            _mm_extract_epi32(quarter, 2), _mm_extract_epi32(quarter, 3)};
      for (int word : words) {
        __builtin_memcpy(to, &word, sizeof(word));
        to += place.stride;
      }
    }
  }
}

// The codes of columns k .. k+63, zeros beyond the n of them; their sums are added to *sum.
template <NormKind kind, bool whole>
__m512i CodesOf64(const NormInput& in, const float* w2, __m512 multiplier, int64_t k,
                  __m512i* sum) {
  __m128i codes[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const int64_t at = k + j * kWidth;
    const __mmask16 mask = whole ? static_cast<__mmask16>(0xffff) : FirstMask(in.n - at);
    const __m512 y = NormOutput<kind>(in, at, _mm512_maskz_loadu_ps(mask, in.x + at), mask);
    const __m512 t = _mm512_mul_ps(y, _mm512_maskz_loadu_ps(mask, w2 + at));
    // Masked because 0 * inf would be a code, too.
    const __m512i q = _mm512_maskz_mov_epi32(mask, QuantizeCodes(t, multiplier));
    *sum = _mm512_add_epi32(*sum, q);
    codes[j] = _mm512_cvtepi32_epi8(q);
  }
  const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(codes[0]), codes[1], 1);
  const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(codes[2]), codes[3], 1);
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

template <NormKind kind>
int32_t Quantize(const NormInput& in, const float* w2, float multiplier, int64_t padded_cols,
                 const CodePlace& place) {
  const __m512 m = _mm512_set1_ps(multiplier);
  __m512i sum = _mm512_setzero_si512();
  int64_t k = 0;
  for (; k + 64 <= in.n; k += 64) {
    StoreCodes(place, k, CodesOf64<kind, true>(in, w2, m, k, &sum));
  }
  if (k < padded_cols) StoreCodes(place, k, CodesOf64<kind, false>(in, w2, m, k, &sum));
  return _mm512_reduce_add_epi32(sum);
}

int32_t DispatchQuantize(const NormInput& in, int which, float multiplier, int64_t padded_cols,
                         const CodePlace& place) {
  const float* w2 = in.w2[which];
  if (in.w1 != nullptr) return Quantize<NormKind::kStacked>(in, w2, multiplier, padded_cols, place);
  if (in.y != nullptr) return Quantize<NormKind::kGiven>(in, w2, multiplier, padded_cols, place);
  return Quantize<NormKind::kOne>(in, w2, multiplier, padded_cols, place);
}

// Sixteen channels over all tokens, the state in a register.
void Scan(const ScanArgs& args) {
  for (int64_t c = 0; c < args.channels; c += kWidth) {
    const __mmask16 mask = FirstMask(args.channels - c);
    const auto load = [mask](const float* p) { return _mm512_maskz_loadu_ps(mask, p); };
    const __m512 lower_bound = load(args.lower_bound + c);
    const __m512 one_minus = _mm512_sub_ps(_mm512_set1_ps(1.0f), lower_bound);
    const __m512 g_norm = load(args.g_norm + c);
    __m512 state = load(args.state + c);
    for (int64_t t = 0; t < args.tokens; ++t) {
      const int64_t gate = t * args.ld_gates + c;
      state =
          Recur(state, load(args.forget + gate), load(args.input + gate), lower_bound, one_minus);
      const int64_t at = t * args.ld + c;
      _mm512_mask_storeu_ps(args.y + at, mask, GateOutput(load(args.g + at), g_norm, state));
    }
    _mm512_mask_storeu_ps(args.state + c, mask, state);
  }
}

void SwiGlu(const float* p, const float* r, int64_t n, float* z) {
  for (int64_t k = 0; k < n; k += kWidth) {
    const __mmask16 mask = FirstMask(n - k);
    const __m512 gate = Silu(_mm512_maskz_loadu_ps(mask, p + k));
    _mm512_mask_storeu_ps(z + k, mask, _mm512_mul_ps(gate, _mm512_maskz_loadu_ps(mask, r + k)));
  }
}

int64_t ArgMax(const float* logits, int64_t n) {
  __m512 best = _mm512_set1_ps(-__builtin_inff());
  for (int64_t k = 0; k < n; k += kWidth) {
    // max passes over a NaN in its first operand.
    const __mmask16 mask = FirstMask(n - k);
    best = _mm512_mask_max_ps(best, mask, _mm512_maskz_loadu_ps(mask, logits + k), best);
  }
  const __m512 largest = _mm512_set1_ps(_mm512_reduce_max_ps(best));
  for (int64_t k = 0; k < n; k += kWidth) {
    const __mmask16 mask = FirstMask(n - k);
    const __mmask16 equal =
        _mm512_mask_cmp_ps_mask(mask, _mm512_maskz_loadu_ps(mask, logits + k), largest, _CMP_EQ_OQ);
    if (equal != 0) return k + __builtin_ctz(equal);
  }
  return 0;
}

uint64_t TotalWeight(const float* logits, int64_t n, float max_logit, float inverse_temperature) {
  const __m512 max = _mm512_set1_ps(max_logit);
  const __m512 inverse = _mm512_set1_ps(inverse_temperature);
  const __m512 low = _mm512_set1_ps(ExpConstants::kLow);
  const __m512 one = _mm512_set1_ps(1099511627776.0f);  // kWeightOne
  __m512i sum = _mm512_setzero_si512();
  for (int64_t k = 0; k < n; k += kWidth) {
    const __mmask16 mask = FirstMask(n - k);
    const __m512 x =
        _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, logits + k), max), inverse);
    const __mmask16 positive = _mm512_mask_cmp_ps_mask(mask, x, low, _CMP_GT_OQ);
    const __m512 weight = _mm512_maskz_mul_ps(positive, Exp(x), one);
    sum = _mm512_add_epi64(sum, _mm512_cvttps_epu64(Half(weight, 0)));
    sum = _mm512_add_epi64(sum, _mm512_cvttps_epu64(Half(weight, 1)));
  }
  return static_cast<uint64_t>(_mm512_reduce_add_epi64(sum));
}

}  // namespace
}  // namespace avx512

const Kernels& Avx512Kernels() {
  static constexpr Kernels kKernels = {
      .name = "avx512",
      .vector_bytes = 64,
      .shapes = {{1, 1},
                 {1, 2},
                 {1, 4},
                 {2, 3},
                 {2, 4},
                 {4, 3},
                 {4, 4},
                 {8, 3},
                 {8, 4},
                 {16, 3},
                 {16, 4}},
      .num_shapes = 11,
      .gather = avx512::Gather,
      .norm_stats = avx512::DispatchNormStats,
      .quantize = avx512::DispatchQuantize,
      .product = avx512::Product,
      .scan = avx512::Scan,
      .swiglu = avx512::SwiGlu,
      .arg_max = avx512::ArgMax,
      .total_weight = avx512::TotalWeight,
  };
  return kKernels;
}

}  // namespace mmfree::cpu

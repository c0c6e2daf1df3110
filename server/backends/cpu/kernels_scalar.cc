// The oracle: portable C++, the definition of every result (server/model/NUMERICS.md).
#include <algorithm>
#include <cmath>
#include <cstring>

#include "server/backends/cpu/kernels.h"
#include "server/base/numerics.h"
#include "server/sampling/sampler.h"

namespace mmfree::cpu {
namespace {

void Gather(FloatType type, const void* values, int64_t n, float* out) {
  switch (type) {
    case FloatType::kF32:
      memcpy(out, values, static_cast<size_t>(n) * sizeof(float));
      return;
    case FloatType::kF16:
      for (int64_t k = 0; k < n; ++k) out[k] = HalfToFloat(static_cast<const uint16_t*>(values)[k]);
      return;
    case FloatType::kBF16:
      for (int64_t k = 0; k < n; ++k) {
        out[k] = Bfloat16ToFloat(static_cast<const uint16_t*>(values)[k]);
      }
      return;
  }
}

// The order of a norm's sums: element k in lane k % 256, then neighbours pairwise.
class LaneSum {
 public:
  void Add(int64_t k, float x) {
    float& lane = lanes_[k % kNormLanes];
    lane = fmaf(x, x, lane);
  }
  float Total() {
    for (int width = kNormLanes / 2; width > 0; width /= 2) {
      for (int j = 0; j < width; ++j) lanes_[j] = lanes_[2 * j] + lanes_[2 * j + 1];
    }
    return lanes_[0];
  }

 private:
  float lanes_[kNormLanes] = {};
};

float NormOutput(const NormInput& in, int64_t k) {
  if (in.w1 != nullptr) return in.x[k] * in.w1[k];
  return in.y != nullptr ? in.y[k] : in.x[k];
}

void ComputeNormStats(const NormInput& in, NormStats* stats) {
  LaneSum sum_xx;
  LaneSum sum_yy;
  std::fill_n(stats->max_t, 3, 0.0f);
  for (int64_t k = 0; k < in.n; ++k) {
    const float y = NormOutput(in, k);
    sum_xx.Add(k, in.x[k]);
    sum_yy.Add(k, y);
    for (int j = 0; j < in.num_w2; ++j) {
      stats->max_t[j] = Max(std::fabs(y * in.w2[j][k]), stats->max_t[j]);
    }
  }
  stats->sum_xx = sum_xx.Total();
  stats->sum_yy = sum_yy.Total();
}

int32_t Quantize(const NormInput& in, int which, float multiplier, int64_t padded_cols,
                 const CodePlace& place) {
  int32_t sum = 0;
  for (int64_t k = 0; k < padded_cols; ++k) {
    const int32_t code =
        k < in.n ? QuantizeCode(NormOutput(in, k) * in.w2[which][k], multiplier) : 0;
    place.codes[k / place.chunk * place.stride + k % place.chunk] = static_cast<int8_t>(code);
    sum += code;
  }
  return sum;
}

// Sums of the four rows of a group with one token's codes.
void GroupSums(const uint8_t* group, const int8_t* codes, int64_t padded_cols, int32_t sums[4]) {
  std::fill_n(sums, 4, 0);
  for (int64_t k = 0; k < padded_cols; ++k) {
    const int8_t code = codes[k];
    sums[0] += (group[k] & 3) * code;
    sums[1] += ((group[k] >> 2) & 3) * code;
    sums[2] += ((group[k] >> 4) & 3) * code;
    sums[3] += (group[k] >> 6) * code;
  }
}

void Product(const ProductArgs& args) {
  for (int64_t group = args.row_begin / 4; group * 4 < args.row_end; ++group) {
    for (int32_t i = 0; i < args.num_tiles; ++i) {
      const Tile& tile = args.tiles[i];  // one token
      int32_t sums[4];
      GroupSums(args.codes + group * args.padded_cols, args.panel + tile.offset, args.padded_cols,
                sums);
      const int64_t first = std::max(args.row_begin, group * 4);
      const int64_t last = std::min(args.row_end, group * 4 + 4);
      for (int64_t row = first; row < last; ++row) {
        // The stored codes are w + 1.
        const float sum = static_cast<float>(sums[row - group * 4] - args.sums[tile.first]);
        float& out = args.out[tile.first * args.ld + row - args.row_begin];
        const float factor = args.factors[tile.first];
        out = args.accumulate ? fmaf(sum, factor, out) : sum * factor;
      }
    }
  }
}

void Scan(const ScanArgs& args) {
  for (int64_t t = 0; t < args.tokens; ++t) {
    for (int64_t c = 0; c < args.channels; ++c) {
      const float lower_bound = args.lower_bound[c];
      float& state = args.state[c];
      state = Recur(state, args.forget[t * args.ld_gates + c], args.input[t * args.ld_gates + c],
                    lower_bound, 1.0f - lower_bound);
      args.y[t * args.ld + c] = GateOutput(args.g[t * args.ld + c], args.g_norm[c], state);
    }
  }
}

void SwiGluRow(const float* p, const float* r, int64_t n, float* z) {
  for (int64_t k = 0; k < n; ++k) z[k] = SwiGlu(p[k], r[k]);
}

int64_t LargestLogit(const float* logits, int64_t n) {
  return ArgMax(absl::MakeConstSpan(logits, static_cast<size_t>(n)));
}

uint64_t TotalWeight(const float* logits, int64_t n, float max_logit, float inverse_temperature) {
  uint64_t total = 0;
  for (int64_t k = 0; k < n; ++k) total += LogitWeight(logits[k], max_logit, inverse_temperature);
  return total;
}

}  // namespace

const Kernels& ScalarKernels() {
  static constexpr Kernels kKernels = {
      .name = "scalar",
      .vector_bytes = 64,
      .shapes = {{1, 1}},
      .num_shapes = 1,
      .gather = Gather,
      .norm_stats = ComputeNormStats,
      .quantize = Quantize,
      .product = Product,
      .scan = Scan,
      .swiglu = SwiGluRow,
      .arg_max = LargestLogit,
      .total_weight = TotalWeight,
  };
  return kKernels;
}

}  // namespace mmfree::cpu

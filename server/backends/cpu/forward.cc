#include "server/backends/cpu/forward.h"

#include <algorithm>
#include <utility>

#include "server/backends/cpu/row_sampler.h"
#include "server/base/numerics.h"
#include "server/base/status_macros.h"

namespace mmfree::cpu {
namespace {

constexpr int64_t kFloatsPerLine = 16;
// Positions that go through the head at a time.
constexpr int32_t kHeadRows = 64;
// Floats of one block of product outputs in a thread's scratch, without what is between its rows.
constexpr int64_t kBlockFloats = 32768;

// From row to row, for rows of n floats: an odd number of cache lines, so that the same columns of
// many rows, which a product writes together, lie in different sets of the caches.
int64_t RowStride(int64_t n) {
  return ((n + kFloatsPerLine - 1) / kFloatsPerLine | 1) * kFloatsPerLine;
}

FloatType ToFloatType(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return FloatType::kF32;
    case DType::kF16:
      return FloatType::kF16;
    case DType::kBF16:
      return FloatType::kBF16;
  }
  return FloatType::kF32;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Forward>> Forward::Create(const Model* model, Weights weights,
                                                         const Kernels* kernels, ThreadPool* pool,
                                                         int32_t max_tokens) {
  std::unique_ptr<Forward> forward(new Forward);
  forward->model_ = model;
  forward->weights_ = std::move(weights);
  forward->kernels_ = kernels;
  forward->pool_ = pool;
  forward->max_tokens_ = max_tokens;
  forward->hidden_ = model->config().hidden_size;
  forward->intermediate_ = model->config().intermediate_size;
  forward->vocab_ = model->config().vocab_size;
  MMFREE_RETURN_IF_ERROR(forward->Allocate());
  return forward;
}

absl::Status Forward::Allocate() {
  ld_hidden_ = RowStride(hidden_);
  ld_intermediate_ = RowStride(intermediate_);
  ld_vocab_ = RowStride(vocab_);
  const int64_t head_rows = std::min(max_tokens_, kHeadRows);
  const int64_t floats = max_tokens_ * (3 * ld_hidden_ + ld_intermediate_) + head_rows * ld_vocab_;
  MMFREE_ASSIGN_OR_RETURN(floats_, Region::Allocate(floats * sizeof(float)));
  h_ = reinterpret_cast<float*>(floats_.mutable_data());
  g_ = h_ + max_tokens_ * ld_hidden_;
  y_ = g_ + max_tokens_ * ld_hidden_;
  z_ = y_ + max_tokens_ * ld_hidden_;
  logits_ = z_ + max_tokens_ * ld_intermediate_;

  const int64_t hidden_cols = TernaryMatrix::PaddedCols(hidden_);
  const int64_t widest_cols = TernaryMatrix::PaddedCols(std::max(hidden_, intermediate_));
  const int64_t hidden_panel = PanelLayout::MaxBytes(*kernels_, max_tokens_, hidden_cols);
  const int64_t widest_panel = PanelLayout::MaxBytes(*kernels_, max_tokens_, widest_cols);
  MMFREE_ASSIGN_OR_RETURN(panel_, Region::Allocate(widest_panel + 2 * hidden_panel));
  codes_[0] = reinterpret_cast<int8_t*>(panel_.mutable_data());
  codes_[1] = codes_[0] + widest_panel;
  codes_[2] = codes_[1] + hidden_panel;
  for (int i = 0; i < 3; ++i) {
    sums_[i].resize(max_tokens_);
    factors_[i].resize(max_tokens_);
  }

  threads_.resize(pool_->size());
  for (ThreadScratch& thread : threads_) {
    MMFREE_ASSIGN_OR_RETURN(thread.panel, Region::Allocate(std::max(3 * hidden_cols, widest_cols)));
    MMFREE_ASSIGN_OR_RETURN(thread.blocks, Region::Allocate(2 * BlockFloats() * sizeof(float)));
  }
  return absl::OkStatus();
}

void Forward::Run(const Chunk& chunk) {
  const int32_t tokens = static_cast<int32_t>(chunk.tokens.size());
  const int32_t outputs = static_cast<int32_t>(chunk.outputs.size());
  const int64_t hidden_cols = TernaryMatrix::PaddedCols(hidden_);
  hidden_layout_.Set(*kernels_, tokens, hidden_cols);
  intermediate_layout_.Set(*kernels_, tokens, TernaryMatrix::PaddedCols(intermediate_));
  head_layout_.Set(*kernels_, kHeadRows, hidden_cols);
  last_head_layout_.Set(*kernels_, outputs % kHeadRows, hidden_cols);
  pool_->Run([this, &chunk](int thread) { Work(thread, chunk); });
}

void Forward::Work(int thread, const Chunk& chunk) {
  Embed(thread, chunk);
  for (int64_t layer = 0; layer < model_->config().num_layers; ++layer) {
    Attention(thread, chunk, layer);
    Mlp(thread, chunk, layer);
  }
  Head(thread, chunk);
}

void Forward::Embed(int thread, const Chunk& chunk) {
  const Embedding& embedding = model_->embedding();
  const FloatType type = ToFloatType(embedding.dtype);
  const int64_t row_bytes = hidden_ * (type == FloatType::kF32 ? 4 : 2);
  const int64_t tokens = static_cast<int64_t>(chunk.tokens.size());
  for (int64_t t = thread; t < tokens; t += pool_->size()) {
    kernels_->gather(type,
                     static_cast<const uint8_t*>(embedding.data) + chunk.tokens[t] * row_bytes,
                     hidden_, h_ + t * ld_hidden_);
  }
  pool_->Barrier(thread);
}

// h += o_proj(rms(g_proj(u), g_norm) * silu(state)), u = rms(h, attn_norm).
void Forward::Attention(int thread, const Chunk& chunk, int64_t layer) {
  const LayerWeights& weights = weights_.layers[layer];
  const int32_t tokens = static_cast<int32_t>(chunk.tokens.size());
  const Range slice = Slice(hidden_, thread);

  NormRows input = {};
  input.x = h_;
  input.ld = ld_hidden_;
  input.w1 = weights.attn_norm.data();
  input.w2[0] = weights.f_norm.data();
  input.w2[1] = weights.i_norm.data();
  input.w2[2] = weights.g_norm_in.data();
  input.matrices[0] = &weights.f;
  input.matrices[1] = &weights.i;
  input.matrices[2] = &weights.g;
  input.count = 3;
  input.n = hidden_;
  input.layout = &hidden_layout_;
  const Codes codes = Quantize(thread, tokens, input);

  const int64_t width = BlockWidth(tokens);
  const int64_t ld = RowStride(width);
  float* forget = reinterpret_cast<float*>(threads_[thread].blocks.mutable_data());
  float* in = forget + BlockFloats();
  for (int64_t c = slice.begin; c < slice.end; c += width) {
    const Range block = {c, std::min(c + width, slice.end)};
    Product(weights.f, block, codes, 0, forget, ld, false);
    Product(weights.i, block, codes, 1, in, ld, false);
    Product(weights.g, block, codes, 2, g_ + c, ld_hidden_, false);
    for (const Segment& segment : chunk.segments) {
      float* const state = segment.state + layer * hidden_ + c;
      if (segment.from != nullptr) {
        std::copy_n(segment.from + layer * hidden_ + c, block.end - block.begin, state);
      }
      ScanArgs scan;
      scan.tokens = segment.count;
      scan.channels = block.end - block.begin;
      scan.forget = forget + segment.first * ld;
      scan.input = in + segment.first * ld;
      scan.ld_gates = ld;
      scan.g = g_ + segment.first * ld_hidden_ + c;
      scan.y = y_ + segment.first * ld_hidden_ + c;
      scan.ld = ld_hidden_;
      scan.state = state;
      scan.lower_bound = weights.lower_bound.data() + c;
      scan.g_norm = weights.g_norm.data() + c;
      kernels_->scan(scan);
    }
  }
  pool_->Barrier(thread);

  NormRows output = {};
  output.x = g_;
  output.y = y_;
  output.ld = ld_hidden_;
  output.w2[0] = weights.o_norm.data();
  output.matrices[0] = &weights.o;
  output.count = 1;
  output.n = hidden_;
  output.layout = &hidden_layout_;
  Product(weights.o, slice, Quantize(thread, tokens, output), 0, h_ + slice.begin, ld_hidden_,
          true);
  pool_->Barrier(thread);
}

// h += down_proj(silu(p) * r), (p, r) = gate_proj(rms(h, mlp_norm)).
void Forward::Mlp(int thread, const Chunk& chunk, int64_t layer) {
  const LayerWeights& weights = weights_.layers[layer];
  const int32_t tokens = static_cast<int32_t>(chunk.tokens.size());

  NormRows input = {};
  input.x = h_;
  input.ld = ld_hidden_;
  input.w1 = weights.mlp_norm.data();
  input.w2[0] = weights.gate_norm.data();
  input.matrices[0] = &weights.gate;
  input.count = 1;
  input.n = hidden_;
  input.layout = &hidden_layout_;
  const Codes codes = Quantize(thread, tokens, input);

  const Range slice = Slice(intermediate_, thread);
  const int64_t width = BlockWidth(tokens);
  const int64_t ld = RowStride(width);
  float* p = reinterpret_cast<float*>(threads_[thread].blocks.mutable_data());
  float* r = p + BlockFloats();
  for (int64_t c = slice.begin; c < slice.end; c += width) {
    const Range block = {c, std::min(c + width, slice.end)};
    Product(weights.gate, block, codes, 0, p, ld, false);
    Product(weights.gate, {intermediate_ + block.begin, intermediate_ + block.end}, codes, 0, r, ld,
            false);
    for (int32_t t = 0; t < tokens; ++t) {
      kernels_->swiglu(p + t * ld, r + t * ld, block.end - block.begin,
                       z_ + t * ld_intermediate_ + c);
    }
  }
  pool_->Barrier(thread);

  NormRows output = {};
  output.x = z_;
  output.ld = ld_intermediate_;
  output.w2[0] = weights.down_norm.data();
  output.matrices[0] = &weights.down;
  output.count = 1;
  output.n = intermediate_;
  output.layout = &intermediate_layout_;
  const Range rows = Slice(hidden_, thread);
  Product(weights.down, rows, Quantize(thread, tokens, output), 0, h_ + rows.begin, ld_hidden_,
          true);
  pool_->Barrier(thread);
}

// logits = lm_head(rms(h, model.norm)), at the positions asked for only.
void Forward::Head(int thread, const Chunk& chunk) {
  NormRows input = {};
  input.x = h_;
  input.ld = ld_hidden_;
  input.w1 = model_->final_norm().data();
  input.w2[0] = model_->lm_head_norm().data();
  input.matrices[0] = &weights_.lm_head;
  input.count = 1;
  input.n = hidden_;
  const Range slice = Slice(vocab_, thread);
  const int32_t outputs = static_cast<int32_t>(chunk.outputs.size());
  for (int32_t first = 0; first < outputs; first += kHeadRows) {
    const int32_t count = std::min(kHeadRows, outputs - first);
    input.positions = chunk.outputs.data() + first;
    input.layout = count == kHeadRows ? &head_layout_ : &last_head_layout_;
    Product(weights_.lm_head, slice, Quantize(thread, count, input), 0, logits_ + slice.begin,
            ld_vocab_, false);
    pool_->Barrier(thread);
    for (int32_t i = thread; i < count; i += pool_->size()) {
      Emit(chunk.outputs[first + i],
           absl::MakeSpan(logits_ + i * ld_vocab_, static_cast<size_t>(vocab_)));
    }
    if (first + count < outputs) pool_->Barrier(thread);  // the logits are overwritten
  }
}

void Forward::Emit(const OutputPosition& output, absl::Span<float> logits) const {
  if (output.logits != nullptr) std::copy(logits.begin(), logits.end(), output.logits);
  if (output.score != nullptr) *output.score = ScoreRow(*kernels_, logits, output.target);
  if (output.sample != nullptr) {
    const SamplingParams& params = *output.sampling;
    *output.sample = params.sampler != nullptr
                         ? params.sampler->Sample(logits, params, output.sample_position)
                         : SampleRow(*kernels_, logits, params, output.sample_position);
  }
}

void Forward::QuantizeRow(const NormRows& rows, int32_t row, int8_t* const panel[3],
                          int32_t* const sums[3], float* const factors[3], int32_t at) const {
  const int64_t source = rows.positions != nullptr ? rows.positions[row].token : row;
  NormInput in;
  in.x = rows.x + source * rows.ld;
  in.w1 = rows.w1;
  in.y = rows.y != nullptr ? rows.y + source * rows.ld : nullptr;
  std::copy_n(rows.w2, 3, in.w2);
  in.num_w2 = rows.count;
  in.n = rows.n;
  NormStats stats;
  kernels_->norm_stats(in, &stats);
  const bool stacked = in.w1 != nullptr || in.y != nullptr;
  const float n = static_cast<float>(rows.n);
  const float eps = model_->config().rms_norm_eps;
  for (int i = 0; i < rows.count; ++i) {
    const RowScale scale = stacked
                               ? ScaleTwoNorms(stats.sum_xx, stats.sum_yy, stats.max_t[i], n, eps)
                               : ScaleOneNorm(stats.sum_xx, stats.max_t[i], n, eps);
    sums[i][at] = kernels_->quantize(in, i, scale.code, TernaryMatrix::PaddedCols(rows.n),
                                     rows.layout->Place(panel[i], row));
    factors[i][at] = scale.out * rows.matrices[i]->scale;
  }
}

Forward::Codes Forward::Quantize(int thread, int32_t tokens, const NormRows& rows) {
  int8_t* panel[3];
  int32_t* sums[3];
  float* factors[3];
  if (tokens == 1) {
    ThreadScratch& own = threads_[thread];
    for (int i = 0; i < 3; ++i) {
      panel[i] = reinterpret_cast<int8_t*>(own.panel.mutable_data()) + i * rows.layout->bytes();
      sums[i] = own.sums + i;
      factors[i] = own.factors + i;
    }
    QuantizeRow(rows, 0, panel, sums, factors, 0);
  } else {
    for (int i = 0; i < 3; ++i) {
      panel[i] = codes_[i];
      sums[i] = sums_[i].data();
      factors[i] = factors_[i].data();
    }
    const int64_t threads = pool_->size();
    const int32_t begin = static_cast<int32_t>(tokens * int64_t{thread} / threads);
    const int32_t end = static_cast<int32_t>(tokens * int64_t{thread + 1} / threads);
    for (int32_t row = begin; row < end; ++row) {
      QuantizeRow(rows, row, panel, sums, factors, row);
    }
    pool_->Barrier(thread);
  }
  Codes codes;
  std::copy_n(panel, 3, codes.panel);
  std::copy_n(sums, 3, codes.sums);
  std::copy_n(factors, 3, codes.factors);
  codes.layout = rows.layout;
  return codes;
}

void Forward::Product(const TernaryMatrix& matrix, Range rows, const Codes& codes, int which,
                      float* out, int64_t ld, bool accumulate) const {
  ProductArgs args;
  args.codes = matrix.codes;
  args.padded_cols = matrix.padded_cols();
  args.row_begin = rows.begin;
  args.row_end = rows.end;
  args.panel = codes.panel[which];
  args.tiles = codes.layout->tiles().data();
  args.num_tiles = static_cast<int32_t>(codes.layout->tiles().size());
  args.sums = codes.sums[which];
  args.factors = codes.factors[which];
  args.out = out;
  args.ld = ld;
  args.accumulate = accumulate;
  kernels_->product(args);
}

int64_t Forward::BlockFloats() const { return kBlockFloats + max_tokens_ * kFloatsPerLine; }

int64_t Forward::BlockWidth(int32_t tokens) const {
  return kBlockFloats / tokens / kFloatsPerLine * kFloatsPerLine;
}

}  // namespace mmfree::cpu

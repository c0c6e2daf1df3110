#include "tests/bench/kernel_bench.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "server/backends/cpu/kernel_choice.h"
#include "server/backends/cpu/kernels.h"
#include "server/backends/cpu/panel.h"
#include "server/backends/cpu/row_sampler.h"
#include "server/backends/cpu/thread_pool.h"
#include "server/base/cpu_features.h"
#include "server/base/status_macros.h"
#include "server/model/model.h"
#include "tests/bench/bench_backend.h"
#include "tests/bench/read_bandwidth.h"
#include "tests/bench/report.h"

namespace mmfree {
namespace {

using cpu::Kernels;
using cpu::PanelLayout;

// Buffers of one step and the kernels over them.
class KernelBench {
 public:
  KernelBench(const Model& model, const Kernels& kernels, cpu::ThreadPool* pool, int32_t tokens)
      : model_(model),
        kernels_(kernels),
        pool_(pool),
        tokens_(tokens),
        hidden_(model.config().hidden_size),
        intermediate_(model.config().intermediate_size),
        layers_(model.config().num_layers),
        widest_(RowStride(std::max(2 * intermediate_, model.config().vocab_size))) {
    x_ = Wave(tokens * std::max(hidden_, intermediate_));
    y_ = Wave(tokens * std::max(hidden_, intermediate_));
    state_ = Wave(layers_ * hidden_);
    out_ = Wave(tokens * widest_);
    factors_.assign(tokens, 1e-4f);
    sums_.resize(tokens);
    hidden_layout_.Set(kernels, tokens, TernaryMatrix::PaddedCols(hidden_));
    intermediate_layout_.Set(kernels, tokens, TernaryMatrix::PaddedCols(intermediate_));
    panel_bytes_ = std::max(hidden_layout_.bytes(), intermediate_layout_.bytes());
    for (int i = 0; i <= pool->size(); ++i) panels_.push_back(AlignedBytes(panel_bytes_));
  }

  std::vector<KernelReport> Run(double seconds) {
    std::vector<KernelReport> reports;
    const auto add = [&](const std::string& name, int64_t bytes, int64_t operations,
                         const std::function<void(int)>& body) {
      reports.push_back({name, Time(seconds / 10, body), bytes, operations});
    };
    const int64_t square = TernaryMatrix::Bytes(hidden_, hidden_);
    const int64_t gate = TernaryMatrix::Bytes(2 * intermediate_, hidden_);
    const int64_t down = TernaryMatrix::Bytes(hidden_, intermediate_);
    const int64_t head = model_.lm_head().bytes();
    const int64_t row_work = layers_ * tokens_;
    add("norm+quantize i,f,g", 0, row_work * 3 * hidden_, [this](int thread) {
      ForEachLayer([&](const LayerWeights& w) {
        Quantize(thread, {x_.data(),
                          w.attn_norm.data(),
                          nullptr,
                          {w.i_norm.data(), w.f_norm.data(), w.g_norm_in.data()},
                          3,
                          hidden_});
      });
    });
    add("i,f,g products", layers_ * 3 * square, row_work * 3 * hidden_ * hidden_,
        [this](int thread) {
          ForEachLayer([&](const LayerWeights& w) {
            Product(thread, w.f);
            Product(thread, w.i);
            Product(thread, w.g);
          });
        });
    add("scan", 0, row_work * hidden_, [this](int thread) {
      int64_t layer = 0;
      ForEachLayer([&](const LayerWeights& w) { Scan(thread, w, layer++); });
    });
    add("norm+quantize o", 0, row_work * hidden_, [this](int thread) {
      ForEachLayer([&](const LayerWeights& w) {
        Quantize(thread, {x_.data(), nullptr, y_.data(), {w.o_norm.data()}, 1, hidden_});
      });
    });
    add("o product", layers_ * square, row_work * hidden_ * hidden_,
        [this](int thread) { ForEachLayer([&](const LayerWeights& w) { Product(thread, w.o); }); });
    add("norm+quantize gate", 0, row_work * hidden_, [this](int thread) {
      ForEachLayer([&](const LayerWeights& w) {
        Quantize(thread, {x_.data(), w.mlp_norm.data(), nullptr, {w.gate_norm.data()}, 1, hidden_});
      });
    });
    add("gate product", layers_ * gate, row_work * 2 * intermediate_ * hidden_, [this](int thread) {
      ForEachLayer([&](const LayerWeights& w) { Product(thread, w.gate); });
    });
    add("swiglu", 0, row_work * intermediate_,
        [this](int thread) { ForEachLayer([&](const LayerWeights&) { SwiGlu(thread); }); });
    add("norm+quantize down", 0, row_work * intermediate_, [this](int thread) {
      ForEachLayer([&](const LayerWeights& w) {
        Quantize(thread, {x_.data(), nullptr, nullptr, {w.down_norm.data()}, 1, intermediate_});
      });
    });
    add("down product", layers_ * down, row_work * intermediate_ * hidden_, [this](int thread) {
      ForEachLayer([&](const LayerWeights& w) { Product(thread, w.down); });
    });
    add("head product", head, tokens_ * model_.lm_head().rows * hidden_,
        [this](int thread) { Product(thread, model_.lm_head()); });
    add("greedy sampling", 0, tokens_ * model_.lm_head().rows,
        [this](int thread) { SampleRows(thread); });
    add("barriers", 0, 4 * layers_ + 2, [this](int thread) {
      for (int64_t i = 0; i < 4 * layers_ + 2; ++i) pool_->Barrier(thread);
    });
    return reports;
  }

 private:
  struct Free {
    void operator()(int8_t* bytes) const { std::free(bytes); }
  };
  using Bytes = std::unique_ptr<int8_t, Free>;

  // As between rows of floats in a step (forward.cc): an odd number of cache lines.
  static int64_t RowStride(int64_t floats) { return ((floats + 15) / 16 | 1) * 16; }

  // Zeros in whole cache lines, as in a step.
  static Bytes AlignedBytes(int64_t n) {
    const size_t bytes = static_cast<size_t>((n + 63) / 64 * 64);
    Bytes buffer(static_cast<int8_t*>(std::aligned_alloc(64, bytes)));
    std::fill_n(buffer.get(), bytes, int8_t{0});
    return buffer;
  }

  static std::vector<float> Wave(int64_t n) {
    std::vector<float> wave(n);
    for (int64_t k = 0; k < n; ++k) wave[k] = static_cast<float>(k * 7919 % 2003 - 1001) * 1e-3f;
    return wave;
  }

  // The fastest run within `seconds`, in microseconds.
  double Time(double seconds, const std::function<void(int)>& body) {
    using Clock = std::chrono::steady_clock;
    double best = std::numeric_limits<double>::infinity();
    const auto end = Clock::now() + std::chrono::duration<double>(seconds);
    do {
      const auto start = Clock::now();
      pool_->Run([&](int thread) { body(thread); });
      const std::chrono::duration<double, std::micro> time = Clock::now() - start;
      best = std::min(best, time.count());
    } while (Clock::now() < end);
    return best;
  }

  template <typename Body>
  void ForEachLayer(const Body& body) {
    for (const LayerWeights& layer : model_.layers()) body(layer);
  }

  // One token: each thread does it, as in a step.
  void Quantize(int thread, cpu::NormInput in) {
    const PanelLayout& layout = in.n == hidden_ ? hidden_layout_ : intermediate_layout_;
    const float* const x = in.x;
    const float* const y = in.y;
    for (int32_t t = tokens_ == 1 ? 0 : thread; t < tokens_;
         t += tokens_ == 1 ? 1 : pool_->size()) {
      in.x = x + t * in.n;
      if (y != nullptr) in.y = y + t * in.n;
      cpu::NormStats stats;
      kernels_.norm_stats(in, &stats);
      int8_t* const panel = panels_[1 + thread].get();
      for (int i = 0; i < in.num_w2; ++i) {
        kernels_.quantize(in, i, 127.0f / stats.max_t[i], TernaryMatrix::PaddedCols(in.n),
                          layout.Place(panel, t));
      }
    }
  }

  void Product(int thread, const TernaryMatrix& matrix) {
    const PanelLayout& layout = matrix.cols == hidden_ ? hidden_layout_ : intermediate_layout_;
    cpu::ProductArgs args;
    args.codes = matrix.codes;
    args.padded_cols = matrix.padded_cols();
    args.row_begin = Begin(matrix.rows, thread);
    args.row_end = Begin(matrix.rows, thread + 1);
    args.panel = panels_[0].get();
    args.tiles = layout.tiles().data();
    args.num_tiles = static_cast<int32_t>(layout.tiles().size());
    args.sums = sums_.data();
    args.factors = factors_.data();
    args.out = out_.data() + args.row_begin;
    args.ld = widest_;
    args.accumulate = false;
    kernels_.product(args);
  }

  // Sequences of one token.
  void Scan(int thread, const LayerWeights& weights, int64_t layer) {
    const int64_t begin = Begin(hidden_, thread);
    cpu::ScanArgs args;
    args.tokens = 1;
    args.channels = Begin(hidden_, thread + 1) - begin;
    args.ld_gates = hidden_;
    args.ld = hidden_;
    args.state = state_.data() + layer * hidden_ + begin;
    args.lower_bound = weights.lower_bound.data() + begin;
    args.g_norm = weights.g_norm.data() + begin;
    for (int32_t t = 0; t < tokens_; ++t) {
      args.forget = x_.data() + t * hidden_ + begin;
      args.input = args.forget;
      args.g = args.forget;
      args.y = y_.data() + t * hidden_ + begin;
      kernels_.scan(args);
    }
  }

  void SwiGlu(int thread) {
    const int64_t begin = Begin(intermediate_, thread);
    for (int32_t t = 0; t < tokens_; ++t) {
      const float* p = x_.data() + t * intermediate_ + begin;
      kernels_.swiglu(p, p, Begin(intermediate_, thread + 1) - begin,
                      y_.data() + t * intermediate_ + begin);
    }
  }

  void SampleRows(int thread) {
    for (int32_t t = thread; t < tokens_; t += pool_->size()) {
      const SampledToken sample =
          cpu::SampleRow(kernels_,
                         absl::MakeSpan(out_.data() + t * widest_,
                                        static_cast<size_t>(model_.config().vocab_size)),
                         SamplingParams(), 0);
      sums_[t] = sample.token & 1;
    }
  }

  // First row or channel of a thread's share.
  int64_t Begin(int64_t n, int thread) const {
    const int64_t groups = (n + 15) / 16;
    return std::min(n, groups * thread / pool_->size() * 16);
  }

  const Model& model_;
  const Kernels& kernels_;
  cpu::ThreadPool* const pool_;
  const int32_t tokens_;
  const int64_t hidden_;
  const int64_t intermediate_;
  const int64_t layers_;
  const int64_t widest_;
  std::vector<float> x_, y_, state_, out_, factors_;
  std::vector<int32_t> sums_;
  int64_t panel_bytes_ = 0;
  std::vector<Bytes> panels_;  // the products' input, and one for each thread to quantise into
  PanelLayout hidden_layout_;
  PanelLayout intermediate_layout_;
};

}  // namespace

absl::Status BenchKernels(const BenchOptions& options) {
  MMFREE_ASSIGN_OR_RETURN(const CpuIsa isa, SelectCpuIsa(options.cpu_isa));
  MMFREE_ASSIGN_OR_RETURN(const std::shared_ptr<const Model> model, MakeBenchModel(options));
  const int32_t threads = BenchThreads(options);
  cpu::ThreadPool pool(BenchThreadHomes(options));
  ReadBandwidth reads(model->ternary_bytes(), &pool);
  double bandwidth = 0;
  for (int i = 0; i < 10; ++i) bandwidth = std::max(bandwidth, reads.Measure());
  KernelBench bench(*model, cpu::KernelsFor(isa), &pool, options.batch);
  const std::vector<KernelReport> reports = bench.Run(options.seconds);
  for (int i = 0; i < 10; ++i) bandwidth = std::max(bandwidth, reads.Measure());
  PrintKernelReports(options, threads, std::string(CpuIsaName(isa)), bandwidth, reports);
  return absl::OkStatus();
}

}  // namespace mmfree

#include "server/backends/cpu/weights.h"

#include <cstdint>
#include <cstring>
#include <utility>

#include "server/backends/cpu/slices.h"
#include "server/base/status_macros.h"

namespace mmfree::cpu {
namespace {

// A matrix that is copied from one place to the other, in `parts` stacked parts of which each is
// shared out among the threads.
struct Copy {
  const TernaryMatrix* from;
  TernaryMatrix* to;
  int parts;
};

std::vector<Copy> Copies(const Model& model, Weights* weights) {
  std::vector<Copy> copies;
  for (size_t n = 0; n < weights->layers.size(); ++n) {
    const LayerWeights& from = model.layers()[n];
    LayerWeights& to = weights->layers[n];
    copies.insert(copies.end(), {{&from.i, &to.i, 1},
                                 {&from.f, &to.f, 1},
                                 {&from.g, &to.g, 1},
                                 {&from.o, &to.o, 1},
                                 {&from.gate, &to.gate, 2},
                                 {&from.down, &to.down, 1}});
  }
  copies.push_back({&model.lm_head(), &weights->lm_head, 1});
  return copies;
}

// The row groups that begin in the thread's share of the rows; the last share takes what is left.
void CopySlices(const Copy& copy, int thread, int threads, bool give_back) {
  const int64_t part_rows = copy.from->rows / copy.parts;
  const int64_t group_bytes = copy.from->padded_cols();
  for (int part = 0; part < copy.parts; ++part) {
    const Range rows = ThreadSlice(part_rows, thread, threads);
    const bool last = part + 1 == copy.parts && thread + 1 == threads;
    const int64_t begin = (part * part_rows + rows.begin) / kTernaryRowGroup;
    const int64_t end =
        last ? copy.from->row_groups() : (part * part_rows + rows.end) / kTernaryRowGroup;
    const uint8_t* const from = copy.from->codes + begin * group_bytes;
    const int64_t bytes = (end - begin) * group_bytes;
    memcpy(const_cast<uint8_t*>(copy.to->codes) + begin * group_bytes, from,
           static_cast<size_t>(bytes));
    if (give_back) GiveBack({from, static_cast<size_t>(bytes)});
  }
}

}  // namespace

Weights ViewWeights(const Model& model) {
  Weights weights;
  weights.layers = model.layers();
  weights.lm_head = model.lm_head();
  return weights;
}

absl::StatusOr<Weights> PlaceWeights(const Model& model, ThreadPool* pool) {
  Weights weights = ViewWeights(model);
  // Small pages: a slice of a matrix is smaller than a huge one.
  MMFREE_ASSIGN_OR_RETURN(weights.copies,
                          Region::Allocate(model.ternary_bytes(), Region::Pages::kSmall));
  const std::vector<Copy> copies = Copies(model, &weights);
  uint8_t* next = weights.copies.mutable_data();
  for (const Copy& copy : copies) {
    copy.to->codes = next;
    next += copy.from->bytes();
  }
  const bool mapped = model.packed();
  pool->Run([&copies, pool, mapped](int thread) {
    for (const Copy& copy : copies) CopySlices(copy, thread, pool->size(), mapped);
  });
  return weights;
}

}  // namespace mmfree::cpu

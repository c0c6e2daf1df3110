#include "tests/unit/sampling/reference_sampler.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <set>

namespace mmfree {
namespace {

using Order = std::function<bool(int32_t, int32_t)>;

std::vector<double> Penalized(const std::vector<float>& logits,
                              const RequestSampler::Options& options,
                              const std::vector<int32_t>& context,
                              const std::vector<int32_t>& output) {
  std::vector<double> l(logits.begin(), logits.end());
  for (const auto& [id, bias] : options.bias) l[id] += bias;
  std::vector<int32_t> all = context;
  all.insert(all.end(), output.begin(), output.end());
  const size_t window = std::min<size_t>(all.size(), options.penalties.repetition_window);
  for (const int32_t id :
       std::set<int32_t>(all.end() - static_cast<ptrdiff_t>(window), all.end())) {
    const double r = options.penalties.repetition;
    l[id] = l[id] > 0 ? l[id] / r : l[id] * r;
  }
  for (const int32_t id : std::set<int32_t>(output.begin(), output.end())) {
    l[id] -= static_cast<double>(options.penalties.frequency) *
                 static_cast<double>(std::count(output.begin(), output.end(), id)) +
             options.penalties.presence;
  }
  return l;
}

class Filter {
 public:
  Filter(std::vector<double>* p, double* margin) : p_(p), margin_(margin) {}

  std::vector<int32_t> Alive() const {
    std::vector<int32_t> ids;
    for (size_t i = 0; i < p_->size(); ++i) {
      if ((*p_)[i] > 0) ids.push_back(static_cast<int32_t>(i));
    }
    return ids;
  }

  void KeepCount(size_t count, const Order& order) {
    std::vector<int32_t> ids = Alive();
    std::sort(ids.begin(), ids.end(), order);
    for (size_t i = count; i < ids.size(); ++i) (*p_)[ids[i]] = 0;
    Normalize();
  }

  void KeepShare(double share, const Order& order) {
    std::vector<int32_t> ids = Alive();
    std::sort(ids.begin(), ids.end(), order);
    double sum = 0;
    size_t kept = 0;
    while (kept < ids.size() && (kept == 0 || sum < share)) {
      sum += (*p_)[ids[kept++]];
      *margin_ = std::min(*margin_, std::fabs(sum - share));
    }
    for (; kept < ids.size(); ++kept) (*p_)[ids[kept]] = 0;
    Normalize();
  }

  void KeepAbove(double least) {
    for (double& value : *p_) {
      if (value > 0) *margin_ = std::min(*margin_, std::fabs(value / least - 1));
      if (value < least) value = 0;
    }
    Normalize();
  }

 private:
  void Normalize() {
    const double total = std::accumulate(p_->begin(), p_->end(), 0.0);
    for (double& value : *p_) value /= total;
  }

  std::vector<double>* const p_;
  double* const margin_;
};

}  // namespace

std::vector<double> ReferenceDistribution(const std::vector<float>& logits,
                                          const RequestSampler::Options& options,
                                          double temperature, const std::vector<int32_t>& context,
                                          const std::vector<int32_t>& output, double* margin) {
  const std::vector<double> l = Penalized(logits, options, context, output);
  const std::set<int32_t> allowed(options.allowed.begin(), options.allowed.end());
  const std::set<int32_t> banned(options.banned.begin(), options.banned.end());
  const auto can = [&](size_t i) {
    const auto id = static_cast<int32_t>(i);
    return (allowed.empty() || allowed.count(id) > 0) && banned.count(id) == 0;
  };
  double max = -std::numeric_limits<double>::infinity();
  for (size_t i = 0; i < l.size(); ++i) {
    if (can(i)) max = std::max(max, l[i]);
  }
  std::vector<double> p(l.size(), 0.0);
  for (size_t i = 0; i < l.size(); ++i) {
    if (can(i)) p[i] = std::exp((l[i] - max) / temperature);
  }
  const double total = std::accumulate(p.begin(), p.end(), 0.0);
  for (double& value : p) value /= total;

  double ignored = 0;
  if (margin == nullptr) margin = &ignored;
  *margin = 1;
  Filter filter(&p, margin);
  const Order likelier = [&](int32_t a, int32_t b) { return l[a] != l[b] ? l[a] > l[b] : a < b; };
  if (options.filters.top_k > 0) filter.KeepCount(options.filters.top_k, likelier);
  if (options.filters.typical_p < 1) {
    double entropy = 0;
    for (const double value : p) entropy -= value > 0 ? value * std::log(value) : 0;
    std::vector<double> distance(p.size(), 0);
    for (size_t i = 0; i < p.size(); ++i) distance[i] = std::fabs(-std::log(p[i]) - entropy);
    filter.KeepShare(options.filters.typical_p, [&](int32_t a, int32_t b) {
      return distance[a] != distance[b] ? distance[a] < distance[b] : a < b;
    });
  }
  if (options.filters.top_p < 1) filter.KeepShare(options.filters.top_p, likelier);
  if (options.filters.min_p > 0) {
    filter.KeepAbove(options.filters.min_p * *std::max_element(p.begin(), p.end()));
  }
  return p;
}

}  // namespace mmfree

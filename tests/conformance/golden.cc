#include "tests/conformance/golden.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <numeric>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "server/base/status_macros.h"
#include "server/model/safetensors.h"

namespace mmfree {
namespace {

constexpr double kMedianLogitError = 1e-5;
constexpr double kLargestLogitError = 3e-2;
constexpr double kArgmaxAgreement = 0.98;
constexpr double kMeanNllDifference = 0.012;
constexpr float kDecisiveGap = 0.3f;
constexpr double kMeanEqualPrefix = 25;
constexpr int kEqualContinuations = 3;

template <typename T>
absl::StatusOr<std::vector<T>> ReadVector(const SafetensorsFile& file, const std::string& name,
                                          TensorType type) {
  const TensorView* tensor = file.Find(name);
  if (tensor == nullptr) return absl::NotFoundError(absl::StrCat("no tensor ", name));
  if (tensor->type != type)
    return absl::InvalidArgumentError(absl::StrCat(name, " has another dtype"));
  std::vector<T> values(tensor->bytes / sizeof(T));
  // The golden file has no empty tensors but the NLL of a one-token prompt.
  if (!values.empty()) std::memcpy(values.data(), tensor->data, tensor->bytes);
  return values;
}

double RelativeError(const std::vector<float>& out, const std::vector<float>& reference) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < reference.size(); ++i) {
    const double d = double{out[i]} - reference[i];
    difference += d * d;
    norm += double{reference[i]} * reference[i];
  }
  return std::sqrt(difference / norm);
}

float TopTwoGap(std::vector<float> logits) {
  std::nth_element(logits.begin(), logits.begin() + 1, logits.end(), std::greater<float>());
  return logits[0] - logits[1];
}

}  // namespace

absl::StatusOr<std::vector<GoldenCase>> LoadGolden(const std::string& path) {
  MMFREE_ASSIGN_OR_RETURN(const SafetensorsFile file, SafetensorsFile::Open(path));
  int count = 0;
  const auto it = file.metadata().find("cases");
  if (it == file.metadata().end() || !absl::SimpleAtoi(it->second, &count) || count <= 0) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": metadata has no count of cases"));
  }
  std::vector<GoldenCase> cases(count);
  for (int n = 0; n < count; ++n) {
    GoldenCase& c = cases[n];
    const auto text = file.metadata().find(absl::StrCat(n, ".text"));
    if (text != file.metadata().end()) c.text = text->second;
    const std::string fp32 = absl::StrCat(n, ".fp32.");
    MMFREE_ASSIGN_OR_RETURN(c.ids,
                            ReadVector<int32_t>(file, absl::StrCat(n, ".ids"), TensorType::kI32));
    MMFREE_ASSIGN_OR_RETURN(c.logits_last,
                            ReadVector<float>(file, fp32 + "logits_last", TensorType::kF32));
    MMFREE_ASSIGN_OR_RETURN(c.nll, ReadVector<float>(file, fp32 + "nll", TensorType::kF32));
    MMFREE_ASSIGN_OR_RETURN(c.argmax, ReadVector<int32_t>(file, fp32 + "argmax", TensorType::kI32));
    if (file.Find(fp32 + "greedy") != nullptr) {
      MMFREE_ASSIGN_OR_RETURN(c.greedy,
                              ReadVector<int32_t>(file, fp32 + "greedy", TensorType::kI32));
    }
  }
  return cases;
}

void ExpectScoresConform(const std::vector<GoldenCase>& cases, GoldenSubject& subject) {
  std::vector<double> errors;
  size_t positions = 0, equal = 0;
  double largest_nll_difference = 0;
  for (size_t n = 0; n < cases.size(); ++n) {
    SCOPED_TRACE(absl::StrCat("case ", n, ": ", cases[n].text));
    const GoldenCase& golden = cases[n];
    const absl::StatusOr<GoldenSubject::Scored> scored = subject.Score(golden.ids);
    ASSERT_TRUE(scored.ok()) << scored.status();
    ASSERT_EQ(scored->last_logits.size(), golden.logits_last.size());
    ASSERT_EQ(scored->argmax.size(), golden.ids.size());
    ASSERT_EQ(scored->logprobs.size(), golden.ids.size() - 1);
    errors.push_back(RelativeError(scored->last_logits, golden.logits_last));
    positions += golden.argmax.size();
    for (size_t i = 0; i < golden.argmax.size(); ++i)
      equal += scored->argmax[i] == golden.argmax[i];
    if (!golden.nll.empty()) {
      const double mean = -std::accumulate(scored->logprobs.begin(), scored->logprobs.end(), 0.0) /
                          static_cast<double>(golden.nll.size());
      const double reference = std::accumulate(golden.nll.begin(), golden.nll.end(), 0.0) /
                               static_cast<double>(golden.nll.size());
      EXPECT_LE(std::abs(mean - reference), kMeanNllDifference);
      largest_nll_difference = std::max(largest_nll_difference, std::abs(mean - reference));
    }
  }
  std::sort(errors.begin(), errors.end());
  const double agreement = static_cast<double>(equal) / static_cast<double>(positions);
  EXPECT_LE(errors[errors.size() / 2], kMedianLogitError);
  EXPECT_LE(errors.back(), kLargestLogitError);
  EXPECT_GE(agreement, kArgmaxAgreement);
  std::printf(
      "relative logit error: median %.1e, largest %.1e; argmax equal at %.2f %% of %zu positions; "
      "largest difference of a mean NLL %.4f\n",
      errors[errors.size() / 2], errors.back(), 100 * agreement, positions, largest_nll_difference);
}

void ExpectGreedyConforms(const std::vector<GoldenCase>& cases, GoldenSubject& subject) {
  double prefixes = 0;
  int continued = 0, whole = 0;
  for (size_t n = 0; n < cases.size(); ++n) {
    const GoldenCase& golden = cases[n];
    if (golden.greedy.empty()) continue;
    SCOPED_TRACE(absl::StrCat("case ", n, ": ", golden.text));
    const absl::StatusOr<std::vector<int32_t>> tokens =
        subject.Greedy(golden.ids, static_cast<int>(golden.greedy.size()));
    ASSERT_TRUE(tokens.ok()) << tokens.status();
    ASSERT_EQ(tokens->size(), golden.greedy.size());
    const size_t prefix =
        std::mismatch(tokens->begin(), tokens->end(), golden.greedy.begin()).first -
        tokens->begin();
    if (TopTwoGap(golden.logits_last) > kDecisiveGap) {
      EXPECT_GE(prefix, 1u);
    }
    prefixes += static_cast<double>(prefix);
    ++continued;
    whole += prefix == golden.greedy.size();
  }
  ASSERT_GT(continued, 0);
  EXPECT_GE(prefixes / continued, kMeanEqualPrefix);
  EXPECT_GE(whole, kEqualContinuations);
  std::printf("greedy: %.1f of 64 tokens equal on average, all of them in %d of %d cases\n",
              prefixes / continued, whole, continued);
}

}  // namespace mmfree

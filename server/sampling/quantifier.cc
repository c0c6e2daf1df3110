#include "server/sampling/quantifier.h"

#include "server/base/status_macros.h"

namespace mmfree {
namespace {

// After "{".
absl::StatusOr<Quantifier> TakeCounts(TextReader* reader) {
  MMFREE_ASSIGN_OR_RETURN(const int64_t min, reader->TakeNumber(Quantifier::kMaxCount));
  if (min < 0) return reader->Error("expected a count as in {2}, {2,} or {0,5}");
  Quantifier count = {min, min};
  if (reader->Consume(",")) {
    MMFREE_ASSIGN_OR_RETURN(const int64_t max, reader->TakeNumber(Quantifier::kMaxCount));
    count.max = max < 0 ? Quantifier::kUnbounded : max;
    if (max >= 0 && max < count.min) return reader->Error("a count's end is before its start");
  }
  if (!reader->Consume("}")) return reader->Error("expected } after a count");
  return count;
}

}  // namespace

absl::StatusOr<std::optional<Quantifier>> TakeQuantifier(TextReader* reader) {
  if (reader->Consume("*")) return Quantifier{0, Quantifier::kUnbounded};
  if (reader->Consume("+")) return Quantifier{1, Quantifier::kUnbounded};
  if (reader->Consume("?")) return Quantifier{0, 1};
  if (!reader->Consume("{")) return std::nullopt;
  MMFREE_ASSIGN_OR_RETURN(const Quantifier count, TakeCounts(reader));
  return count;
}

}  // namespace mmfree

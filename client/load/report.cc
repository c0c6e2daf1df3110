#include "client/load/report.h"

#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace mmfree {
namespace {

double PerSecond(int64_t count, absl::Duration time) {
  return time > absl::ZeroDuration() ? static_cast<double>(count) / absl::ToDoubleSeconds(time) : 0;
}

std::string Line(const char* name, const Histogram& histogram) {
  const auto ms = [](absl::Duration time) { return absl::ToDoubleMilliseconds(time); };
  return absl::StrFormat("%-12s %10.2f %10.2f %10.2f %10.2f\n", name, ms(histogram.Quantile(0.5)),
                         ms(histogram.Quantile(0.9)), ms(histogram.Quantile(0.99)),
                         ms(histogram.max()));
}

nlohmann::ordered_json Json(const Histogram& histogram) {
  return {{"count", histogram.count()},
          {"p50", absl::ToDoubleSeconds(histogram.Quantile(0.5))},
          {"p90", absl::ToDoubleSeconds(histogram.Quantile(0.9))},
          {"p99", absl::ToDoubleSeconds(histogram.Quantile(0.99))},
          {"max", absl::ToDoubleSeconds(histogram.max())}};
}

}  // namespace

std::string ToText(const Report& report) {
  std::string text = absl::StrFormat(
      "%d requests in %.2f s: %d finished, %d cancelled as planned, %d failed; at most %d at once\n"
      "%.1f requests/s finished, %.0f tokens/s, %.0f of finished requests\n",
      report.started, absl::ToDoubleSeconds(report.elapsed), report.finished, report.cancelled,
      report.failed(), report.most_concurrent, PerSecond(report.finished, report.elapsed),
      PerSecond(report.tokens, report.elapsed), PerSecond(report.finished_tokens, report.elapsed));
  absl::StrAppendFormat(&text, "%-12s %10s %10s %10s %10s\n", "ms", "p50", "p90", "p99", "max");
  absl::StrAppend(&text, Line("first token", report.first_token),
                  Line("inter-token", report.inter_token), Line("end to end", report.end_to_end));
  absl::StrAppendFormat(&text, "longest silence of a stream: %.2f ms\n",
                        absl::ToDoubleMilliseconds(report.longest_silence));
  if (report.cached_tokens > 0) {
    absl::StrAppendFormat(&text, "prompt tokens: %d, of which cached: %d\n", report.prompt_tokens,
                          report.cached_tokens);
  }
  for (const auto& [code, count] : report.errors) absl::StrAppend(&text, code, ": ", count, "\n");
  return text;
}

std::string ToJson(const Report& report) {
  nlohmann::ordered_json json = {
      {"elapsed", absl::ToDoubleSeconds(report.elapsed)},
      {"started", report.started},
      {"finished", report.finished},
      {"cancelled", report.cancelled},
      {"failed", report.failed()},
      {"most_concurrent", report.most_concurrent},
      {"tokens", report.tokens},
      {"tokens_per_s", PerSecond(report.tokens, report.elapsed)},
      {"finished_tokens_per_s", PerSecond(report.finished_tokens, report.elapsed)},
      {"finished_per_s", PerSecond(report.finished, report.elapsed)},
      {"prompt_tokens", report.prompt_tokens},
      {"cached_tokens", report.cached_tokens},
      {"first_token", Json(report.first_token)},
      {"inter_token", Json(report.inter_token)},
      {"end_to_end", Json(report.end_to_end)},
      {"longest_silence", absl::ToDoubleSeconds(report.longest_silence)},
      {"errors", nlohmann::ordered_json::object()}};
  for (const auto& [code, count] : report.errors) json["errors"][code] = count;
  return json.dump();
}

}  // namespace mmfree

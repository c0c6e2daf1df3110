#include "server/scheduler/work_ahead.h"

#include <algorithm>
#include <cmath>

namespace mmfree {
namespace {

// Steps until `departures` of the requests ahead have ended, when as many as `capacity` run at a
// time. Each slot is given on as soon as it is free, so it sees one departure after the steps of
// the request that runs in it, and then one more each time a request that waits has run through,
// which takes them all about as long. What is known of those that run is the mean and the deviation
// of their steps, so they are taken to be spread evenly around the mean.
double StepsUntil(int64_t departures, const Work& ahead, int32_t capacity, double used) {
  const double slots = capacity;
  const double waiting_steps =
      static_cast<double>(ahead.waiting_steps) - (1 - used) * static_cast<double>(ahead.open_steps);
  const double each = ahead.waiting > 0 ? waiting_steps / static_cast<double>(ahead.waiting) : 0;
  // Slots that nobody holds, or somebody of a lower class, are taken at once.
  const double taken = slots - static_cast<double>(ahead.running);
  const double mean = (static_cast<double>(ahead.running_steps) + taken * each) / slots;
  const double squares = (ahead.running_squares + taken * each * each) / slots;
  const double deviation = std::sqrt(std::max(0.0, squares - mean * mean));
  const double first = std::max(0.0, mean - std::sqrt(3.0) * deviation);
  double spread = 2 * (mean - first);
  // Whoever takes over a slot early departs from it before the last of those that run now.
  if (ahead.waiting > 0) spread = std::min(spread, each);
  const int64_t rounds = (departures - 1) / capacity;
  const double rest = static_cast<double>((departures - 1) % capacity + 1);
  return static_cast<double>(rounds) * each + first + spread * rest / (slots + 1);
}

}  // namespace

Work& Work::operator+=(const Work& other) {
  waiting += other.waiting;
  running += other.running;
  waiting_steps += other.waiting_steps;
  open_steps += other.open_steps;
  running_steps += other.running_steps;
  running_squares += other.running_squares;
  prompt_tokens += other.prompt_tokens;
  return *this;
}

absl::Duration EstimateWait(const WorkByClass& work, Priority priority, int size, int32_t capacity,
                            const StepCosts& costs) {
  Work ahead;
  const size_t own = static_cast<size_t>(priority);
  for (int i = 0; i <= size; ++i) ahead += work[own][i];
  for (size_t higher = own + 1; higher < kNumPriorities; ++higher) {
    for (const Work& of_size : work[higher]) ahead += of_size;
  }
  // Its prompt is fed after theirs, beside rows that decode.
  double steps = static_cast<double>(ahead.prompt_tokens) /
                 static_cast<double>(std::max<int64_t>(costs.prompt_budget, 1));
  const int64_t departures = ahead.waiting + ahead.running + 1 - capacity;
  if (departures > 0) steps = std::max(steps, StepsUntil(departures, ahead, capacity, costs.used));
  return costs.step + costs.decode_step * steps +
         costs.prompt_token * static_cast<double>(ahead.prompt_tokens);
}

}  // namespace mmfree

// Ranges of work on threads. Results never depend on how many there are: a range is only who does it, not how.
#pragma once

#include <algorithm>
#include <cstddef>
#include <thread>
#include <vector>

namespace orz {

// Calls work(begin, end) on at most `threads` disjoint ranges that cover [0, count), each at least `grain` long but for
// the last. `work` must not throw. Runs inline if one range is enough: starting a thread costs tens of microseconds.
template <typename Work>
void parallel_ranges(size_t count, size_t threads, size_t grain, const Work& work) {
  const size_t most = std::max<size_t>(1, count / std::max<size_t>(1, grain));
  const size_t ranges = std::max<size_t>(1, std::min(threads, most));
  if (ranges == 1) {
    work(size_t{0}, count);
    return;
  }
  std::vector<std::thread> others;
  others.reserve(ranges - 1);
  for (size_t r = 1; r < ranges; ++r)
    others.emplace_back([&work, count, ranges, r] { work(count * r / ranges, count * (r + 1) / ranges); });
  work(size_t{0}, count / ranges);
  for (std::thread& other : others) other.join();
}

}  // namespace orz

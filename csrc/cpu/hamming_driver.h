// Splitting and merging for the Hamming family. Knows no torch and no threads: `parallel_for(count, task)` is given,
// and runs task(0) ... task(count - 1), each once, on up to `threads` threads. Results do not depend on the threads.
#pragma once

#include <bit>
#include <limits>

#include "hamming_scan.h"

namespace embedding_kernels {

template <class ParallelFor>
void hamming_distance(const HammingLoops& loops, const Codes& queries, const Codes& codes, int32_t* out,
                      int64_t threads, const ParallelFor& parallel_for) {
  if (queries.count == 0 || codes.count == 0) return;
  const Shares shares = share(queries.count, codes.count, threads);
  parallel_for(shares.count(), [&](int64_t index) {
    const Shares::Task task = shares.task(index);
    std::vector<int32_t> bounds(task.end - task.begin, 0);
    scan(loops, Scan{queries, task.begin, task.end, codes, task.first, task.last, bounds.data()},
         [&](const Found& found) {
           std::copy(found.distances, found.distances + found.count, out + found.query * codes.count + found.first);
         });
  });
}

// Calls take(distance, index) for every near code whose bit in `allowed` is 1; null allows all.
template <class Take>
void for_each_near(const Found& found, const uint8_t* allowed, const Take& take) {
  for (int64_t group = 0; group * kGroupCodes < found.count; ++group) {
    for (uint32_t near = found.near[group]; near != 0; near &= near - 1) {
      const int64_t place = group * kGroupCodes + std::countr_zero(near), index = found.first + place;
      if (allowed != nullptr && (allowed[index / 8] >> (7 - index % 8) & 1) == 0) continue;
      take(found.distances[place], index);
    }
  }
}

// ---- all codes within a radius ----

struct RangeAnswers {
  struct Part {
    std::vector<int32_t> distances;
    std::vector<int64_t> indices;
  };
  int64_t ranges = 1;
  std::vector<Part> parts;       // [queries, ranges]
  std::vector<int64_t> offsets;  // [queries + 1]
};

template <class ParallelFor>
RangeAnswers hamming_range(const HammingLoops& loops, const Codes& queries, const Codes& codes, const uint8_t* allowed,
                           int64_t radius, int64_t threads, const ParallelFor& parallel_for) {
  const int32_t bound = static_cast<int32_t>(std::min(radius, 8 * codes.bytes + 1));
  const Shares shares = share(queries.count, codes.count, threads);
  RangeAnswers answers{shares.ranges, std::vector<RangeAnswers::Part>(queries.count * shares.ranges),
                       std::vector<int64_t>(queries.count + 1)};
  parallel_for(shares.count(), [&](int64_t index) {
    const Shares::Task task = shares.task(index);
    std::vector<int32_t> bounds(task.end - task.begin, bound);
    scan(loops, Scan{queries, task.begin, task.end, codes, task.first, task.last, bounds.data()},
         [&](const Found& found) {
           RangeAnswers::Part& part = answers.parts[found.query * shares.ranges + task.range];
           for_each_near(found, allowed, [&](int32_t distance, int64_t index) {
             part.distances.push_back(distance);
             part.indices.push_back(index);
           });
         });
  });
  for (int64_t q = 0; q < queries.count; ++q) {
    int64_t total = answers.offsets[q];
    for (int64_t r = 0; r < shares.ranges; ++r) {
      total += static_cast<int64_t>(answers.parts[q * shares.ranges + r].indices.size());
    }
    answers.offsets[q + 1] = total;
  }
  return answers;
}

template <class ParallelFor>
void write_range(const RangeAnswers& answers, int32_t* distances, int64_t* indices, const ParallelFor& parallel_for) {
  parallel_for(static_cast<int64_t>(answers.offsets.size()) - 1, [&](int64_t query) {
    int64_t to = answers.offsets[query];
    for (int64_t r = 0; r < answers.ranges; ++r) {
      const RangeAnswers::Part& part = answers.parts[query * answers.ranges + r];
      std::copy(part.distances.begin(), part.distances.end(), distances + to);
      std::copy(part.indices.begin(), part.indices.end(), indices + to);
      to += static_cast<int64_t>(part.indices.size());
    }
  });
}

// ---- the nearest codes ----

// What stands in places of the top-k that no code fills (FAISS's values).
constexpr int32_t kNoDistance = std::numeric_limits<int32_t>::max();
constexpr int64_t kNoIndex = -1;

// The nearest codes of one query so far. Codes arrive in ascending order of index, so one whose distance equals that of
// the k-th is already too late: only distances below `bound` are of interest.
class Nearest {
 public:
  Nearest(int64_t k, int64_t bits) : k_(k), bound_(static_cast<int32_t>(bits) + 1), counts_(bits + 2) {}

  int32_t bound() const { return bound_; }

  void add(const Found& found, const uint8_t* allowed) {
    for_each_near(found, allowed, [&](int32_t distance, int64_t index) {
      if (distance >= bound_) return;  // it has sunk since the codes were compared
      entries_.push_back({distance, index});
      ++counts_[distance];
      ++within_;
      while (within_ - counts_[bound_] >= k_) within_ -= counts_[bound_--];
    });
    if (static_cast<int64_t>(entries_.size()) > 2 * within_ + kMaxStep) forget();
  }

  // Writes up to k entries sorted by (distance, index); returns how many.
  int64_t finish(int32_t* out_distances, int64_t* out_indices) {
    int64_t place = 0;
    for (int64_t d = 0; d <= bound_; ++d) {
      const int64_t count = counts_[d];
      counts_[d] = place;
      place += count;
    }
    for (const Entry& entry : entries_) {
      if (entry.distance > bound_) continue;
      const int64_t to = counts_[entry.distance]++;
      if (to >= k_) continue;
      out_distances[to] = entry.distance;
      out_indices[to] = entry.index;
    }
    return std::min(place, k_);
  }

 private:
  struct Entry {
    int32_t distance;
    int64_t index;
  };

  // Entries that can no longer be among the k nearest; at the bound, the earliest stay.
  void forget() {
    int64_t spare = k_ - (within_ - counts_[bound_]);
    std::erase_if(entries_, [&](const Entry& entry) {
      return entry.distance > bound_ || (entry.distance == bound_ && spare-- <= 0);
    });
    const int64_t kept = static_cast<int64_t>(entries_.size());
    counts_[bound_] -= within_ - kept;
    within_ = kept;
  }

  int64_t k_;
  int32_t bound_;                // smallest distance with k entries at or below it; bits + 1 before there are k
  int64_t within_ = 0;           // entries at or below bound_
  std::vector<int64_t> counts_;  // entries at each distance
  std::vector<Entry> entries_;   // some of them above bound_
};

struct TopK {
  int64_t k;
  int32_t* distances;  // [queries, k]
  int64_t* indices;    // [queries, k]
};

// The sorted lists of one query's ranges, found[r] entries at r * kept, into the first k of them all. The ranges
// ascend, so that equal distances keep the order of their indices.
inline void merge_ranges(int64_t bits, int64_t ranges, int64_t kept, const int64_t* found, const int32_t* distances,
                         const int64_t* indices, int64_t k, int32_t* out_distances, int64_t* out_indices) {
  std::vector<int64_t> places(bits + 2);
  for (int64_t r = 0; r < ranges; ++r) {
    for (int64_t i = r * kept; i < r * kept + found[r]; ++i) ++places[distances[i] + 1];
  }
  for (int64_t d = 0; d <= bits; ++d) places[d + 1] += places[d];
  const int64_t filled = std::min(places[bits + 1], k);
  for (int64_t r = 0; r < ranges; ++r) {
    for (int64_t i = r * kept; i < r * kept + found[r]; ++i) {
      const int64_t to = places[distances[i]]++;
      if (to >= k) continue;
      out_distances[to] = distances[i];
      out_indices[to] = indices[i];
    }
  }
  std::fill(out_distances + filled, out_distances + k, kNoDistance);
  std::fill(out_indices + filled, out_indices + k, kNoIndex);
}

// With more answers a query than this, lists of every range would take more memory than they save time.
constexpr int64_t kMaxMergedAnswers = 1024;

template <class ParallelFor>
void hamming_topk(const HammingLoops& loops, const Codes& queries, const Codes& codes, const uint8_t* allowed,
                  const TopK& out, int64_t threads, const ParallelFor& parallel_for) {
  if (queries.count == 0) return;
  const int64_t bits = 8 * codes.bytes;
  Shares shares = share(queries.count, codes.count, threads);
  if (out.k > kMaxMergedAnswers && queries.count >= threads) {
    shares.ranges = 1;
    shares.query_blocks = std::max(shares.query_blocks, threads);
  }
  const int64_t ranges = shares.ranges;
  const int64_t kept = std::min(out.k, std::max<int64_t>(ceil_div(codes.count, ranges), 1));
  std::vector<int32_t> part_distances(queries.count * ranges * kept);
  std::vector<int64_t> part_indices(queries.count * ranges * kept);
  std::vector<int64_t> found(queries.count * ranges);
  parallel_for(shares.count(), [&](int64_t index) {
    const Shares::Task task = shares.task(index);
    std::vector<Nearest> nearest(task.end - task.begin, Nearest(kept, bits));
    std::vector<int32_t> bounds(task.end - task.begin, static_cast<int32_t>(bits) + 1);
    scan(loops, Scan{queries, task.begin, task.end, codes, task.first, task.last, bounds.data()},
         [&](const Found& found) {
           if (!found.any()) return;  // nearly always
           Nearest& of_query = nearest[found.query - task.begin];
           of_query.add(found, allowed);
           bounds[found.query - task.begin] = of_query.bound();
         });
    for (int64_t q = task.begin; q < task.end; ++q) {
      const int64_t at = q * ranges + task.range;
      found[at] = nearest[q - task.begin].finish(part_distances.data() + at * kept, part_indices.data() + at * kept);
    }
  });
  parallel_for(queries.count, [&](int64_t q) {
    merge_ranges(bits, ranges, kept, found.data() + q * ranges, part_distances.data() + q * ranges * kept,
                 part_indices.data() + q * ranges * kept, out.k, out.distances + q * out.k, out.indices + q * out.k);
  });
}

}  // namespace embedding_kernels

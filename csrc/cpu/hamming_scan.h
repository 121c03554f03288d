// Goes over codes once for several queries, for hamming_driver.h. Knows no torch and no threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "hamming.h"

namespace embedding_kernels {

// Packed codes `bytes` wide, row n at data + n * stride.
struct Codes {
  const uint8_t* data;
  int64_t count;
  int64_t stride;
  int64_t bytes;

  const uint8_t* row(int64_t n) const { return data + n * stride; }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Codes in one step of a scan. Those that are read as they lie stay in the first cache for the next query; distances
// of many queries stay in the second until they have been looked at.
constexpr int64_t kStepBytes = 32 * 1024;
constexpr int64_t kMaxStep = 2048;
constexpr int64_t kStepDistances = 32 * 1024;

inline int64_t step_codes(const HammingLoops& loops, int64_t queries, int64_t bytes) {
  const int64_t fit =
      queries < loops.many_queries ? kStepBytes / std::max<int64_t>(bytes, 1) : kStepDistances / queries;
  return std::clamp<int64_t>(fit / kGroupCodes, 4, kMaxStep / kGroupCodes) * kGroupCodes;
}

// Memory aligned as the loops want it.
class AlignedMemory {
 public:
  explicit AlignedMemory(int64_t bytes) : lines_(ceil_div(bytes, 64)) {}
  uint8_t* data() { return reinterpret_cast<uint8_t*>(lines_.data()); }

 private:
  struct alignas(64) Line {
    uint8_t bytes[64];
  };
  std::vector<Line> lines_;
};

// Some codes in a row and one query: distances[i] is that of code first + i; bit i % 32 of near[i / 32] is set where
// it is below the query's bound, and no bit past the last code is.
struct Found {
  int64_t query, first, count;
  const int32_t* distances;
  const uint32_t* near;

  bool any() const {
    uint32_t bits = 0;
    for (int64_t group = 0; group * kGroupCodes < count; ++group) bits |= near[group];
    return bits != 0;
  }
};

// Queries [begin, end) and codes [first, last). bounds[query - begin] may be lowered on the way.
struct Scan {
  Codes queries;
  int64_t begin, end;
  Codes codes;
  int64_t first, last;
  int32_t* bounds;

  int64_t query_count() const { return end - begin; }
};

// Calls visit(found) for every query and step of codes, each query's in ascending order. What is found lives until the
// next call.
template <class Visit>
void scan(const HammingLoops& loops, const Scan& work, const Visit& visit) {
  const int64_t queries = work.query_count(), words = ceil_div(work.codes.bytes, 8);
  const bool many = queries >= loops.many_queries;
  const int64_t together = many ? loops.block_queries : 1, blocks = ceil_div(queries, together);
  const int64_t block_bytes = many ? loops.block_bytes(words) : 0;
  AlignedMemory block_memory(blocks * block_bytes);
  for (int64_t b = 0; many && b < blocks; ++b) {
    loops.lay_queries(work.queries.row(work.begin + b * together), work.queries.stride,
                      std::min(together, queries - b * together), work.queries.bytes,
                      block_memory.data() + b * block_bytes);
  }
  const int64_t step = step_codes(loops, queries, work.codes.bytes), groups = step / kGroupCodes;
  // a line more: rows a power of two apart would push each other out of the cache
  const int64_t row = step + 16;
  AlignedMemory scratch(many ? loops.scratch_bytes(words) : 0);
  AlignedMemory out(4 * row * together * (many ? blocks : 1));
  std::vector<uint32_t> near(groups * (many ? queries : 1));
  for (int64_t n = work.first; n < work.last; n += step) {
    Comparison c = {block_memory.data(),
                    queries,
                    work.codes.row(n),
                    work.codes.stride,
                    std::min(step, work.last - n),
                    work.codes.bytes,
                    0,
                    work.bounds,
                    scratch.data(),
                    reinterpret_cast<int32_t*>(out.data()),
                    row,
                    near.data(),
                    groups};
    c.following = work.last - n - c.count;
    if (many) loops.many_distances(c);
    for (int64_t q = 0; q < queries; ++q) {
      if (!many) {
        c.queries = work.queries.row(work.begin + q);
        c.bounds = work.bounds + q;
        loops.distances(c);
      }
      const int64_t place = many ? q : 0;
      visit(Found{work.begin + q, n, c.count, c.out + place * row, c.near + place * groups});
    }
  }
}

// How queries and codes are shared out: the task `block, range` has queries [begin, end) and codes [first, last).
struct Shares {
  int64_t queries, codes, query_blocks, ranges;

  struct Task {
    int64_t range, begin, end, first, last;
  };
  int64_t count() const { return query_blocks * ranges; }
  Task task(int64_t index) const {
    const int64_t block = index / ranges, range = index % ranges;
    return {range, queries * block / query_blocks, queries * (block + 1) / query_blocks, codes * range / ranges,
            codes * (range + 1) / ranges};
  }
};

constexpr int64_t kMinRange = 2048;
constexpr int64_t kMaxQueriesATask = 256;

// Codes are shared out before queries: laid out once, they serve all of them.
inline Shares share(int64_t queries, int64_t codes, int64_t threads) {
  const int64_t ranges = std::clamp<int64_t>(codes / kMinRange, 1, threads);
  const int64_t blocks = std::max(ceil_div(queries, kMaxQueriesATask), ceil_div(threads, ranges));
  return {queries, codes, std::clamp<int64_t>(blocks, 1, std::max<int64_t>(queries, 1)), ranges};
}

}  // namespace embedding_kernels

// Goes over codes once for several queries. Knows no torch and no threads.
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

// Codes that are read as they lie, in one step: they stay in the first cache for the next query.
constexpr int64_t kStepBytes = 32 * 1024;
constexpr int64_t kMaxStep = 2048;
constexpr int64_t kMaxStepDistances = 16 * 1024;

inline int64_t step_codes(const HammingLoops& loops, int64_t queries, int64_t bytes) {
  const int64_t words = std::max<int64_t>(ceil_div(bytes, 8), 1);
  if (queries < loops.tile_from) return std::clamp<int64_t>(kStepBytes / (8 * words), 1, kMaxStep);
  const int64_t most = std::min(kMaxStep, kMaxStepDistances / loops.tile_queries) / loops.tile_codes;
  return std::clamp<int64_t>(loops.tile_bytes / (words * loops.word_bytes) / loops.tile_codes, 1, most) *
         loops.tile_codes;
}

// Memory for tiles, aligned as the loops want it.
class TileMemory {
 public:
  explicit TileMemory(int64_t bytes) : lines_(ceil_div(bytes, 64)) {}
  uint8_t* data() { return lines_.data()->bytes; }

 private:
  struct alignas(64) Line {
    uint8_t bytes[64];
  };
  std::vector<Line> lines_;
};

// Calls visit(query, first, count, distances) for queries [begin, end) and every step of codes [first_code, last_code),
// each query's steps in ascending order. `distances` lives until the next call.
template <class Visit>
void scan_rows(const HammingLoops& loops, const Codes& queries, int64_t begin, int64_t end, const Codes& codes,
               int64_t first_code, int64_t last_code, const Visit& visit) {
  const int64_t step = step_codes(loops, end - begin, codes.bytes);
  std::vector<int32_t> distances(step);
  for (int64_t n = first_code; n < last_code; n += step) {
    const int64_t count = std::min(step, last_code - n);
    for (int64_t q = begin; q < end; ++q) {
      loops.distances(queries.row(q), codes.row(n), codes.stride, count, codes.bytes, distances.data());
      visit(q, n, count, distances.data());
    }
  }
}

template <class Visit>
void scan_tiles(const HammingLoops& loops, const Codes& queries, int64_t begin, int64_t end, const Codes& codes,
                int64_t first_code, int64_t last_code, const Visit& visit) {
  const int64_t words = ceil_div(codes.bytes, 8), together = loops.tile_queries;
  const int64_t step = step_codes(loops, end - begin, codes.bytes);
  const int64_t block_bytes = together * (words * loops.word_bytes + loops.query_bytes);
  TileMemory blocks(ceil_div(end - begin, together) * block_bytes);
  for (int64_t q = begin; q < end; q += together) {
    loops.lay_queries(queries.row(q), queries.stride, std::min(together, end - q), queries.bytes,
                      blocks.data() + (q - begin) / together * block_bytes);
  }
  TileMemory tiles(step * words * loops.word_bytes);
  std::vector<int32_t> distances(together * step);
  for (int64_t n = first_code; n < last_code; n += step) {
    const int64_t count = std::min(step, last_code - n);
    loops.lay_codes(codes.row(n), codes.stride, count, codes.bytes, tiles.data());
    const int64_t padded = ceil_div(count, loops.tile_codes) * loops.tile_codes;
    for (int64_t q = begin; q < end; q += together) {
      const int64_t present = std::min(together, end - q);
      loops.tile_distances(blocks.data() + (q - begin) / together * block_bytes, present, tiles.data(), padded, words,
                           distances.data(), step);
      for (int64_t i = 0; i < present; ++i) visit(q + i, n, count, distances.data() + i * step);
    }
  }
}

template <class Visit>
void scan(const HammingLoops& loops, const Codes& queries, int64_t begin, int64_t end, const Codes& codes,
          int64_t first_code, int64_t last_code, const Visit& visit) {
  if (end - begin < loops.tile_from) {
    scan_rows(loops, queries, begin, end, codes, first_code, last_code, visit);
  } else {
    scan_tiles(loops, queries, begin, end, codes, first_code, last_code, visit);
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

constexpr int64_t kMinRange = 8192;
constexpr int64_t kMaxQueriesATask = 256;

// Codes are shared out before queries: laid out once, they serve all of them.
inline Shares share(int64_t queries, int64_t codes, int64_t threads) {
  const int64_t ranges = std::clamp<int64_t>(codes / kMinRange, 1, threads);
  const int64_t blocks = std::max(ceil_div(queries, kMaxQueriesATask), ceil_div(threads, ranges));
  return {queries, codes, std::clamp<int64_t>(blocks, 1, std::max<int64_t>(queries, 1)), ranges};
}

}  // namespace embedding_kernels

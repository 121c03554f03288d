// Splitting and merging for the Hamming family. Knows no torch and no threads: `parallel_for(count, task)` is given,
// and runs task(0) ... task(count - 1), each once, on up to `threads` threads. Results do not depend on the threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "hamming.h"

namespace embedding_kernels {

// Packed codes `bytes` wide, row n at data + n * stride.
struct Codes {
  const uint8_t* data;
  int64_t count;
  int64_t stride;
  int64_t bytes;
};

// What stands in places of the top-k that no code fills (FAISS's values).
constexpr int32_t kNoDistance = std::numeric_limits<int32_t>::max();
constexpr int64_t kNoIndex = -1;

// Fewer queries than this read the codes as they lie; more share interleaved tiles.
constexpr int64_t kTileQueries = 4;
constexpr int64_t kTileBytes = 32 * 1024;
constexpr int64_t kMinRange = 8192;
constexpr int64_t kMaxQueriesATask = 128;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Codes in one step of a scan: a tile that stays in the first cache, a whole number of interleaved groups.
inline int64_t step_codes(const HammingLoops& loops, int64_t bytes) {
  const int64_t fit = kTileBytes / std::max<int64_t>(ceil_div(bytes, 8) * 8, 8);
  return std::clamp<int64_t>(fit / loops.tile_codes, 1, 2048 / loops.tile_codes) * loops.tile_codes;
}

// Queries as zero-padded words, an even number of rows, so that they can be taken two at a time.
class QueryWords {
 public:
  QueryWords(const Codes& queries, int64_t begin, int64_t end)
      : words_(ceil_div(queries.bytes, 8)), data_((end - begin + 1) / 2 * 2 * words_) {
    for (int64_t q = begin; q < end; ++q) {
      const uint8_t* row = queries.data + q * queries.stride;
      std::copy(row, row + queries.bytes, reinterpret_cast<uint8_t*>(data_.data() + (q - begin) * words_));
    }
  }
  int64_t words() const { return words_; }
  const uint64_t* row(int64_t query) const { return data_.data() + query * words_; }

 private:
  int64_t words_;
  std::vector<uint64_t> data_;
};

// Calls visit(query, first, count, distances) for queries [begin, end) and every step of codes [first_code, last_code),
// each query's steps in ascending order. `distances` lives until the next call.
template <class Visit>
void scan(const HammingLoops& loops, const Codes& queries, int64_t begin, int64_t end, const Codes& codes,
          int64_t first_code, int64_t last_code, const Visit& visit) {
  const int64_t step = step_codes(loops, codes.bytes);
  std::vector<int32_t> distances(2 * step);
  int32_t* const out = distances.data();
  if (end - begin < kTileQueries) {
    for (int64_t n = first_code; n < last_code; n += step) {
      const int64_t count = std::min(step, last_code - n);
      for (int64_t q = begin; q < end; ++q) {
        loops.distances(queries.data + q * queries.stride, codes.data + n * codes.stride, codes.stride, count,
                        codes.bytes, out);
        visit(q, n, count, out);
      }
    }
    return;
  }
  const QueryWords words(queries, begin, end);
  std::vector<uint64_t> tiles(step * words.words());
  for (int64_t n = first_code; n < last_code; n += step) {
    const int64_t count = std::min(step, last_code - n);
    loops.interleave(codes.data + n * codes.stride, codes.stride, count, codes.bytes, tiles.data());
    const int64_t padded = ceil_div(count, loops.tile_codes) * loops.tile_codes;
    for (int64_t q = begin; q < end; q += 2) {
      loops.tile_distances(words.row(q - begin), words.row(q - begin + 1), tiles.data(), padded, words.words(), out,
                           out + step);
      visit(q, n, count, out);
      if (q + 1 < end) visit(q + 1, n, count, out + step);
    }
  }
}

template <class ParallelFor>
void hamming_distance(const HammingLoops& loops, const Codes& queries, const Codes& codes, int32_t* out,
                      int64_t threads, const ParallelFor& parallel_for) {
  if (queries.count == 0 || codes.count == 0) return;
  const int64_t query_blocks = ceil_div(queries.count, kMaxQueriesATask);
  const int64_t ranges = std::clamp<int64_t>(ceil_div(threads, query_blocks), 1, ceil_div(codes.count, kMinRange));
  parallel_for(query_blocks * ranges, [&](int64_t task) {
    const int64_t block = task / ranges, range = task % ranges;
    scan(loops, queries, queries.count * block / query_blocks, queries.count * (block + 1) / query_blocks, codes,
         codes.count * range / ranges, codes.count * (range + 1) / ranges,
         [&](int64_t query, int64_t first, int64_t count, const int32_t* distances) {
           std::copy(distances, distances + count, out + query * codes.count + first);
         });
  });
}

// The nearest codes of one query so far. Codes arrive in ascending order of index, so one whose distance equals that of
// the k-th is already too late: only distances below `bound` are of interest.
class Nearest {
 public:
  Nearest(int64_t k, int64_t bits, int64_t range, int64_t step)
      : k_(k), bound_(static_cast<int32_t>(bits) + 1), counts_(bits + 2) {
    capacity_ = std::min(range, 2 * std::min(k, range) + 4 * step) + step;
  }

  void add(const HammingLoops& loops, const int32_t* distances, int64_t count, int64_t first, const uint8_t* allowed) {
    if (distances_ == nullptr) {
      // not filled: most of it is never reached
      distances_.reset(new int32_t[capacity_]);
      indices_.reset(new int64_t[capacity_]);
    }
    if (size_ + count > capacity_) compact();
    int64_t found = loops.select(distances, count, bound_, first, distances_.get() + size_, indices_.get() + size_);
    if (allowed != nullptr) found = drop_forbidden(found, allowed);
    for (int64_t i = size_; i < size_ + found; ++i) ++counts_[distances_[i]];
    size_ += found;
    within_ += found;
    while (within_ - counts_[bound_] >= k_) within_ -= counts_[bound_--];
  }

  // Writes up to k entries sorted by (distance, index); returns how many.
  int64_t finish(int32_t* out_distances, int64_t* out_indices) {
    int64_t place = 0;
    for (int64_t d = 0; d <= bound_; ++d) {
      const int64_t count = counts_[d];
      counts_[d] = place;
      place += count;
    }
    for (int64_t i = 0; i < size_; ++i) {
      if (distances_[i] > bound_) continue;
      const int64_t to = counts_[distances_[i]]++;
      if (to >= k_) continue;
      out_distances[to] = distances_[i];
      out_indices[to] = indices_[i];
    }
    return std::min(place, k_);
  }

 private:
  int64_t drop_forbidden(int64_t found, const uint8_t* allowed) {
    int64_t kept = size_;
    for (int64_t i = size_; i < size_ + found; ++i) {
      const int64_t index = indices_[i];
      if ((allowed[index / 8] >> (7 - index % 8) & 1) == 0) continue;
      distances_[kept] = distances_[i];
      indices_[kept++] = index;
    }
    return kept - size_;
  }

  // Forgets entries that can no longer be among the k nearest: at the bound, the earliest stay.
  void compact() {
    int64_t spare = k_ - (within_ - counts_[bound_]);
    int64_t kept = 0;
    for (int64_t i = 0; i < size_; ++i) {
      if (distances_[i] > bound_ || (distances_[i] == bound_ && spare-- <= 0)) continue;
      distances_[kept] = distances_[i];
      indices_[kept++] = indices_[i];
    }
    counts_[bound_] -= within_ - kept;
    within_ = size_ = kept;
  }

  int64_t k_;
  int32_t bound_;       // smallest distance with k entries at or below it; bits + 1 before there are k
  int64_t within_ = 0;  // entries at or below bound_
  int64_t size_ = 0;    // entries held, some of them above bound_
  int64_t capacity_;
  std::vector<int64_t> counts_;  // entries at each distance
  std::unique_ptr<int32_t[]> distances_;
  std::unique_ptr<int64_t[]> indices_;
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

template <class ParallelFor>
void hamming_topk(const HammingLoops& loops, const Codes& queries, const Codes& codes, const uint8_t* allowed,
                  const TopK& out, int64_t threads, const ParallelFor& parallel_for) {
  if (queries.count == 0) return;
  const int64_t bits = 8 * codes.bytes;
  const int64_t query_blocks = std::min(queries.count, std::max(ceil_div(queries.count, kMaxQueriesATask),
                                                                queries.count >= threads * kTileQueries ? threads : 1));
  // one query is spread over all threads
  const int64_t ranges =
      std::clamp<int64_t>(ceil_div(threads, query_blocks), 1, std::max<int64_t>(codes.count / kMinRange, 1));
  const int64_t kept = std::min(out.k, std::max<int64_t>(ceil_div(codes.count, ranges), 1));
  std::vector<int32_t> part_distances(queries.count * ranges * kept);
  std::vector<int64_t> part_indices(queries.count * ranges * kept);
  std::vector<int64_t> found(queries.count * ranges);
  parallel_for(query_blocks * ranges, [&](int64_t task) {
    const int64_t block = task / ranges, range = task % ranges;
    const int64_t begin = queries.count * block / query_blocks, end = queries.count * (block + 1) / query_blocks;
    const int64_t first = codes.count * range / ranges, last = codes.count * (range + 1) / ranges;
    std::vector<Nearest> nearest;
    nearest.reserve(end - begin);
    for (int64_t q = begin; q < end; ++q)
      nearest.emplace_back(kept, bits, last - first, step_codes(loops, codes.bytes));
    scan(loops, queries, begin, end, codes, first, last,
         [&](int64_t query, int64_t start, int64_t count, const int32_t* distances) {
           nearest[query - begin].add(loops, distances, count, start, allowed);
         });
    for (int64_t q = begin; q < end; ++q) {
      const int64_t at = (q * ranges + range);
      found[at] = nearest[q - begin].finish(part_distances.data() + at * kept, part_indices.data() + at * kept);
    }
  });
  parallel_for(query_blocks, [&](int64_t block) {
    for (int64_t q = queries.count * block / query_blocks; q < queries.count * (block + 1) / query_blocks; ++q) {
      merge_ranges(bits, ranges, kept, found.data() + q * ranges, part_distances.data() + q * ranges * kept,
                   part_indices.data() + q * ranges * kept, out.k, out.distances + q * out.k, out.indices + q * out.k);
    }
  });
}

}  // namespace embedding_kernels

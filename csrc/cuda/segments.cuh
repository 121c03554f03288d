// Packed segments of rows: which rows fall to a block, and sums over rows whose order nothing but the rows decides.
#pragma once

#include <algorithm>

#include "launch.cuh"
#include "raw.cuh"

namespace embedding_kernels::cuda {

constexpr int kSegmentThreads = 256;

// Segment s has the rows from offsets[s] to offsets[s + 1]. Offsets are clamped, so that nothing is out of bounds
// whatever they hold.
struct Segments {
  const int32_t* offsets;  // [count + 1]
  int64_t count, total;

  __device__ int64_t start(int64_t segment) const {
    const int64_t offset = offsets[segment];
    return offset < 0 ? 0 : offset > total ? total : offset;
  }
  __device__ int64_t end(int64_t segment) const {
    const int64_t first = start(segment), last = start(segment + 1);
    return last < first ? first : last;
  }
};

// The first i of [0, count) of which above(i) holds, or `count`, where above changes once at most. The lanes of a warp
// look at 32 places at a time; all of them come.
template <class Above>
__device__ inline int64_t first_above(int64_t count, const Above& above) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t step = (high - low + kWarp - 1) / kWarp;
    const int64_t place = low + threadIdx.x % kWarp * step;
    const int64_t below = ptx::count_bits(ptx::vote_ballot(place < high && !above(place)));
    const int64_t next = low + below * step;
    low = below == 0 ? low : next - step + 1;
    high = next < high ? next : high;
  }
  return low;
}

// The segment of a row: -1 before the first, segments.count past the last. The lanes of a warp come.
__device__ inline int64_t segment_of(const Segments& segments, int64_t row) {
  return first_above(segments.count + 1, [&](int64_t s) { return segments.start(s) > row; }) - 1;
}

// ---- long segments are cut from their beginning, so that their sums have the same bits in any batch ----

// The rows that fall to a turn. Turns start / kRows + s and on belong to segment s: enough for its spans, and found
// without a list of them.
template <int kRows>
struct Span {
  int64_t segment, first, last;  // all rows of the segment
  int64_t start, end;            // those of the span

  static int64_t turns(const Segments& segments) { return segments.total / kRows + segments.count; }

  __device__ Span(const Segments& segments, int64_t turn) {
    const auto above = [&](int64_t s) { return segments.start(s) / kRows + s > turn; };
    segment = first_above(segments.count, above) - 1;
    first = last = start = end = 0;
    if (segment < 0) return;
    first = segments.start(segment);
    last = segments.end(segment);
    start = first + (turn - segment - first / kRows) * kRows;
    end = last < start + kRows ? last : start + kRows;
  }
  // An empty segment has one span, without rows.
  __device__ bool exists() const { return segment >= 0 && start >= first && (start < last || start == first); }
  __device__ bool is_whole() const { return last - first <= kRows; }
  // Where a span's sums stand among those of all segments of several spans, which never overlap.
  __device__ int64_t part() const { return 2 * (first / kRows) + (start - first) / kRows; }
  static int64_t parts(const Segments& segments) { return 2 * (segments.total / kRows); }
};

// The segment of several spans whose sums a turn joins. Each such holds one row, a multiple of kRows, in its first span
// or just behind: that row's turn it is.
template <int kRows>
struct Join {
  int64_t segment, first, last;  // its rows
  int64_t part, spans;           // its sums
  bool exists = false;

  static int64_t turns(const Segments& segments) { return (segments.total + kRows - 1) / kRows; }

  __device__ Join(const Segments& segments, int64_t turn) {
    segment = segment_of(segments, turn * kRows);
    first = last = part = spans = 0;
    if (segment < 0 || segment >= segments.count) return;
    first = segments.start(segment);
    last = segments.end(segment);
    part = 2 * (first / kRows);
    spans = (last - first + kRows - 1) / kRows;
    exists = spans > 1 && turn * kRows - first < kRows;
  }
};

// ---- a block of threads over rows and columns ----

// `across` threads, a power of two, stand side by side on the columns of a tile; the others take every `down`-th row.
// The width alone decides, so that nothing else changes the order of a sum.
struct Tile {
  int across, down;
  int width;        // columns
  int64_t count;    // tiles over all columns
  int64_t at_once;  // blocks of a turn: each takes every at_once-th tile
};

template <int N>
Tile tile_over(int64_t columns, int most_across) {
  int across = 1;
  while (across < most_across && across * N < columns) across *= 2;
  const int64_t count = (columns + across * N - 1) / (across * N);
  return {across, kSegmentThreads / across, across * N, count, count};
}

// Blocks enough to fill the device some times over; more would only find out again what a turn knows before its first
// tile.
inline Tile few_at_once(Tile tile, int64_t turns, int multiprocessors) {
  tile.at_once = std::clamp<int64_t>(int64_t{multiprocessors} * 32 / turns, 1, tile.count);
  return tile;
}

inline dim3 grid_of(const Tile& tile, int64_t turns) { return dim3(static_cast<unsigned>(turns * tile.at_once)); }

// Of the N columns of each thread the sum over the threads below one another, for all of them. Every thread of the
// block comes; `room` has N values for each.
template <int N>
__device__ inline void sum_down(const Tile& tile, float (&mine)[N], float* room) {
  // the block may still read what it summed before
  ptx::sync_block();
#pragma unroll
  for (int i = 0; i < N; ++i) room[threadIdx.x * N + i] = mine[i];
  for (int half = tile.down / 2; half > 0; half /= 2) {
    ptx::sync_block();
    for (int at = threadIdx.x; at < half * tile.width; at += kSegmentThreads) room[at] += room[at + half * tile.width];
  }
  ptx::sync_block();
#pragma unroll
  for (int i = 0; i < N; ++i) mine[i] = room[threadIdx.x % tile.across * N + i];
}

}  // namespace embedding_kernels::cuda

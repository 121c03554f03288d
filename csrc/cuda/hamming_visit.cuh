// What the roads of the scan share: which tiles a span has, and what is done with distances.
//
// W is a warp's share of a scan: its lane, group, span and first_query, and counted(scan), [queries, 2] in shared
// memory: codes so far below and at the bound of each; only lane 0 looks while codes are visited.
#pragma once

#include "hamming_scan.cuh"
#include "ptx.cuh"

namespace embedding_kernels::cuda {
namespace {

template <class T>
__device__ inline T* shared_at(int32_t offset) {
  return reinterpret_cast<T*>(&shared_memory<uint8_t>() + offset);
}

// ---- tiles ----

// 32 bits do for tiles of more codes than memory holds.
constexpr uint32_t kNoTile = 0xffffffffu;

// The tiles of a span, in ascending order.
struct Tiles {
  uint32_t following, end, window_start = 0;
  uint32_t window = 0;  // tiles near a query, from window_start on

  __device__ Tiles(const Scan& s, int64_t span)
      : following(static_cast<uint32_t>(s.visited * span / s.spans)),
        end(static_cast<uint32_t>(s.visited * (span + 1) / s.spans)) {}

  // The next one, or kNoTile; a whole warp comes.
  template <class W>
  __device__ uint32_t next(const Scan& s, const W& w) {
    if (!s.only_near) return following < end ? following++ * s.tile_stride : kNoTile;
    while (window == 0) {
      if (following >= end) return kNoTile;
      const uint32_t tile = following + w.lane;
      uint32_t near = 0;
      for (int sharer = 0; sharer < s.sharers && tile < end; ++sharer) {
        near |= s.near_tiles[(int64_t{w.group} * s.sharers + sharer) * s.tiles + tile];
      }
      window = ptx::vote_ballot(near != 0);
      window_start = following;
      following += kWarp;
    }
    const uint32_t lowest = window & (0u - window);
    window ^= lowest;
    return window_start + ptx::highest_bit(lowest);
  }
};

// ---- what is done with distances ----

// Limits of queries that no code reaches, and that all do.
constexpr int32_t kNever = 2147483647, kAlways = -2147483647;

__device__ inline bool is_present(const Scan& s, int64_t index) {
  if (index >= s.count) return false;
  return s.allowed == nullptr || (s.allowed[index / 8] >> (7 - index % 8) & 1) != 0;
}

// Codes of thirty-two that are below and at the query's bound, each to the place that the span has come to.
template <class W>
__device__ inline void write_near(const Scan& s, const W& w, int query, int64_t index, int32_t distance, uint32_t below,
                                  uint32_t equal, uint32_t before_below, uint32_t before_equal) {
  const uint32_t self = 1u << w.lane;
  const int64_t q = int64_t{w.first_query} + query, *place = s.places + (q * s.spans + w.span) * 2;
  if (below & self) {
    const int64_t start = s.starts != nullptr ? s.starts[q] : q * s.list_pitch;
    const int64_t to = start + place[0] + before_below + ptx::count_bits(below & (self - 1));
    s.list_distances[to] = distance;
    s.list_indices[to] = index;
  } else if (equal & self) {
    const int64_t to = s.closer[q] + place[1] + before_equal + ptx::count_bits(equal & (self - 1));
    if (to < s.k) {
      s.out_distances[q * s.k + to] = distance;
      s.out_indices[q * s.k + to] = index;
    }
  }
}

// Does with the distances of one query to thirty-two codes, a lane a code, what the mode says. Whether one is near.
template <class W>
__device__ inline bool visit(const Scan& s, const W& w, int query, int64_t index, bool present, int32_t distance) {
  const int64_t q = int64_t{w.first_query} + query;
  if (s.mode == ScanMode::kDistances) {
    if (present) s.distances[q * s.count + index] = distance;
    return true;
  }
  const int32_t bound = s.bounds[q];
  if (s.mode == ScanMode::kHistogram) {
    const bool near = present && distance <= bound;
    if (near) ptx::add_global(s.histogram + q * s.bins + distance, uint64_t{1});
    return ptx::vote_ballot(near) != 0;
  }
  const uint32_t below = ptx::vote_ballot(present && distance < bound);
  const uint32_t equal = ptx::vote_ballot(present && s.ties && distance == bound);
  if ((below | equal) == 0) return false;
  uint32_t before_below = 0, before_equal = 0;
  if (w.lane == 0) {
    uint32_t* const counted = w.counted(s) + 2 * query;
    before_below = counted[0];
    before_equal = counted[1];
    counted[0] = before_below + ptx::count_bits(below);
    counted[1] = before_equal + ptx::count_bits(equal);
  }
  if (s.mode == ScanMode::kWrite) {
    write_near(s, w, query, index, distance, below, equal, ptx::shuffle(before_below, 0),
               ptx::shuffle(before_equal, 0));
  }
  return true;
}

}  // namespace
}  // namespace embedding_kernels::cuda

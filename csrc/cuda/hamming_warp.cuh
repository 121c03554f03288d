// For hamming_scan.cu only: a warp's share of a scan, how tiles of codes come to it, and what it does with distances.
#pragma once

#include "hamming_scan.cuh"
#include "ptx.cuh"

namespace embedding_kernels::cuda {
namespace {

template <class T>
__device__ inline T* shared_at(int32_t offset) {
  return reinterpret_cast<T*>(&shared_memory<uint8_t>() + offset);
}

struct Warp {
  int lane, part, sharer, queries;
  uint32_t group, span, first_query;

  __device__ explicit Warp(const Scan& s) {
    const int warp = threadIdx.x / kWarp;
    lane = threadIdx.x % kWarp;
    part = warp % kParts;
    sharer = warp / kParts;
    // groups vary fastest: blocks that run together read the same codes
    group = blockIdx.x % s.groups;
    span = blockIdx.x / s.groups * kParts + part;
    first_query = (group * s.sharers + sharer) * s.queries_a_warp;
    const int64_t left = s.query_count - int64_t{first_query};
    queries = static_cast<int>(left < 0 ? 0 : left < s.queries_a_warp ? left : s.queries_a_warp);
  }

  // [queries, 2]: codes so far below and at the bound of each; only lane 0 looks while codes are visited.
  __device__ uint32_t* counted(const Scan& s) const {
    return shared_at<uint32_t>(s.at_counts) + 2 * (sharer * kParts + part) * s.queries_a_warp;
  }
};

template <bool kShared>
__device__ inline void sync_sharers(const Scan& s, const Warp& w) {
  if (!kShared || s.sharers == 1) {
    ptx::sync_warp();
  } else {
    ptx::sync_threads(1 + w.part, kWarp * s.sharers);
  }
}

// Where a piece of 16 bytes of a row lies: eight neighbouring rows have the same piece in different banks.
__device__ inline uint32_t piece_place(int row, int piece, int row_bytes) {
  const int line = row * row_bytes >> 7, pieces = row_bytes / 16;
  return row * row_bytes + ((piece ^ (line & (pieces - 1))) << 4);
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

  // The next one, or kNoTile.
  __device__ uint32_t next(const Scan& s, const Warp& w) {
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

// What cannot be copied sixteen bytes at a time. Of no bytes, `from` may be anywhere.
__device__ inline void stage_piece(const Scan& s, const uint8_t* from, int bytes, uint32_t to) {
  if (s.access == 4) {
#pragma unroll
    for (int i = 0; i < 16; i += 4) {
      const int part = bytes <= i ? 0 : bytes - i < 4 ? bytes - i : 4;
      ptx::copy4_async(to + i, from + i, part);
    }
  } else {
    ptx::Words4 words = {};
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      if (i < bytes) words.word[i / 4] |= static_cast<uint32_t>(from[i]) << (i % 4 * 8);
    }
    ptx::store_shared_words4(to, words);
  }
}

// A chunk of the codes of a tile into shared memory, by all who share the tile; zeros past a code and past the codes.
__device__ inline void stage_tile(const Scan& s, const Warp& w, uint32_t tile, int chunk, uint32_t to) {
  const int pieces = s.row_bytes / 16, shift = ptx::highest_bit(pieces);
  const int64_t first = int64_t{tile} * kTileCodes, byte = static_cast<int64_t>(chunk) * s.row_bytes;
  const int width = static_cast<int>(s.width - byte < s.row_bytes ? s.width - byte : s.row_bytes);
  const uint8_t* const tile_start = s.codes + first * s.stride + byte;
  const int rows = static_cast<int>(s.count - first < kTileCodes ? s.count - first : kTileCodes);
  for (int item = w.sharer * kWarp + w.lane; item < kTileCodes * pieces; item += s.sharers * kWarp) {
    const int row = item >> shift, piece = item & (pieces - 1), left = row < rows ? width - piece * 16 : 0;
    const int bytes = left < 0 ? 0 : left < 16 ? left : 16;
    const uint32_t place = to + piece_place(row, piece, s.row_bytes);
    const uint8_t* const from = tile_start + row * s.stride + piece * 16;
    if (s.access == 16) {
      ptx::copy16_async(place, from, bytes);
    } else {
      stage_piece(s, from, bytes, place);
    }
  }
}

// ---- what is done with distances ----

__device__ inline bool is_present(const Scan& s, int64_t index) {
  if (index >= s.count) return false;
  return s.allowed == nullptr || (s.allowed[index / 8] >> (7 - index % 8) & 1) != 0;
}

// Codes of a tile that are below and at the query's bound, each to the place that the span has come to.
__device__ inline void write_near(const Scan& s, const Warp& w, int query, int64_t index, int32_t distance,
                                  uint32_t below, uint32_t equal, uint32_t before_below, uint32_t before_equal) {
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

// Does with the distances of one query to a tile, a lane a code, what the mode says. Whether one is near.
__device__ inline bool visit(const Scan& s, const Warp& w, int query, int64_t index, bool present, int32_t distance) {
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

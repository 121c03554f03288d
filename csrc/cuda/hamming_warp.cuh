// For hamming_scan.cu only: a warp's share of a scan, and how tiles of codes come to it.
#pragma once

#include "hamming_visit.cuh"

namespace embedding_kernels::cuda {
namespace {

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

}  // namespace
}  // namespace embedding_kernels::cuda

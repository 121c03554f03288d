// Inner loops of the Hamming family: one table a level of instruction set, filled by hamming_loops.cpp.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace embedding_kernels {

struct HammingLoops {
  // Bits x > 0 of one row of `dim` values, into ceil(dim / 8) bytes; indexed by Dtype.
  void (*pack_bits[kDtypes])(const void* x, int64_t dim, uint8_t* out);

  // Distances of one query to `count` codes that lie `stride` bytes apart.
  void (*distances)(const uint8_t* query, const uint8_t* codes, int64_t stride, int64_t count, int64_t bytes,
                    int32_t* out);

  // Many queries read the codes as tiles, laid out for this level: `tile_codes` codes side by side, compared with
  // `tile_queries` queries at once. A word (64 bits) of either takes `word_bytes`, a query `query_bytes` more.
  // Tiles pay from `tile_from` queries on, and `tile_bytes` of them are worth holding at once.
  int64_t tile_codes, tile_queries, word_bytes, query_bytes, tile_from, tile_bytes;

  // Up to tile_queries queries; what is missing, and bits past the width, are 0.
  void (*lay_queries)(const uint8_t* queries, int64_t stride, int64_t count, int64_t bytes, void* block);

  // `count` codes and zeros up to a multiple of tile_codes.
  void (*lay_codes)(const uint8_t* codes, int64_t stride, int64_t count, int64_t bytes, void* tiles);

  // Distances of the `queries` of a block to `codes` codes, a multiple of tile_codes: out[query * out_stride + code],
  // with room for tile_queries rows. Block and tiles are 64-byte aligned.
  void (*tile_distances)(const void* block, int64_t queries, const void* tiles, int64_t codes, int64_t words,
                         int32_t* out, int64_t out_stride);

  // Appends (distance, first + place) of every distance < bound, in order; returns how many. The outputs have room
  // for `count` entries.
  int64_t (*select)(const int32_t* distances, int64_t count, int32_t bound, int64_t first, int32_t* out_distances,
                    int64_t* out_indices);
};

extern const HammingLoops hamming_loops_portable;
extern const HammingLoops hamming_loops_avx2;
extern const HammingLoops hamming_loops_avx512;
extern const HammingLoops hamming_loops_amx;

const HammingLoops& hamming_loops();

}  // namespace embedding_kernels

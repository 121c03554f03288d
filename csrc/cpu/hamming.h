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

  // Many queries read the codes as tiles: `lanes` codes side by side, word by word, tile[word][lane]; words past the
  // width and lanes past `count` are 0. A whole number of `tile_codes` codes is written.
  int64_t tile_codes;
  void (*interleave)(const uint8_t* codes, int64_t stride, int64_t count, int64_t bytes, uint64_t* tiles);

  // Distances of two queries (ceil(bytes / 8) words each, zero past the width) to `codes` interleaved codes,
  // a multiple of tile_codes.
  void (*tile_distances)(const uint64_t* first, const uint64_t* second, const uint64_t* tiles, int64_t codes,
                         int64_t words, int32_t* first_out, int32_t* second_out);

  // Appends (distance, first + place) of every distance < bound, in order; returns how many. The outputs have room
  // for `count` entries.
  int64_t (*select)(const int32_t* distances, int64_t count, int32_t bound, int64_t first, int32_t* out_distances,
                    int64_t* out_indices);
};

extern const HammingLoops hamming_loops_portable;
extern const HammingLoops hamming_loops_avx2;
extern const HammingLoops hamming_loops_avx512;

const HammingLoops& hamming_loops();

}  // namespace embedding_kernels

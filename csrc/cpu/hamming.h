// Inner loops of the Hamming family: one table a level of instruction set, filled by hamming_loops.cpp.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace embedding_kernels {

// Distances of queries to codes, and which of them are near. Codes are taken in groups of 32.
constexpr int64_t kGroupCodes = 32;

struct Comparison {
  const uint8_t* queries;  // one query as it lies, or blocks of them
  int64_t query_count;
  const uint8_t* codes;  // `stride` bytes apart
  int64_t stride, count, bytes;
  int64_t following;      // codes after these, which will be compared next: worth fetching
  const int32_t* bounds;  // of each query
  uint8_t* scratch;
  int32_t* out;        // [query * out_stride + code]: room for whole blocks and groups
  int64_t out_stride;  // a multiple of 16
  uint32_t* near;      // [query * near_stride + group]: bit n is set where code n of the group is nearer than the bound
  int64_t near_stride;
  // blocks, scratch and out are 64-byte aligned
};

struct HammingLoops {
  // Bits x > 0 of one row of `dim` values, into ceil(dim / 8) bytes; indexed by Dtype.
  void (*pack_bits[kDtypes])(const void* x, int64_t dim, uint8_t* out);

  // One query: codes are read as they lie, and queries[0] alone is compared; neither blocks nor scratch are used.
  void (*distances)(const Comparison& comparison);

  // Many queries are laid out first, in blocks of `block_queries` that take block_bytes(words) each; a word is 64 bits.
  // What is missing from a block, and bits past the width, are 0.
  int64_t block_queries;
  int64_t (*block_bytes)(int64_t words);
  void (*lay_queries)(const uint8_t* queries, int64_t stride, int64_t count, int64_t bytes, void* block);

  // From so many queries on it pays to lay out codes too, as many_distances does.
  int64_t many_queries;
  int64_t (*scratch_bytes)(int64_t words);
  void (*many_distances)(const Comparison& comparison);
};

extern const HammingLoops hamming_loops_portable;
extern const HammingLoops hamming_loops_avx2;
extern const HammingLoops hamming_loops_avx512;
extern const HammingLoops hamming_loops_amx;

const HammingLoops& hamming_loops();

}  // namespace embedding_kernels

// Inner loops of rescoring, in the Hamming family: one table a level of instruction set, filled by rescore_loops.cpp.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace embedding_kernels {

// What a vector is kept as: the dtypes of Dtype, then these.
enum RowKind { kInt8Rows = kDtypes, kBitRows, kRowKinds };

struct RescoreLoops {
  // The query of `dim` values in float32, times `scale` where that is not null, in the order in which `dot` of that
  // kind reads it; out has room for dim rounded up to a multiple of 16, and is zero past dim.
  void (*lay_query[kDtypes])(const void* query, const float* scale, int64_t dim, bool bits, float* out);

  // Inner product of a laid out query and a row of `dim` values.
  float (*dot[kRowKinds])(const float* query, const void* row, int64_t dim);
};

extern const RescoreLoops rescore_loops_portable;
extern const RescoreLoops rescore_loops_avx2;
extern const RescoreLoops rescore_loops_avx512;

const RescoreLoops& rescore_loops();

}  // namespace embedding_kernels

// Inner loops of the pooling family: one table a level of instruction set, filled by pooling_loops.cpp.
// Rows lie `stride` elements apart; arrays of function pointers are indexed by the Dtype of the rows.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace embedding_kernels {

struct PoolingLoops {
  // out[c] = sum of weights[r] * rows[r, c] over `count` >= 1 rows in order; weights null means 1.
  void (*sum_rows[kDtypes])(const void* rows, int64_t stride, int64_t count, const float* weights, int64_t columns,
                            float* out);

  // out[c] = largest of rows[r, c], count >= 1; NaN wins.
  void (*max_rows[kDtypes])(const void* rows, int64_t stride, int64_t count, int64_t columns, float* out);

  // places[c] = first r with the largest rows[r, c]; the first NaN, if there is one.
  void (*argmax_rows[kDtypes])(const void* rows, int64_t stride, int64_t count, int64_t columns, int32_t* places);

  // out[c] = in[c] * scale, rounded once to the dtype. `in` may be `out` for float32.
  void (*store_scaled[kDtypes])(const float* in, float scale, int64_t columns, void* out);

  // out[c] = in[c] as float32.
  void (*load[kDtypes])(const void* in, int64_t columns, float* out);

  // Sum of row[c] * vector[c].
  float (*dot[kDtypes])(const void* row, const float* vector, int64_t columns);
};

extern const PoolingLoops pooling_loops_portable;
extern const PoolingLoops pooling_loops_avx2;
extern const PoolingLoops pooling_loops_avx512;

const PoolingLoops& pooling_loops();

}  // namespace embedding_kernels

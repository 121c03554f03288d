// Inner loops of the anchor scores family: one table a level of instruction set, filled by anchor_scores_loops.cpp.
// Arrays of function pointers are indexed by the Dtype of the rows.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace embedding_kernels {

// Some rows of one width; the stride is in bytes.
struct AnchorRows {
  const uint8_t* data;
  int64_t stride, count;

  AnchorRows part(int64_t first, int64_t rows) const { return {data + first * stride, stride, rows}; }
};

// Weight (i, j) of a matrix of floats, transposed or not.
struct AnchorWeights {
  const float* data;
  int64_t row_step, column_step;
};

struct AnchorScoresLoops {
  // out[i * out_stride + j] = a_i . b_j for floats a, their stride in floats. Each value depends on its two rows alone.
  void (*dots[kDtypes])(const float* a, int64_t a_stride, int64_t a_count, const AnchorRows& b, int64_t dim, float* out,
                        int64_t out_stride);

  // out_i += sum over j of weight (i, j) b_j, for `rows` rows of out, dense.
  void (*mix[kDtypes])(const AnchorWeights& weights, int64_t rows, const AnchorRows& b, int64_t dim, float* out);

  // In place. The values have room for whole vectors.
  void (*softmax)(float* values, int64_t count);

  // grad = p (grad - sum of grad p)
  void (*softmax_backward)(float* grad, const float* probabilities, int64_t count);

  void (*load[kDtypes])(const void* values, int64_t count, float* to);
  void (*store[kDtypes])(const float* values, int64_t count, void* to);
};

extern const AnchorScoresLoops anchor_scores_loops_portable;
extern const AnchorScoresLoops anchor_scores_loops_avx2;
extern const AnchorScoresLoops anchor_scores_loops_avx512;

const AnchorScoresLoops& anchor_scores_loops();

}  // namespace embedding_kernels

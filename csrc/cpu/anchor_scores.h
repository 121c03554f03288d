// Inner loops of the anchor scores family: two tables a level of instruction set, filled by anchor_scores_loops.cpp and
// anchor_scores_attention_loops.cpp. Arrays of function pointers are indexed by the Dtype of the rows.
#pragma once

#include <cstdint>

#include "attention.h"
#include "dtype.h"

namespace embedding_kernels {

// Sums over passages run in blocks, whose sums are then added: the roundings of one long sum would show.
constexpr int64_t kPassagesAtOnce = 128;

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

// What a thread works in. Pointers are to as many floats as stand beside them, times padded_dim.
struct alignas(64) AnchorScratch {
  float scores[kPassagesAtOnce * kQueryTile];
  float weights[kPassagesAtOnce / 2 * kQueryTile];      // pairs of bfloat16, a lane for each head
  float weight_rows[kQueryTile * kPassagesAtOnce / 2];  // the same, a row for each head
  float *head_rows, *head_columns, *out;                // kQueryTile
  float* views;                                         // kPassagesAtOnce: rows that no product can read in place
  float* pairs;                                         // kPassagesAtOnce / 2: two rows of bfloat16, value beside value
};

inline int64_t padded_dim(int64_t dim) { return (dim + 31) / 32 * 32; }

// Heads of one query and view, at most kQueryTile, and that view of the query's passages: keys and values at once.
struct AnchorTile {
  AnchorRows heads, views;
  int64_t dim;
  void* out;  // [heads, dim], dense
  AnchorScratch* scratch;
};

struct AnchorAttentionLoops {
  // Before and after a thread's work: the state of the processor's tile unit, where there is one.
  void (*enter)();
  void (*leave)();
  void (*attend[kDtypes])(const AnchorTile& tile);
};

extern const AnchorScoresLoops anchor_scores_loops_portable;
extern const AnchorScoresLoops anchor_scores_loops_avx2;
extern const AnchorScoresLoops anchor_scores_loops_avx512;

extern const AnchorAttentionLoops anchor_attention_loops_portable;
extern const AnchorAttentionLoops anchor_attention_loops_avx2;
extern const AnchorAttentionLoops anchor_attention_loops_avx512;
extern const AnchorAttentionLoops anchor_attention_loops_amx;

const AnchorScoresLoops& anchor_scores_loops();
const AnchorAttentionLoops& anchor_attention_loops();

}  // namespace embedding_kernels

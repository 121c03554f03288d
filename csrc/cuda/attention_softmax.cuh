// The softmax that the forward kernels form step by step over the keys, in the accumulators of their products. Row r
// of a lane is l / 4 + 8 r of its warp's.
#pragma once

#include "attention.cuh"

namespace embedding_kernels::cuda {

// What has been gathered for the queries.
template <int D, int kTiles>
struct Gathered {
  float mixed[kTiles][D / 8][4];
  float level[2 * kTiles];  // highest score so far, in base 2
  float sums[2 * kTiles];   // of this lane's columns
};

// Scores of pairs that there are not; `at` are the positions of the lane's rows.
template <int kTiles, int kColumns>
__device__ inline void hide(const int32_t (&at)[2 * kTiles], const Window& window, const Columns& columns,
                            float (&scores)[kTiles][kColumns][4]) {
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (!pairs(columns, n, i % 2, at[2 * m + i / 2], window)) scores[m][n][i] = -INFINITY;
      }
    }
  }
}

// Levels with the scores of one step, and whether one of them is higher than before.
template <int kTiles, int kColumns>
__device__ inline bool raise_levels(float factor, const float (&scores)[kTiles][kColumns][4],
                                    const float (&before)[2 * kTiles], float (&level)[2 * kTiles]) {
  bool higher = false;
#pragma unroll
  for (int r = 0; r < 2 * kTiles; ++r) {
    float most = -INFINITY;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      most = fmaxf(most, fmaxf(scores[r / 2][n][r % 2 * 2], scores[r / 2][n][r % 2 * 2 + 1]));
    }
    most = fmaxf(most, ptx::shuffle_xor(most, 1));
    most = fmaxf(most, ptx::shuffle_xor(most, 2));
    level[r] = fmaxf(before[r], most * factor);
    higher = higher || level[r] > before[r];
  }
  return higher;
}

// What one counts at a new level that was gathered at an old one.
__device__ inline float decay_of(float before, float level) {
  // a row that has seen nothing yet must not compute −inf − −inf
  return level == -INFINITY ? 1.0f : ptx::exp2_near(before - level);
}

// Scales what was mixed for row r.
template <int kTiles, int kValues>
__device__ inline void scale_row(int r, float decay, float (&mixed)[kTiles][kValues][4]) {
#pragma unroll
  for (int n = 0; n < kValues; ++n) {
    mixed[r / 2][n][r % 2 * 2] *= decay;
    mixed[r / 2][n][r % 2 * 2 + 1] *= decay;
  }
}

// Weights at these levels, in place of the scores.
template <int kTiles, int kColumns>
__device__ inline void form_weights(float factor, const float (&level)[2 * kTiles],
                                    float (&scores)[kTiles][kColumns][4], float (&sums)[2 * kTiles]) {
#pragma unroll
  for (int r = 0; r < 2 * kTiles; ++r) {
    const float zero = level[r] == -INFINITY ? 0.0f : -level[r];
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int i = r % 2 * 2; i < r % 2 * 2 + 2; ++i) {
        const float weight = ptx::exp2_near(ptx::fused_multiply_add(scores[r / 2][n][i], factor, zero));
        scores[r / 2][n][i] = weight;
        sums[r] += weight;
      }
    }
  }
}

// The lse of a row from its level and the sum of its weights.
__device__ inline float lse_of(float level, float sum) {
  return sum == 0 ? -INFINITY : ptx::fused_multiply_add(level, kLn2, logf(sum));
}

}  // namespace embedding_kernels::cuda

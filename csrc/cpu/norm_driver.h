// Splitting for the norm family. Knows no torch and no threads: `parallel_for(count, task)` is given, and runs task(0)
// ... task(count - 1), each once. Results do not depend on the threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "norm.h"

namespace embedding_kernels {

// Rows of one dtype; null data where there are none. With `places`, row r is that at places[r].
struct NormRows {
  const uint8_t* data;
  int64_t stride;  // bytes
  const int64_t* places = nullptr;

  const void* row(int64_t r) const {
    return data == nullptr ? nullptr : data + (places == nullptr ? r : places[r]) * stride;
  }
};

// Room for a row in whole vectors of any level.
inline int64_t norm_room(int64_t dim) { return (dim + 15) / 16 * 16; }

template <class ParallelFor>
void norm_forward(const NormLoops& loops, Dtype dtype, const NormKind& kind, int64_t rows, const NormRows& x,
                  const NormRows& residual, uint8_t* normed, uint8_t* summed, int64_t row_bytes,
                  const ParallelFor& parallel_for) {
  const int64_t block = std::max<int64_t>(1, (int64_t{1} << 15) / std::max<int64_t>(kind.dim, 1));
  parallel_for((rows + block - 1) / block, [&](int64_t task) {
    std::vector<float> scratch(norm_room(kind.dim));
    for (int64_t r = task * block; r < std::min(rows, (task + 1) * block); ++r) {
      loops.forward[dtype](kind, x.row(r), residual.row(r), normed + r * row_bytes,
                           summed == nullptr ? nullptr : summed + r * row_bytes, scratch.data());
    }
  });
}

// Gradients of weight and bias are sums over all rows: of blocks, whose number does not depend on the threads, and
// inside a block of runs of rows, so that the roundings of a long sum stay small.
constexpr int64_t kNormRun = 32, kNormBlocks = 128;

template <class ParallelFor>
void norm_backward(const NormLoops& loops, Dtype dtype, const NormKind& kind, int64_t rows, const NormRows& grad,
                   const NormRows& grad_summed, const NormRows& summed, uint8_t* grad_x, int64_t row_bytes,
                   float* grad_weight, float* grad_bias, const ParallelFor& parallel_for) {
  const int64_t dim = kind.dim;
  const int64_t block = std::max(kNormRun, (rows + kNormBlocks - 1) / kNormBlocks), blocks = (rows + block - 1) / block;
  std::vector<float> weight_sums(blocks * dim), bias_sums(grad_bias == nullptr ? 0 : blocks * dim);
  parallel_for(blocks, [&](int64_t task) {
    std::vector<float> scratch(2 * norm_room(dim)), run(2 * dim);
    for (int64_t first = task * block; first < std::min(rows, (task + 1) * block); first += kNormRun) {
      std::fill(run.begin(), run.end(), 0.0f);
      for (int64_t r = first; r < std::min({rows, (task + 1) * block, first + kNormRun}); ++r) {
        loops.backward[dtype](kind, grad.row(r), grad_summed.row(r), summed.row(r), grad_x + r * row_bytes, run.data(),
                              grad_bias == nullptr ? nullptr : run.data() + dim, scratch.data());
      }
      for (int64_t c = 0; c < dim; ++c) weight_sums[task * dim + c] += run[c];
      for (int64_t c = 0; grad_bias != nullptr && c < dim; ++c) bias_sums[task * dim + c] += run[dim + c];
    }
  });
  const auto add_blocks = [&](const std::vector<float>& sums, float* out) {
    for (int64_t c = 0; c < dim; ++c) {
      double total = 0;
      for (int64_t b = 0; b < blocks; ++b) total += sums[b * dim + c];
      out[c] = static_cast<float>(total);
    }
  };
  add_blocks(weight_sums, grad_weight);
  if (grad_bias != nullptr) add_blocks(bias_sums, grad_bias);
}

}  // namespace embedding_kernels

// What the mean of gated rows and its gradient share.
#pragma once

#include <cmath>

#include "segments.cuh"

namespace embedding_kernels::cuda {

// Rows of one turn of a block.
constexpr int kSpan = 256;
using PoolSpan = Span<kSpan>;
using PoolJoin = Join<kSpan>;

template <int N>
Tile pool_tile(int64_t columns, int64_t turns, int multiprocessors) {
  return few_at_once(tile_over<N>(columns, N == 1 ? 32 : 16), turns, multiprocessors);
}

struct PoolShared {
  float sums[kSegmentThreads * 8];
  double doubles[kSegmentThreads];
  int32_t sequences[kSpan];
};

// Sum over the block, for every thread. Every thread comes.
__device__ inline double sum_block(double mine, PoolShared& shared) {
  ptx::sync_block();
  shared.doubles[threadIdx.x] = mine;
  for (int half = kSegmentThreads / 2; half > 0; half /= 2) {
    ptx::sync_block();
    if (static_cast<int>(threadIdx.x) < half) shared.doubles[threadIdx.x] += shared.doubles[threadIdx.x + half];
  }
  ptx::sync_block();
  return shared.doubles[0];
}

struct Sequences : Segments {
  const float* weights;  // [total] or null

  __device__ float weight(int64_t row) const { return weights == nullptr ? 1.0f : weights[row]; }
};

// 1 / sum of the weights of rows [first, last), or 0 where the sum is 0. Every thread of the block comes.
__device__ inline float scale_of(const Sequences& sequences, int64_t first, int64_t last, PoolShared& shared) {
  double sum = static_cast<double>(last - first);
  if (sequences.weights != nullptr) {
    sum = 0;
    for (int64_t row = first + threadIdx.x; row < last; row += kSegmentThreads) sum += sequences.weights[row];
    sum = sum_block(sum, shared);
  }
  return sum == 0 ? 0.0f : static_cast<float>(1.0 / sum);
}

// ---- the gated linear unit ----

// Rows of values and gates, which add their biases: float32 ones, or of the type of the rows.
template <class T>
struct GatedRows {
  const T* rows;
  int64_t stride, columns;
  const void* bias;  // or null
  bool wide_bias;

  template <int N>
  __device__ void load_bias(int64_t column, float (&values)[N]) const {
    if (bias == nullptr) {
#pragma unroll
      for (int i = 0; i < N; ++i) values[i] = 0;
    } else if (wide_bias) {
      load_floats(static_cast<const float*>(bias) + column, values);
    } else {
      load<T, N>(static_cast<const T*>(bias) + column, values);
    }
  }
};

template <class T, int N>
struct RawGated {
  Raw<T, N> value, gate;
};

template <class T, int N>
__device__ inline RawGated<T, N> load_gated(const GatedRows<T>& rows, int64_t row, int64_t column) {
  const T* const from = rows.rows + row * rows.stride + column;
  return {load_raw<T, N>(from), load_raw<T, N>(from + rows.columns)};
}

// The normal distribution function of x, by a rational function whose error is 1e-8 up to 5.6.
__device__ inline float normal_distribution(float x) {
  const float square = x * x;
  float above = 2.214506052177114e-8f, below = 1.1801981566346467e-6f;
  above = ptx::fused_multiply_add(above, square, 6.356447788931147e-6f);
  below = ptx::fused_multiply_add(below, square, 7.510075216161341e-5f);
  above = ptx::fused_multiply_add(above, square, 1.7384822994137922e-4f);
  below = ptx::fused_multiply_add(below, square, 1.9129647968202112e-3f);
  above = ptx::fused_multiply_add(above, square, 4.7072442547005005e-3f);
  below = ptx::fused_multiply_add(below, square, 2.8939978602596363e-2f);
  above = ptx::fused_multiply_add(above, square, 3.437593832778361e-2f);
  below = ptx::fused_multiply_add(below, square, 2.528334124834521e-1f);
  above = ptx::fused_multiply_add(above, square, 3.989422215921081e-1f);
  below = ptx::fused_multiply_add(below, square, 1.0f);
  const float near = x * above * ptx::reciprocal_near(below);
  return 0.5f + (fabsf(x) > 5.6f ? copysignf(0.5f, x) : near);
}

// ---- arguments ----

// As kernels take them: rows and offsets dense.
struct GatedTensors {
  Tensor hidden;
  std::optional<Tensor> bias;
  Tensor offsets;
  std::optional<Tensor> weights;

  GatedTensors(const Tensor& hidden_, const std::optional<Tensor>& bias_, const Tensor& offsets_,
               const std::optional<Tensor>& weights_)
      : hidden(dense_rows(hidden_)), offsets(torch::stable::contiguous(offsets_)) {
    if (bias_) bias = torch::stable::contiguous(*bias_);
    if (weights_) weights = torch::stable::contiguous(*weights_);
  }

  Sequences sequences() const {
    return {{pointer<int32_t>(offsets), offsets.size(0) - 1, hidden.size(0)}, pointer_or_null<float>(weights)};
  }

  template <class T>
  GatedRows<T> rows() const {
    const bool wide_bias = bias && bias->scalar_type() == ScalarType::Float;
    const void* const added = wide_bias ? static_cast<const void*>(pointer<float>(*bias)) : pointer_or_null<T>(bias);
    return {pointer<T>(hidden), hidden.stride(0), hidden.size(1) / 2, added, wide_bias};
  }

  // Whether rows and biases may be read 16 bytes at a time.
  template <class T>
  bool are_wide() const {
    const GatedRows<T> gated = rows<T>();
    return reinterpret_cast<uintptr_t>(gated.bias) % 16 == 0 && rows_are_wide(gated.rows, gated.stride, gated.columns);
  }
};

}  // namespace embedding_kernels::cuda

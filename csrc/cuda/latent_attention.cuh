// What the mean of gated rows and its gradient share.
#pragma once

#include <algorithm>
#include <cmath>

#include "launch.cuh"
#include "raw.cuh"

namespace embedding_kernels::cuda {

constexpr int kPoolThreads = 256;
// Rows of one turn of a block. Sequences are cut into spans of that many rows from their beginning, so that a mean has
// the same bits in any batch.
constexpr int kSpan = 256;

// ---- a block of threads over rows and columns ----

// `across` threads, a power of two, stand side by side on the columns of a tile; the others take every `down`-th row.
// The width alone decides, so that nothing else changes the order of a sum.
struct Tile {
  int across, down;
  int width;        // columns
  int64_t count;    // tiles over all columns
  int64_t at_once;  // blocks of a turn: each takes every at_once-th tile
};

// Blocks enough to fill the device some times over; more would only find out again what a turn knows before its first
// tile.
template <int N>
Tile tile_over(int64_t columns, int64_t turns, int multiprocessors) {
  constexpr int most = N == 1 ? 32 : 16;
  int across = 1;
  while (across < most && across * N < columns) across *= 2;
  const int64_t count = (columns + across * N - 1) / (across * N);
  const int64_t blocks = int64_t{multiprocessors} * 32;
  return {across, kPoolThreads / across, across * N, count, std::clamp<int64_t>(blocks / turns, 1, count)};
}

inline dim3 grid_of(const Tile& tile, int64_t turns) { return dim3(static_cast<unsigned>(turns * tile.at_once)); }

struct PoolShared {
  float sums[kPoolThreads * 8];
  double doubles[kPoolThreads];
  int32_t sequences[kSpan];
};

// Of the N columns of each thread the sum over the threads below one another, for all of them. Every thread comes.
template <int N>
__device__ inline void sum_down(const Tile& tile, float (&mine)[N], PoolShared& shared) {
  // the block may still read what it summed before
  ptx::sync_block();
#pragma unroll
  for (int i = 0; i < N; ++i) shared.sums[threadIdx.x * N + i] = mine[i];
  for (int half = tile.down / 2; half > 0; half /= 2) {
    ptx::sync_block();
    for (int at = threadIdx.x; at < half * tile.width; at += kPoolThreads) {
      shared.sums[at] += shared.sums[at + half * tile.width];
    }
  }
  ptx::sync_block();
#pragma unroll
  for (int i = 0; i < N; ++i) mine[i] = shared.sums[threadIdx.x % tile.across * N + i];
}

// Sum over the block, for every thread. Every thread comes.
__device__ inline double sum_block(double mine, PoolShared& shared) {
  ptx::sync_block();
  shared.doubles[threadIdx.x] = mine;
  for (int half = kPoolThreads / 2; half > 0; half /= 2) {
    ptx::sync_block();
    if (static_cast<int>(threadIdx.x) < half) shared.doubles[threadIdx.x] += shared.doubles[threadIdx.x + half];
  }
  ptx::sync_block();
  return shared.doubles[0];
}

// ---- sequences; offsets are clamped, so that nothing is out of bounds whatever they hold ----

struct Sequences {
  const int32_t* offsets;  // [count + 1]
  int64_t count, total;
  const float* weights;  // [total] or null

  __device__ int64_t start(int64_t sequence) const {
    const int64_t offset = offsets[sequence];
    return offset < 0 ? 0 : offset > total ? total : offset;
  }
  __device__ int64_t end(int64_t sequence) const {
    const int64_t first = start(sequence), last = start(sequence + 1);
    return last < first ? first : last;
  }
  __device__ float weight(int64_t row) const { return weights == nullptr ? 1.0f : weights[row]; }
};

// 1 / sum of the weights of rows [first, last), or 0 where the sum is 0. Every thread of the block comes.
__device__ inline float scale_of(const Sequences& sequences, int64_t first, int64_t last, PoolShared& shared) {
  double sum = static_cast<double>(last - first);
  if (sequences.weights != nullptr) {
    sum = 0;
    for (int64_t row = first + threadIdx.x; row < last; row += kPoolThreads) sum += sequences.weights[row];
    sum = sum_block(sum, shared);
  }
  return sum == 0 ? 0.0f : static_cast<float>(1.0 / sum);
}

// The first i of [0, count) of which above(i) holds, or `count`, where above changes once at most. The lanes of a warp
// look at 32 places at a time; all of them come.
template <class Above>
__device__ inline int64_t first_above(int64_t count, const Above& above) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t step = (high - low + kWarp - 1) / kWarp;
    const int64_t place = low + threadIdx.x % kWarp * step;
    const int64_t below = ptx::count_bits(ptx::vote_ballot(place < high && !above(place)));
    const int64_t next = low + below * step;
    low = below == 0 ? low : next - step + 1;
    high = next < high ? next : high;
  }
  return low;
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
    return {pointer<int32_t>(offsets), offsets.size(0) - 1, hidden.size(0), pointer_or_null<float>(weights)};
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

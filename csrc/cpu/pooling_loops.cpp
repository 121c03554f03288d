// Compiled once for each level of instruction set. No torch, no STL, no threads (see hamming_loops.cpp).
#include "floats.h"
#include "pooling.h"

namespace embedding_kernels {
namespace {

// Vectors of columns that stay in registers while the rows go by: sums, or maxima and their places.
constexpr int64_t kSumStrip = kWidth == 16 ? 16 : 8, kMaxStrip = kSumStrip / 2;

// Runs strips of vectors, then half of one, single vectors and the rest of the columns through the same kernel.
template <int64_t strip, class Kernel>
inline void for_strips(int64_t columns, const Kernel& kernel) {
  int64_t c = 0;
  for (; c + strip * kWidth <= columns; c += strip * kWidth) kernel.template run<strip, false>(c, 0);
  if (constexpr int64_t half = strip / 2; c + half * kWidth <= columns) {
    kernel.template run<half, false>(c, 0);
    c += half * kWidth;
  }
  for (; c + kWidth <= columns; c += kWidth) kernel.template run<1, false>(c, 0);
  if (c < columns) kernel.template run<1, true>(c, columns - c);
}

// Rows lie far apart for the processor's own prefetcher, which follows lines, not strips. Narrow ones go by faster;
// those a page apart meet in the same places of the first cache, which hold twelve.
template <Dtype dtype>
inline int64_t prefetch_distance(int64_t stride) {
  const bool meet = stride * dtype_bytes(dtype) % 4096 == 0;
  return (dtype == kFloat32 || meet ? 8 : 16) * stride;
}

template <Dtype dtype, int64_t vectors>
inline void prefetch(const void* row, int64_t column) {
  constexpr int64_t bytes = vectors * kWidth * dtype_bytes(dtype);
#pragma GCC unroll 16
  for (int64_t line = 0; line < bytes; line += 64) {
    __builtin_prefetch(static_cast<const char*>(at<dtype>(row, column)) + line);
  }
}

template <Dtype dtype, bool weighted>
struct SumRows {
  const void* rows;
  int64_t stride, count;
  const float* weights;
  float* out;

  template <bool partial>
  inline Floats term(int64_t r, int64_t column, int64_t part) const {
    const Floats x = load_at<dtype, partial>(at<dtype>(rows, r * stride), column, part);
    return weighted ? broadcast(weights[r]) * x : x;
  }

  // Sums of a few rows, compensated (Kahan): the error does not grow with the length of a sequence.
  template <int64_t vectors, bool partial>
  inline void run(int64_t column, int64_t part) const {
    constexpr int64_t kFewRows = 16;
    const int64_t ahead = prefetch_distance<dtype>(stride);
    Floats sums[vectors] = {}, lost[vectors] = {};
    for (int64_t first = 0; first < count; first += kFewRows) {
      const int64_t last = count - first < kFewRows ? count : first + kFewRows;
      Floats few[vectors] = {};
      for (int64_t r = first; r < last; ++r) {
        prefetch<dtype, vectors>(at<dtype>(rows, r * stride + ahead), column);
#pragma GCC unroll 16
        for (int64_t v = 0; v < vectors; ++v) few[v] += term<partial>(r, column + v * kWidth, part);
      }
#pragma GCC unroll 16
      for (int64_t v = 0; v < vectors; ++v) {
        const Floats mended = few[v] - lost[v];
        const Floats sum = sums[v] + mended;
        // inf - inf: an infinite sum has lost nothing and stays infinite
        lost[v] = zero_if_nan((sum - sums[v]) - mended);
        sums[v] = sum;
      }
    }
    for (int64_t v = 0; v < vectors; ++v) store_at<kFloat32, partial>(sums[v], out, column + v * kWidth, part);
  }
};

template <Dtype dtype>
void sum_rows(const void* rows, int64_t stride, int64_t count, const float* weights, int64_t columns, float* out) {
  if (weights == nullptr) {
    for_strips<kSumStrip>(columns, SumRows<dtype, false>{rows, stride, count, weights, out});
  } else {
    for_strips<kSumStrip>(columns, SumRows<dtype, true>{rows, stride, count, weights, out});
  }
}

template <Dtype dtype>
struct MaxRows {
  const void* rows;
  int64_t stride, count;
  float* out;

  template <int64_t vectors, bool partial>
  inline void run(int64_t column, int64_t part) const {
    const int64_t ahead = prefetch_distance<dtype>(stride);
    Floats best[vectors];
    for (int64_t v = 0; v < vectors; ++v) best[v] = load_at<dtype, partial>(rows, column + v * kWidth, part);
    for (int64_t r = 1; r < count; ++r) {
      const void* row = at<dtype>(rows, r * stride);
      prefetch<dtype, vectors>(at<dtype>(rows, r * stride + ahead), column);
#pragma GCC unroll 8
      for (int64_t v = 0; v < vectors; ++v) {
        const Floats x = load_at<dtype, partial>(row, column + v * kWidth, part);
        best[v] = choose(stays_greatest(best[v], x), best[v], x);
      }
    }
    for (int64_t v = 0; v < vectors; ++v) store_at<kFloat32, partial>(best[v], out, column + v * kWidth, part);
  }
};

template <Dtype dtype>
void max_rows(const void* rows, int64_t stride, int64_t count, int64_t columns, float* out) {
  for_strips<kMaxStrip>(columns, MaxRows<dtype>{rows, stride, count, out});
}

template <Dtype dtype>
struct ArgmaxRows {
  const void* rows;
  int64_t stride, count;
  int32_t* places;

  template <int64_t vectors, bool partial>
  inline void run(int64_t column, int64_t part) const {
    const int64_t ahead = prefetch_distance<dtype>(stride);
    Floats best[vectors];
    Ints place[vectors];
    for (int64_t v = 0; v < vectors; ++v) {
      best[v] = load_at<dtype, partial>(rows, column + v * kWidth, part);
      place[v] = Ints{};
    }
    for (int64_t r = 1; r < count; ++r) {
      const void* row = at<dtype>(rows, r * stride);
      prefetch<dtype, vectors>(at<dtype>(rows, r * stride + ahead), column);
#pragma GCC unroll 8
      for (int64_t v = 0; v < vectors; ++v) {
        const Floats x = load_at<dtype, partial>(row, column + v * kWidth, part);
        const Mask keep = stays_greatest(best[v], x);
        best[v] = choose(keep, best[v], x);
        place[v] = choose(keep, place[v], Ints{} + static_cast<int32_t>(r));
      }
    }
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t columns = partial ? part : kWidth;
      __builtin_memcpy(places + column + v * kWidth, &place[v], 4 * columns);
    }
  }
};

template <Dtype dtype>
void argmax_rows(const void* rows, int64_t stride, int64_t count, int64_t columns, int32_t* places) {
  for_strips<kMaxStrip>(columns, ArgmaxRows<dtype>{rows, stride, count, places});
}

template <Dtype dtype>
void store_scaled(const float* in, float scale, int64_t columns, void* out) {
  const Floats factor = broadcast(scale);
  int64_t c = 0;
  for (; c + kWidth <= columns; c += kWidth)
    store_at<dtype, false>(load_at<kFloat32, false>(in, c, 0) * factor, out, c, 0);
  if (c < columns) store_at<dtype, true>(load_at<kFloat32, true>(in, c, columns - c) * factor, out, c, columns - c);
}

template <Dtype dtype>
void load(const void* in, int64_t columns, float* out) {
  int64_t c = 0;
  for (; c + kWidth <= columns; c += kWidth) store_at<kFloat32, false>(load_at<dtype, false>(in, c, 0), out, c, 0);
  if (c < columns) store_at<kFloat32, true>(load_at<dtype, true>(in, c, columns - c), out, c, columns - c);
}

template <Dtype dtype>
float dot(const void* row, const float* vector, int64_t columns) {
  Floats sum = {};
  int64_t c = 0;
  for (; c + kWidth <= columns; c += kWidth)
    sum += load_at<dtype, false>(row, c, 0) * load_at<kFloat32, false>(vector, c, 0);
  if (c < columns) sum += load_at<dtype, true>(row, c, columns - c) * load_at<kFloat32, true>(vector, c, columns - c);
  float total = 0;
  for (int64_t i = 0; i < kWidth; ++i) total += sum[i];
  return total;
}

}  // namespace

#define EK_ALL_DTYPES(loop) {loop<kFloat32>, loop<kBFloat16>, loop<kFloat16>}

extern const PoolingLoops EK_LEVEL_NAME(pooling_loops) = {
    EK_ALL_DTYPES(sum_rows),     EK_ALL_DTYPES(max_rows), EK_ALL_DTYPES(argmax_rows),
    EK_ALL_DTYPES(store_scaled), EK_ALL_DTYPES(load),     EK_ALL_DTYPES(dot),
};

}  // namespace embedding_kernels

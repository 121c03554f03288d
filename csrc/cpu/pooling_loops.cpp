// Compiled once for each level of instruction set. No torch, no STL, no threads (see hamming_loops.cpp).
#include "floats.h"
#include "pooling.h"

namespace embedding_kernels {
namespace {

// Vectors of columns whose sums stay in registers while the rows go by.
constexpr int64_t kStrip = kWidth == 16 ? 8 : 4;

// Runs `strip` (kStrip vectors), then single vectors, then the rest of the columns through the same kernel.
template <class Kernel>
inline void for_strips(int64_t columns, const Kernel& kernel) {
  int64_t c = 0;
  for (; c + kStrip * kWidth <= columns; c += kStrip * kWidth) kernel.template run<kStrip, false>(c, 0);
  for (; c + kWidth <= columns; c += kWidth) kernel.template run<1, false>(c, 0);
  if (c < columns) kernel.template run<1, true>(c, columns - c);
}

// Rows lie far apart for the processor's own prefetcher, which follows lines, not strips.
constexpr int64_t kPrefetchRows = 8;

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

  // Compensated (Kahan), four rows at a time: the error does not grow with the length of a sequence.
  template <int64_t vectors, bool partial>
  inline void run(int64_t column, int64_t part) const {
    Floats sums[vectors], lost[vectors];
    for (int64_t v = 0; v < vectors; ++v) sums[v] = lost[v] = Floats{};
    const auto add = [&](int64_t v, Floats value) {
      const Floats mended = value - lost[v];
      const Floats sum = sums[v] + mended;
      const Floats excess = (sum - sums[v]) - mended;
      // inf - inf: an infinite sum has lost nothing and stays infinite
      lost[v] = zero_if_nan(excess);
      sums[v] = sum;
    };
    int64_t r = 0;
    for (; r + 4 <= count; r += 4) {
      for (int64_t i = 0; i < 4; ++i) {
        prefetch<dtype, vectors>(at<dtype>(rows, (r + i + kPrefetchRows) * stride), column);
      }
#pragma GCC unroll 8
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t c = column + v * kWidth;
        add(v, (term<partial>(r, c, part) + term<partial>(r + 1, c, part)) +
                   (term<partial>(r + 2, c, part) + term<partial>(r + 3, c, part)));
      }
    }
    for (; r < count; ++r) {
#pragma GCC unroll 8
      for (int64_t v = 0; v < vectors; ++v) add(v, term<partial>(r, column + v * kWidth, part));
    }
    for (int64_t v = 0; v < vectors; ++v) store_at<kFloat32, partial>(sums[v], out, column + v * kWidth, part);
  }
};

template <Dtype dtype>
void sum_rows(const void* rows, int64_t stride, int64_t count, const float* weights, int64_t columns, float* out) {
  if (weights == nullptr) {
    for_strips(columns, SumRows<dtype, false>{rows, stride, count, weights, out});
  } else {
    for_strips(columns, SumRows<dtype, true>{rows, stride, count, weights, out});
  }
}

template <Dtype dtype>
struct MaxRows {
  const void* rows;
  int64_t stride, count;
  float* out;

  template <int64_t vectors, bool partial>
  inline void run(int64_t column, int64_t part) const {
    Floats best[vectors];
    for (int64_t v = 0; v < vectors; ++v) best[v] = load_at<dtype, partial>(rows, column + v * kWidth, part);
    for (int64_t r = 1; r < count; ++r) {
      const void* row = at<dtype>(rows, r * stride);
      prefetch<dtype, vectors>(at<dtype>(rows, (r + kPrefetchRows) * stride), column);
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
  for_strips(columns, MaxRows<dtype>{rows, stride, count, out});
}

template <Dtype dtype>
struct ArgmaxRows {
  const void* rows;
  int64_t stride, count;
  int32_t* places;

  template <int64_t vectors, bool partial>
  inline void run(int64_t column, int64_t part) const {
    Floats best[vectors];
    Ints place[vectors];
    for (int64_t v = 0; v < vectors; ++v) {
      best[v] = load_at<dtype, partial>(rows, column + v * kWidth, part);
      place[v] = Ints{};
    }
    for (int64_t r = 1; r < count; ++r) {
      const void* row = at<dtype>(rows, r * stride);
      prefetch<dtype, vectors>(at<dtype>(rows, (r + kPrefetchRows) * stride), column);
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
  for_strips(columns, ArgmaxRows<dtype>{rows, stride, count, places});
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

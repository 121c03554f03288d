// For *_loops.cpp only: softmax of one row. Everything has internal linkage.
#pragma once

#include "floats_math.h"

namespace embedding_kernels {
namespace {

inline Floats load_scratch(const float* from, int64_t column) { return Element<kFloat32>::load(from + column); }

// The columns [column, column + part) of a vector, and `other` in the rest.
template <bool partial>
inline Floats keep_part(Floats value, int64_t part, float other) {
  if constexpr (partial) {
    for (int64_t i = part; i < kWidth; ++i) value[i] = other;
  }
  return value;
}

// A sum in 64 parts at every level: the roundings of one long sum would show.
struct Parts {
  static constexpr int64_t kCount = 64 / kWidth;
  Floats sums[kCount] = {};

  inline void add(int64_t column, Floats term) { sums[column / kWidth % kCount] += term; }

  inline float total() {
    for (int64_t half = kCount / 2; half > 0; half /= 2) {
      for (int64_t i = 0; i < half; ++i) sums[i] += sums[i + half];
    }
    return sum_of(sums[0]);
  }
};

inline float largest_of(Floats x) {
  float largest = x[0];
  for (int64_t i = 1; i < kWidth; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
}

template <Dtype dtype>
void softmax_group(const void* scores, int64_t size, float* scratch, void* out) {
  Floats most = broadcast(-kInfinity);
  for_vectors(size, [&]<bool partial>(int64_t column, int64_t part) {
    const Floats value = load_at<dtype, partial>(scores, column, part);
    Element<kFloat32>::store(value, scratch + column);
    most = maximum(keep_part<partial>(value, part, -kInfinity), most);
  });
  const Floats largest = broadcast(largest_of(most));
  Parts sum;
  for_vectors(size, [&]<bool partial>(int64_t column, int64_t part) {
    // scaled after the difference: large scores would lose the places in which they differ
    const Floats power = keep_part<partial>(exp2<6>((load_scratch(scratch, column) - largest) * kLog2E), part, 0.0f);
    Element<kFloat32>::store(power, scratch + column);
    sum.add(column, power);
  });
  const Floats scale = broadcast(1.0f / sum.total());
  for_vectors(size, [&]<bool partial>(int64_t column, int64_t part) {
    store_at<dtype, partial>(load_scratch(scratch, column) * scale, out, column, part);
  });
}

// p (grad - sum of grad p); out may be grad.
template <Dtype dtype>
void softmax_group_backward(const void* grad, const void* probabilities, int64_t size, void* out) {
  Parts sum;
  for_vectors(size, [&]<bool partial>(int64_t column, int64_t part) {
    sum.add(column, load_at<dtype, partial>(grad, column, part) * load_at<dtype, partial>(probabilities, column, part));
  });
  const Floats mean = broadcast(sum.total());
  for_vectors(size, [&]<bool partial>(int64_t column, int64_t part) {
    const Floats from = load_at<dtype, partial>(grad, column, part) - mean;
    store_at<dtype, partial>(load_at<dtype, partial>(probabilities, column, part) * from, out, column, part);
  });
}

}  // namespace
}  // namespace embedding_kernels

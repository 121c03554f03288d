// Compiled once for each level of instruction set; see hamming_loops.cpp.
#include "floats_math.h"
#include "norm.h"

namespace embedding_kernels {
namespace {

constexpr int64_t kSums = 4;

// Sum of term.template operator()<partial>(column, part), zero past the row, over the vectors of a row.
template <class Term>
inline float sum_vectors(int64_t dim, const Term& term) {
  Floats sums[kSums] = {};
  int64_t column = 0;
  for (; column + kSums * kWidth <= dim; column += kSums * kWidth) {
    for (int64_t s = 0; s < kSums; ++s) sums[s] += term.template operator()<false>(column + s * kWidth, int64_t{0});
  }
  for (; column + kWidth <= dim; column += kWidth) sums[0] += term.template operator()<false>(column, int64_t{0});
  if (column < dim) sums[1] += term.template operator()<true>(column, dim - column);
  return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

inline Floats load_scratch(const float* from, int64_t column) { return Element<kFloat32>::load(from + column); }

struct Moments {
  float mean, scale;
};

// Of a row in scratch, which has zeros past its end up to a whole vector; `sum` is that of its values, or of their
// squares where it is not centred.
inline Moments moments(const NormKind& kind, const float* row, float sum) {
  const float count = static_cast<float>(kind.dim);
  if (!kind.centred) return {0.0f, 1.0f / __builtin_sqrtf(sum / count + kind.eps)};
  const Floats middle = broadcast(sum / count);
  const float squares = sum_vectors(kind.dim, [&]<bool partial>(int64_t column, int64_t part) {
    Floats x = load_scratch(row, column) - middle;
    if constexpr (partial) {
      for (int64_t i = part; i < kWidth; ++i) x[i] = 0;
    }
    return x * x;
  });
  return {sum / count, 1.0f / __builtin_sqrtf(squares / count + kind.eps)};
}

// A vector as it is once it has been stored.
template <Dtype dtype, bool partial>
inline Floats store_rounded(Floats value, void* row, int64_t column, int64_t part) {
  typename Element<dtype>::Stored stored[kWidth];
  Element<dtype>::store(value, stored);
  __builtin_memcpy(at<dtype>(row, column), stored, sizeof(stored[0]) * (partial ? part : kWidth));
  return Element<dtype>::load(stored);
}

// The row as float32 in scratch, rounded to its dtype where something was added; the sum that `moments` wants.
template <Dtype dtype, bool centred, bool adds>
inline float take_row(const void* x, const void* residual, int64_t dim, void* summed, float* scratch) {
  return sum_vectors(dim, [&]<bool partial>(int64_t column, int64_t part) {
    Floats value = load_at<dtype, partial>(x, column, part);
    if constexpr (adds) {
      value += load_at<dtype, partial>(residual, column, part);
      value = store_rounded<dtype, partial>(value, summed, column, part);
    }
    Element<kFloat32>::store(value, scratch + column);
    return centred ? value : value * value;
  });
}

template <Dtype dtype>
inline Moments take_moments(const NormKind& kind, const void* x, const void* residual, void* summed, float* scratch) {
  const bool adds = residual != nullptr;
  const auto take = kind.centred ? (adds ? take_row<dtype, true, true> : take_row<dtype, true, false>)
                                 : (adds ? take_row<dtype, false, true> : take_row<dtype, false, false>);
  return moments(kind, scratch, take(x, residual, kind.dim, summed, scratch));
}

template <Dtype dtype>
void forward(const NormKind& kind, const void* x, const void* residual, void* normed, void* summed, float* scratch) {
  const Moments of_row = take_moments<dtype>(kind, x, residual, summed, scratch);
  const Floats mean = broadcast(of_row.mean), scale = broadcast(of_row.scale);
  for_vectors(kind.dim, [&]<bool partial>(int64_t column, int64_t part) {
    const Floats weight = load_at<kFloat32, partial>(kind.weight, column, part);
    Floats value = (load_scratch(scratch, column) - mean) * scale * weight;
    if (kind.bias != nullptr) value += load_at<kFloat32, partial>(kind.bias, column, part);
    store_at<dtype, partial>(value, normed, column, part);
  });
}

inline void add_whole(float* sums, Floats value) {
  Element<kFloat32>::store(Element<kFloat32>::load(sums) + value, sums);
}
inline void add_to(float* sums, int64_t column, int64_t part, Floats value) {
  for (int64_t i = 0; i < part; ++i) sums[column + i] += value[i];
}

// With n the row less its mean, times its scale, and h = weight * grad:
// grad_x = scale (h - mean(h) - n mean(h n)), the first mean for layer norm alone.
template <Dtype dtype>
void backward(const NormKind& kind, const void* grad, const void* grad_summed, const void* summed, void* grad_x,
              float* grad_weight, float* grad_bias, float* scratch) {
  const int64_t room = (kind.dim + kWidth - 1) / kWidth * kWidth;
  float* const normal = scratch;
  float* const weighted = scratch + room;
  const Moments of_row = take_moments<dtype>(kind, summed, nullptr, nullptr, normal);
  const Floats mean = broadcast(of_row.mean), scale = broadcast(of_row.scale);
  for_vectors(kind.dim, [&]<bool partial>(int64_t column, int64_t part) {
    const Floats n = (load_scratch(normal, column) - mean) * scale;
    const Floats g = load_at<dtype, partial>(grad, column, part);
    Element<kFloat32>::store(n, normal + column);
    Element<kFloat32>::store(g * load_at<kFloat32, partial>(kind.weight, column, part), weighted + column);
    if constexpr (partial) {
      if (grad_weight != nullptr) add_to(grad_weight, column, part, g * n);
      if (grad_bias != nullptr) add_to(grad_bias, column, part, g);
    } else {
      if (grad_weight != nullptr) add_whole(grad_weight + column, g * n);
      if (grad_bias != nullptr) add_whole(grad_bias + column, g);
    }
  });
  const float count = static_cast<float>(kind.dim);
  const auto values = [&]<bool partial>(int64_t column, int64_t) { return load_scratch(weighted, column); };
  const auto products = [&]<bool partial>(int64_t column, int64_t) {
    return load_scratch(weighted, column) * load_scratch(normal, column);
  };
  const Floats shift = broadcast(kind.centred ? sum_vectors(kind.dim, values) / count : 0.0f);
  const Floats slope = broadcast(sum_vectors(kind.dim, products) / count);
  for_vectors(kind.dim, [&]<bool partial>(int64_t column, int64_t part) {
    Floats value = (load_scratch(weighted, column) - shift - load_scratch(normal, column) * slope) * scale;
    if (grad_summed != nullptr) value += load_at<dtype, partial>(grad_summed, column, part);
    store_at<dtype, partial>(value, grad_x, column, part);
  });
}

template <Dtype dtype>
void load(const void* in, float more, int64_t dim, float* out) {
  for_vectors(dim, [&]<bool partial>(int64_t column, int64_t part) {
    store_at<kFloat32, partial>(load_at<dtype, partial>(in, column, part) + broadcast(more), out, column, part);
  });
}

}  // namespace

extern const NormLoops EK_LEVEL_NAME(norm_loops) = {
    {forward<kFloat32>, forward<kBFloat16>, forward<kFloat16>},
    {backward<kFloat32>, backward<kBFloat16>, backward<kFloat16>},
    {load<kFloat32>, load<kBFloat16>, load<kFloat16>},
};

}  // namespace embedding_kernels

// What the kernels of the anchor scores family share: views of passages, and what meets them.
#pragma once

#include <cmath>

#include "../anchor_scores_checks.h"
#include "segments.cuh"

namespace embedding_kernels::cuda {

// ---- rows of any width, 16 bytes at a time ----

template <class T>
using Part = Raw<T, kWide<T>>;

// The columns of a row from `column` on, kWide<T> of them and zeros past its end; one by one where rows do not begin at
// multiples of 16 bytes. A thread has the same columns either way, so no result depends on how rows lie.
template <bool kAligned, class T>
__device__ inline Part<T> load_part(const T* row, int column, int dim) {
  if constexpr (kAligned) {
    return load_raw<T, kWide<T>>(row + column);
  } else {
    Part<T> part = {};
#pragma unroll
    for (int i = 0; i < kWide<T>; ++i) {
      if (column + i >= dim) continue;
      if constexpr (sizeof(T) == 4) {
        part.words.word[i] = ptx::bits_of(row[column + i]);
      } else {
        part.words.word[i / 2] |= static_cast<uint32_t>(row[column + i].bits) << (16 * (i % 2));
      }
    }
    return part;
  }
}
template <bool kAligned, class T>
__device__ inline void store_part(T* row, int column, int dim, const float (&values)[kWide<T>]) {
  if constexpr (kAligned) {
    store<T, kWide<T>>(row + column, values);
  } else {
#pragma unroll
    for (int i = 0; i < kWide<T>; ++i) {
      if (column + i < dim) row[column + i] = round_to<T>(values[i]);
    }
  }
}

// Calls `body` with whether rows are aligned as a constant.
template <class Body>
void with_alignment(bool aligned, const Body& body) {
  if (aligned) {
    body(std::true_type());
  } else {
    body(std::false_type());
  }
}

// Rows of a tensor whose last dimension is dense.
template <class T>
struct StridedRows {
  const T* data;
  int64_t strides[3];

  __device__ const T* row(int64_t first, int64_t second, int64_t third = 0) const {
    return data + first * strides[0] + second * strides[1] + third * strides[2];
  }
};

template <class T>
StridedRows<T> strided(const Tensor& tensor) {
  StridedRows<T> rows = {pointer<T>(tensor), {}};
  for (int64_t d = 0; d + 1 < tensor.dim(); ++d) rows.strides[d] = tensor.stride(d);
  return rows;
}

template <class T>
bool is_aligned(const Tensor& tensor) {
  bool aligned = rows_are_wide(pointer<T>(tensor), 0, tensor.size(tensor.dim() - 1));
  for (int64_t d = 0; d + 1 < tensor.dim(); ++d) aligned = aligned && tensor.stride(d) % kWide<T> == 0;
  return aligned;
}

// ---- arguments ----

template <class T>
struct Anchoring {
  StridedRows<T> views;    // [passages, views]
  StridedRows<T> queries;  // [queries, views, heads], or anchors: one head
  Segments segments;       // the passages of each query
  int view_count, heads, dim;
};

// As kernels take them: rows and offsets dense.
struct AnchorTensors {
  Tensor views, queries, offsets;

  AnchorTensors(const char* op, const Tensor& views_, const Tensor& queries_, const Tensor& offsets_)
      : views(dense_rows(views_)), queries(dense_rows(queries_)), offsets(torch::stable::contiguous(offsets_)) {
    check_offsets_if_asked(op, "cu_passages", offsets, views.size(0));
  }

  Segments segments() const { return {pointer<int32_t>(offsets), queries.size(0), views.size(0)}; }

  template <class T>
  Anchoring<T> anchoring() const {
    return {strided<T>(views),
            strided<T>(queries),
            segments(),
            static_cast<int>(views.size(1)),
            static_cast<int>(queries.dim() == 4 ? queries.size(2) : 1),
            static_cast<int>(views.size(2))};
  }

  template <class T>
  bool are_aligned() const {
    return is_aligned<T>(views) && is_aligned<T>(queries);
  }
};

inline Tensor empty_as(const Tensor& tensor) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < tensor.dim(); ++d) sizes.push_back(tensor.size(d));
  return torch::stable::empty(sizes, tensor.scalar_type(), std::nullopt, tensor.device());
}

// ---- weighted sums of views (anchor_mix.cu) ----

// Weight of passage i, view v and head h: data[i, v, h] times share.
struct GivenWeights {
  const float* data;
  int64_t passage_stride, view_stride;
  float share;
};

// out [Q, views, heads, D], dense: of the views of each query's passages the sums over them, weighted as given, or,
// where nothing is, by the softmax of their products with the queries.
void launch_mix(const char* op, const AnchorTensors& tensors, const GivenWeights* given, Tensor& out);

// ---- inner products of rows and heads ----

constexpr int kHeadsAtOnce = 8, kRowsAtOnce = 4;

// Sums over a warp of 32 values a lane: lane l gets the l-th. In each step a lane keeps half of its values and gives
// away the others.
template <int kHalf>
__device__ inline float sum_transposed(float (&values)[kWarp]) {
  const bool upper = (threadIdx.x & kHalf) != 0;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float kept = upper ? values[i + kHalf] : values[i], given = upper ? values[i] : values[i + kHalf];
    values[i] = kept + ptx::shuffle_xor(given, static_cast<uint32_t>(kHalf));
  }
  if constexpr (kHalf > 1) {
    return sum_transposed<kHalf / 2>(values);
  } else {
    return values[0];
  }
}

// A warp reads up to kRowsAtOnce rows once for up to kHeadsAtOnce heads. Lane l gets the product of row l / 8 and head
// l % 8; past the counts it is meaningless.
template <bool kAligned, class T>
__device__ inline float products(const T* rows, int64_t row_stride, int row_count, const T* heads, int64_t head_stride,
                                 int head_count, int dim) {
  constexpr int N = kWide<T>;
  float sums[kWarp] = {};
  for (int column = threadIdx.x % kWarp * N; column < dim; column += kWarp * N) {
    Part<T> parts[kRowsAtOnce];
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      parts[r] = load_part<kAligned>(rows + (r < row_count ? r : 0) * row_stride, column, dim);
    }
    float row[kRowsAtOnce][N], head[N];
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) widen(parts[r], row[r]);
#pragma unroll
    for (int h = 0; h < kHeadsAtOnce; ++h) {
      if (h >= head_count) break;
      widen(load_part<kAligned>(heads + h * head_stride, column, dim), head);
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          float& sum = sums[r * kHeadsAtOnce + h];
          sum = ptx::fused_multiply_add(row[r][i], head[i], sum);
        }
      }
    }
  }
  return sum_transposed<kWarp / 2>(sums);
}

}  // namespace embedding_kernels::cuda

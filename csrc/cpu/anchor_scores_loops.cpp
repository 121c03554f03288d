// Compiled once for each level of instruction set; see hamming_loops.cpp.
#include "anchor_scores.h"
#include "softmax.h"

namespace embedding_kernels {
namespace {

// As many sums as the registers hold beside their operands.
constexpr int64_t kTileRows = 4, kTileColumns = kWidth == 16 ? 4 : 2;

// ---- inner products of rows ----

template <Dtype dtype, int64_t rows, int64_t columns>
inline void dots_tile(const AnchorRows& a, const AnchorRows& b, int64_t dim, float* out, int64_t out_stride) {
  Floats sums[rows][columns] = {};
  for_vectors(dim, [&]<bool partial>(int64_t place, int64_t part) {
    Floats left[rows];
    for (int64_t i = 0; i < rows; ++i) left[i] = load_at<dtype, partial>(a.data + i * a.stride, place, part);
    for (int64_t j = 0; j < columns; ++j) {
      const Floats right = load_at<dtype, partial>(b.data + j * b.stride, place, part);
      for (int64_t i = 0; i < rows; ++i) sums[i][j] = multiply_add(left[i], right, sums[i][j]);
    }
  });
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) out[i * out_stride + j] = sum_of(sums[i][j]);
  }
}

template <Dtype dtype, int64_t rows>
inline void dots_rows(const AnchorRows& a, const AnchorRows& b, int64_t dim, float* out, int64_t out_stride) {
  int64_t j = 0;
  for (; j + kTileColumns <= b.count; j += kTileColumns) {
    dots_tile<dtype, rows, kTileColumns>(a, b.part(j, kTileColumns), dim, out + j, out_stride);
  }
  for (; j < b.count; ++j) dots_tile<dtype, rows, 1>(a, b.part(j, 1), dim, out + j, out_stride);
}

template <Dtype dtype>
void dots(const AnchorRows& a, const AnchorRows& b, int64_t dim, float* out, int64_t out_stride) {
  int64_t i = 0;
  for (; i + kTileRows <= a.count; i += kTileRows) {
    dots_rows<dtype, kTileRows>(a.part(i, kTileRows), b, dim, out + i * out_stride, out_stride);
  }
  for (; i < a.count; ++i) dots_rows<dtype, 1>(a.part(i, 1), b, dim, out + i * out_stride, out_stride);
}

// ---- weighted sums of rows ----

// `rows` rows of out, `columns` vectors from `place` on; the last may be part of one.
template <Dtype dtype, int64_t rows, int64_t columns, bool partial>
inline void mix_tile(const AnchorWeights& weights, const AnchorRows& b, int64_t dim, int64_t place, int64_t part,
                     float* out) {
  Floats sums[rows][columns] = {};
  for (int64_t j = 0; j < b.count; ++j) {
    const uint8_t* const row = b.data + j * b.stride;
    Floats right[columns];
    for (int64_t c = 0; c < columns; ++c) right[c] = load_at<dtype, partial>(row, place + c * kWidth, part);
    for (int64_t i = 0; i < rows; ++i) {
      const Floats weight = broadcast(weights.data[i * weights.row_step + j * weights.column_step]);
      for (int64_t c = 0; c < columns; ++c) sums[i][c] = multiply_add(weight, right[c], sums[i][c]);
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = 0; c < columns; ++c) {
      float* const to = out + i * dim + place + c * kWidth;
      store_at<kFloat32, partial>(load_at<kFloat32, partial>(to, 0, part) + sums[i][c], to, 0, part);
    }
  }
}

template <Dtype dtype, int64_t rows>
inline void mix_rows(const AnchorWeights& weights, const AnchorRows& b, int64_t dim, float* out) {
  int64_t place = 0;
  for (; place + kTileColumns * kWidth <= dim; place += kTileColumns * kWidth) {
    mix_tile<dtype, rows, kTileColumns, false>(weights, b, dim, place, 0, out);
  }
  for (; place + kWidth <= dim; place += kWidth) mix_tile<dtype, rows, 1, false>(weights, b, dim, place, 0, out);
  if (place < dim) mix_tile<dtype, rows, 1, true>(weights, b, dim, place, dim - place, out);
}

template <Dtype dtype>
void mix(const AnchorWeights& weights, int64_t rows, const AnchorRows& b, int64_t dim, float* out) {
  const auto from = [&](int64_t row) {
    return AnchorWeights{weights.data + row * weights.row_step, weights.row_step, weights.column_step};
  };
  int64_t i = 0;
  for (; i + kTileRows <= rows; i += kTileRows) mix_rows<dtype, kTileRows>(from(i), b, dim, out + i * dim);
  for (; i < rows; ++i) mix_rows<dtype, 1>(from(i), b, dim, out + i * dim);
}

// ---- rows of floats ----

void softmax(float* values, int64_t count) { softmax_group<kFloat32>(values, count, values, values); }

void softmax_backward(float* grad, const float* probabilities, int64_t count) {
  softmax_group_backward<kFloat32>(grad, probabilities, count, grad);
}

template <Dtype dtype>
void store(const float* values, int64_t count, void* to) {
  for_vectors(count, [&]<bool partial>(int64_t column, int64_t part) {
    store_at<dtype, partial>(load_at<kFloat32, partial>(values, column, part), to, column, part);
  });
}

}  // namespace

extern const AnchorScoresLoops EK_LEVEL_NAME(anchor_scores_loops) = {
    {dots<kFloat32>, dots<kBFloat16>, dots<kFloat16>},
    {mix<kFloat32>, mix<kBFloat16>, mix<kFloat16>},
    softmax,
    softmax_backward,
    {store<kFloat32>, store<kBFloat16>, store<kFloat16>},
};

}  // namespace embedding_kernels

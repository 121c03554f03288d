// Compiled once for each level of instruction set; see hamming_loops.cpp.
#include "anchor_scores.h"
#include "softmax.h"

namespace embedding_kernels {
namespace {

// ---- inner products of rows ----

// Eight rows of a meet two of b, four meet four: as many sums as the registers hold beside their operands, and each
// row of b is read once for all heads of the usual models.
constexpr int64_t columns_of(int64_t rows) { return rows == 8 || kWidth < 16 ? 2 : 4; }

template <Dtype dtype, int64_t rows, int64_t columns>
inline void dots_tile(const float* a, int64_t a_stride, const AnchorRows& b, int64_t dim, float* out,
                      int64_t out_stride) {
  Floats sums[rows][columns] = {};
  for_vectors(dim, [&]<bool partial>(int64_t place, int64_t part) {
    Floats right[columns];
    for (int64_t j = 0; j < columns; ++j) right[j] = load_at<dtype, partial>(b.data + j * b.stride, place, part);
    for (int64_t i = 0; i < rows; ++i) {
      const Floats left = load_at<kFloat32, partial>(a + i * a_stride, place, part);
      for (int64_t j = 0; j < columns; ++j) sums[i][j] = multiply_add(left, right[j], sums[i][j]);
    }
  });
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) out[i * out_stride + j] = sum_of(sums[i][j]);
  }
}

template <Dtype dtype, int64_t rows>
inline void dots_rows(const float* a, int64_t a_stride, const AnchorRows& b, int64_t dim, float* out,
                      int64_t out_stride) {
  constexpr int64_t columns = columns_of(rows);
  int64_t j = 0;
  for (; j + columns <= b.count; j += columns) {
    dots_tile<dtype, rows, columns>(a, a_stride, b.part(j, columns), dim, out + j, out_stride);
  }
  for (; j < b.count; ++j) dots_tile<dtype, rows, 1>(a, a_stride, b.part(j, 1), dim, out + j, out_stride);
}

// run.template operator()<rows>(first) for tiles of 8, 4 and single rows.
template <class Run>
inline void for_row_tiles(int64_t count, const Run& run) {
  int64_t i = 0;
  if constexpr (kWidth == 16) {
    for (; i + 8 <= count; i += 8) run.template operator()<8>(i);
  }
  for (; i + 4 <= count; i += 4) run.template operator()<4>(i);
  for (; i < count; ++i) run.template operator()<1>(i);
}

template <Dtype dtype>
void dots(const float* a, int64_t a_stride, int64_t a_count, const AnchorRows& b, int64_t dim, float* out,
          int64_t out_stride) {
  for_row_tiles(a_count, [&]<int64_t rows>(int64_t i) {
    dots_rows<dtype, rows>(a + i * a_stride, a_stride, b, dim, out + i * out_stride, out_stride);
  });
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
  constexpr int64_t columns = columns_of(rows);
  int64_t place = 0;
  for (; place + columns * kWidth <= dim; place += columns * kWidth) {
    mix_tile<dtype, rows, columns, false>(weights, b, dim, place, 0, out);
  }
  for (; place + kWidth <= dim; place += kWidth) mix_tile<dtype, rows, 1, false>(weights, b, dim, place, 0, out);
  if (place < dim) mix_tile<dtype, rows, 1, true>(weights, b, dim, place, dim - place, out);
}

template <Dtype dtype>
void mix(const AnchorWeights& weights, int64_t rows, const AnchorRows& b, int64_t dim, float* out) {
  for_row_tiles(rows, [&]<int64_t tile>(int64_t i) {
    const AnchorWeights own = {weights.data + i * weights.row_step, weights.row_step, weights.column_step};
    mix_rows<dtype, tile>(own, b, dim, out + i * dim);
  });
}

// ---- rows of floats ----

void softmax(float* values, int64_t count) { softmax_group<kFloat32>(values, count, values, values); }

void softmax_backward(float* grad, const float* probabilities, int64_t count) {
  softmax_group_backward<kFloat32>(grad, probabilities, count, grad);
}

template <Dtype dtype>
void load(const void* values, int64_t count, float* to) {
  for_vectors(count, [&]<bool partial>(int64_t column, int64_t part) {
    store_at<kFloat32, partial>(load_at<dtype, partial>(values, column, part), to, column, part);
  });
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
    {load<kFloat32>, load<kBFloat16>, load<kFloat16>},
    {store<kFloat32>, store<kBFloat16>, store<kFloat16>},
};

}  // namespace embedding_kernels

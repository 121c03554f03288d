// For *_loops.cpp of attention only: rows of a head into the layouts that the products read.
#pragma once

#include "attention.h"
#include "floats_math.h"
#include "matmul.h"

namespace embedding_kernels {
namespace {

template <Dtype dtype>
inline const void* row_of(const HeadRows& rows, int64_t index) {
  return at<dtype>(rows.data, index * rows.stride);
}

// Rows of a head lie far apart, where the processor's own prefetcher does not follow.
constexpr int64_t kPrefetchRows = 8;

template <Dtype dtype>
inline void prefetch_row(const HeadRows& rows, int64_t index) {
  const char* const row = static_cast<const char*>(row_of<dtype>(rows, index));
  for (int64_t byte = 0; byte < rows.dim * dtype_bytes(dtype); byte += 64) __builtin_prefetch(row + byte);
}

template <Dtype dtype>
inline void widen_row(const void* row, int64_t dim, float* out) {
  for_vectors(dim, [&]<bool partial>(int64_t c, int64_t part) {
    store_at<kFloat32, partial>(load_at<dtype, partial>(row, c, part), out, c, part);
  });
}

// Rotates the pairs (i, i + half) of a row by the angles of a position; backwards with direction -1.
inline void rotate(float* row, const Rotation& rotation, int32_t position, float direction) {
  const float *cos = rotation.cos + position * rotation.half, *sin = rotation.sin + position * rotation.half;
  for_vectors(rotation.half, [&]<bool partial>(int64_t c, int64_t part) {
    const Floats x = load_at<kFloat32, partial>(row, c, part);
    const Floats y = load_at<kFloat32, partial>(row, c + rotation.half, part);
    const Floats cosine = load_at<kFloat32, partial>(cos, c, part);
    const Floats sine = load_at<kFloat32, partial>(sin, c, part) * direction;
    store_at<kFloat32, partial>(x * cosine - y * sine, row, c, part);
    store_at<kFloat32, partial>(y * cosine + x * sine, row, c + rotation.half, part);
  });
}

// Units of a row: floats, or pairs of bfloat16.
template <Math math>
inline int64_t units_of(int64_t dim) {
  return math == Math::pairs ? (dim + 1) / 2 : dim;
}

// One row, rotated, as `units` units of the math; what is past the row is zero.
template <Dtype dtype, Math math>
inline void load_row(const void* row, int64_t dim, const Rotation& rotation, int32_t position, float* out,
                     int64_t units) {
  if (math == Math::pairs && rotation.cos == nullptr) {
    if (dim % 2 == 1) out[dim / 2] = 0.0f;
    __builtin_memcpy(out, row, 2 * dim);
  } else {
    float rotated[kMostHeadDim];
    float* const wide = math == Math::pairs ? rotated : out;
    widen_row<dtype>(row, dim, wide);
    if (rotation.cos != nullptr) rotate(wide, rotation, position, 1.0f);
    if constexpr (math == Math::pairs) {
      for_vectors(dim, [&]<bool partial>(int64_t c, int64_t part) {
        store_at<kBFloat16, partial>(load_at<kFloat32, partial>(rotated, c, part), out, c, part);
      });
    }
  }
  for (int64_t u = units_of<math>(dim); u < units; ++u) out[u] = 0.0f;
}

// Rows `from` to `to`, `stride` units apart; rows past the last are zero to a multiple of `row_step`.
template <Dtype dtype, Math math>
inline void load_rows(const HeadRows& rows, const Rotation& rotation, int64_t stride, int64_t row_step, float* out) {
  for (int64_t r = 0; r < rows.count; ++r) {
    prefetch_row<dtype>(rows, r + kPrefetchRows);
    const int32_t position = rotation.cos == nullptr ? 0 : rows.positions[r];
    load_row<dtype, math>(row_of<dtype>(rows, r), rows.dim, rotation, position, out + r * stride, stride);
  }
  for (int64_t i = rows.count * stride; i < round_up(rows.count, row_step) * stride; ++i) out[i] = 0.0f;
}

// Transposes `count` rows of `units` units (a multiple of kWidth, or padded to one by zeros): a lane a row, kQueryTile
// lanes from unit to unit. Lanes past the last row, to a multiple of kWidth, are zero.
inline void columns_of(const float* rows, int64_t stride, int64_t count, int64_t units, float* columns) {
  for (int64_t r = 0; r < count; r += kWidth) {
    for (int64_t u = 0; u < units; u += kWidth) {
      Words block[kWidth];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kWidth; ++i) {
        block[i] = r + i < count ? bits_of_float(load_floats(rows + (r + i) * stride + u)) : Words{};
      }
      transpose(block);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kWidth; ++i) {
        if (u + i < units) store_floats(float_of_bits(block[i]), columns + (u + i) * kQueryTile + r);
      }
    }
  }
}

// Rows and columns of a tile's queries (or of gradients that lie like them); `stride` units from row to row.
template <Dtype dtype, Math math>
inline void load_tile(const HeadRows& rows, const Rotation& rotation, int64_t stride, float* by_row, float* by_column) {
  load_rows<dtype, math>(rows, rotation, stride, 1, by_row);
  columns_of(by_row, stride, rows.count, round_up(units_of<math>(rows.dim), kDepthStep), by_column);
}

#if defined(EK_ISA_AVX512)
// Two keys' bfloat16 values of the same dimension side by side, for kWidth dimensions.
template <bool partial>
inline Words pair_values(const HeadRows& values, int64_t key, int64_t column, int64_t part) {
  const auto load = [&](int64_t index) {
    if (index >= values.count) return Words{};
    return bits_of_float(load_at<kBFloat16, partial>(row_of<kBFloat16>(values, index), column, part));
  };
  return load(key) >> 16 | load(key + 1);
}
#endif

// From row to row of a tile: whole vectors.
template <Math math>
inline int64_t tile_stride(int64_t dim) {
  return round_up(units_of<math>(dim), kWidth > kDepthStep ? kWidth : kDepthStep);
}

// Short sequences are read where they lie; the rows of longer ones would fall into few sets of the cache.
constexpr int64_t kInPlaceRows = 32;

// Keys and values as rows of floats; `whole` where the keys too are read by whole vectors.
template <Dtype dtype, bool whole>
inline void prepare_floats(const HeadRows& keys, const HeadRows& values, const Rotation& rotation, void* buffer,
                           PreparedKeys* prepared) {
  float* const to = static_cast<float*>(buffer);
  float* const values_to = to + round_up(keys.count, 32) * round_up(keys.dim, 32);
  const bool in_place = dtype == kFloat32 && keys.count <= kInPlaceRows;
  *prepared = {keys,      to, values_to, whole ? round_up(keys.dim, kWidth) : keys.dim, round_up(values.dim, kWidth),
               values.dim};
  if (in_place && rotation.cos == nullptr && (!whole || keys.dim % kWidth == 0)) {
    prepared->keys = keys.data;
    prepared->key_stride = keys.stride;
  } else {
    load_rows<dtype, Math::floats>(keys, rotation, prepared->key_stride, 1, to);
  }
  if (in_place && values.dim % kWidth == 0) {
    prepared->values = values.data;
    prepared->value_stride = values.stride;
  } else {
    load_rows<dtype, Math::floats>(values, Rotation{}, prepared->value_stride, 1, values_to);
  }
}

}  // namespace
}  // namespace embedding_kernels

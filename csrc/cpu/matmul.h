// For *_loops.cpp only: products of small matrices that lie in the cache, C = A B or C += A B.
//
// A is [rows, depth] and B [depth, columns] in 32-bit units: a float, or two bfloat16 that follow each other along the
// depth. B and C are row-major; A too, or transposed. Everything has internal linkage.
#pragma once

#include "attention.h"
#include "floats.h"
#include "tiles.h"

namespace embedding_kernels {
namespace {

enum class Math { floats, pairs };

// Bfloat16 is multiplied as pairs where there is an instruction for it, and widened elsewhere.
#if defined(EK_ISA_AVX512)
template <Dtype dtype>
constexpr Math kMath = dtype == kBFloat16 ? Math::pairs : Math::floats;
#else
template <Dtype dtype>
constexpr Math kMath = Math::floats;
#endif

// Depths of pairs are filled with zeros to a multiple of this; so are rows of A.
#if defined(EK_ISA_AMX)
constexpr int64_t kDepthStep = 16, kRowStep = 16;
#else
constexpr int64_t kDepthStep = 1, kRowStep = 1;
#endif

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

struct Product {
  const float* a;
  int64_t a_stride;
  const float* b;
  int64_t b_stride;
  float* c;
  int64_t c_stride;
  int64_t rows, depth, columns;  // columns: a multiple of kWidth
  Ahead* ahead;                  // or null
};

// As many requests as the first cache has on their way at once.
constexpr int64_t kLinesAtOnce = 14;

inline void bring_near(Ahead* ahead, int64_t lines) {
  if (ahead == nullptr) return;
  for (; lines > 0 && ahead->list < ahead->lists; --lines) {
    const Ahead::Rows& rows = ahead->rows[ahead->list];
    __builtin_prefetch(rows.data + ahead->row * rows.stride + ahead->byte, 0, 2);
    ahead->byte += 64;
    if (ahead->byte < rows.bytes) continue;
    ahead->byte = 0;
    if (++ahead->row < rows.count) continue;
    ahead->row = 0;
    ++ahead->list;
  }
}

inline Floats load_floats(const float* from) {
  Floats value;
  __builtin_memcpy(&value, from, sizeof(value));
  return value;
}
inline void store_floats(Floats value, float* to) { __builtin_memcpy(to, &value, sizeof(value)); }

template <Math math>
inline Floats multiply_add_unit(float a, Floats b, Floats c) {
#if defined(EK_ISA_AVX512)
  if constexpr (math == Math::pairs) {
    const __m512i unit = _mm512_castps_si512(_mm512_set1_ps(a));
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(unit), reinterpret_cast<__m512bh>(_mm512_castps_si512(b)));
  }
#endif
  return multiply_add(broadcast(a), b, c);
}

// A block of C that fits the registers. `fetch`: the rows of A after its own are brought near, line by line.
template <Math math, bool transposed, bool accumulate, bool fetch, int rows, int vectors>
inline void multiply_block(const Product& p, int64_t row, int64_t column) {
  const float* a = p.a + (transposed ? row : row * p.a_stride);
  const float* b = p.b + column;
  float* c = p.c + row * p.c_stride + column;
  const int64_t a_row = transposed ? 1 : p.a_stride, a_depth = transposed ? p.a_stride : 1;
  Floats sums[rows][vectors];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) sums[r][v] = accumulate ? load_floats(c + r * p.c_stride + v * kWidth) : Floats{};
  }
  for (int64_t k = 0; k < p.depth; ++k) {
    if (fetch && k % (64 / 4) == 0) {
      for (int r = rows; r < 2 * rows; ++r) __builtin_prefetch(a + r * a_row + k);
    }
    Floats from_b[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) from_b[v] = load_floats(b + k * p.b_stride + v * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const float from_a = a[r * a_row + k * a_depth];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sums[r][v] = multiply_add_unit<math>(from_a, from_b[v], sums[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) store_floats(sums[r][v], c + r * p.c_stride + v * kWidth);
  }
}

// Rows of a block: with two vectors each, two of B and one of A, all registers but few are sums.
constexpr int kBlockRows = kWidth == 16 ? 12 : 6;

template <Math math, bool transposed, bool accumulate, bool fetch, int vectors, int rows = kBlockRows>
inline void multiply_rows(const Product& p, int64_t row, int64_t column, int64_t count) {
  if constexpr (rows > 1) {
    if (count < rows)
      return multiply_rows<math, transposed, accumulate, fetch, vectors, rows - 1>(p, row, column, count);
  }
  multiply_block<math, transposed, accumulate, fetch, rows, vectors>(p, row, column);
}

template <Math math, bool transposed, bool accumulate, bool fetch, int vectors>
inline void multiply_strip(const Product& p, int64_t column) {
  // blocks of nearly equal height: a last one of a single row would wait for itself
  const int64_t blocks = (p.rows + kBlockRows - 1) / kBlockRows;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t row = p.rows * i / blocks;
    multiply_rows<math, transposed, accumulate, fetch, vectors>(p, row, column, p.rows * (i + 1) / blocks - row);
    bring_near(p.ahead, kLinesAtOnce);
  }
}

#if defined(EK_ISA_AMX)

template <bool accumulate, bool two_rows, bool two_columns>
inline void multiply_tiles(const Product& p, int64_t row, int64_t column) {
  const int64_t a_bytes = 4 * p.a_stride, b_bytes = 4 * p.b_stride, c_bytes = 4 * p.c_stride;
  const float* a = p.a + row * p.a_stride;
  const float* b = p.b + column;
  float* c = p.c + row * p.c_stride + column;
  float* below = c + 16 * p.c_stride;
  if constexpr (accumulate) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (two_columns) _tile_loadd(1, c + 16, c_bytes);
    if constexpr (two_rows) _tile_loadd(2, below, c_bytes);
    if constexpr (two_rows && two_columns) _tile_loadd(3, below + 16, c_bytes);
  } else {
    _tile_zero(0);
    if constexpr (two_columns) _tile_zero(1);
    if constexpr (two_rows) _tile_zero(2);
    if constexpr (two_rows && two_columns) _tile_zero(3);
  }
  for (int64_t k = 0; k < p.depth; k += 16) {
    _tile_loadd(6, b + k * p.b_stride, b_bytes);
    _tile_loadd(4, a + k, a_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (two_columns) {
      _tile_loadd(7, b + k * p.b_stride + 16, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (two_rows) {
      _tile_loadd(5, a + 16 * p.a_stride + k, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (two_columns) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (two_columns) _tile_stored(1, c + 16, c_bytes);
  if constexpr (two_rows) _tile_stored(2, below, c_bytes);
  if constexpr (two_rows && two_columns) _tile_stored(3, below + 16, c_bytes);
}

// Rows and depth are multiples of 16 here; what lies past the matrices' own is zero.
template <bool accumulate, bool two_columns>
inline void multiply_tile_strip(const Product& p, int64_t column) {
  int64_t row = 0;
  for (; row + 32 <= p.rows; row += 32) {
    multiply_tiles<accumulate, true, two_columns>(p, row, column);
    bring_near(p.ahead, kLinesAtOnce);
  }
  if (row < p.rows) multiply_tiles<accumulate, false, two_columns>(p, row, column);
}

#endif

template <Math math, bool transposed, bool accumulate, bool fetch = false>
__attribute__((noinline)) void multiply(const Product& p) {
  int64_t column = 0;
#if defined(EK_ISA_AMX)
  if constexpr (math == Math::pairs) {
    static_assert(!transposed);
    memory_is_used();
    Product padded = p;
    padded.rows = round_up(p.rows, kRowStep);
    padded.depth = round_up(p.depth, kDepthStep);
    for (; column + 32 <= p.columns; column += 32) multiply_tile_strip<accumulate, true>(padded, column);
    if (column < p.columns) multiply_tile_strip<accumulate, false>(padded, column);
    memory_is_used();
    return;
  }
#endif
  for (; column + 2 * kWidth <= p.columns; column += 2 * kWidth)
    multiply_strip<math, transposed, accumulate, fetch, 2>(p, column);
  if (column < p.columns) multiply_strip<math, transposed, accumulate, fetch, 1>(p, column);
}

}  // namespace
}  // namespace embedding_kernels

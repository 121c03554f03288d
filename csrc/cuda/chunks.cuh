// A thread's share of a row is chunks of neighbouring columns, by one access of 16 bytes where rows lie so, else value
// by value: the same columns either way, so a result does not depend on how the rows lie.
#pragma once

#include "floats.cuh"

namespace embedding_kernels::cuda {

// The N columns from `column` on as float32, zeros past the row's end. Aligned rows end with a chunk.
template <bool kAligned, class T, int N>
__device__ inline void load_chunk(const T* row, int column, int columns, float (&values)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = 0;
  if constexpr (kAligned) {
    if (column < columns) {
#pragma unroll
      for (int first = 0; first < N; first += kWide<T>) {
        float part[kWide<T>];
        load(row + column + first, part);
#pragma unroll
        for (int i = 0; i < kWide<T>; ++i) values[first + i] = part[i];
      }
    }
  } else {
    const T* const from = row + column;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < columns - column) values[i] = widen(from[i]);
    }
  }
}

// The same of several rows, `stride` apart and the first of them `inside`. All loads come before the first conversion,
// so that they are under way at once.
template <bool kAligned, class T, int kRows>
__device__ inline void load_chunks(const T* row, int64_t stride, int64_t inside, int column, int columns,
                                   float (&values)[kRows][kWide<T>]) {
  if constexpr (kAligned) {
    ptx::Words4 words[kRows];
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      words[k] = {};
      if (k < inside && column < columns) words[k] = ptx::load_words4(row + k * stride + column);
    }
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 4) {
          values[k][i] = ptx::float_of(words[k].word[i]);
        } else {
          unpack_pair<T>(words[k].word[i], values[k][2 * i], values[k][2 * i + 1]);
        }
      }
    }
  } else {
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      load_chunk<false>(row + k * stride, column, k < inside ? columns : 0, values[k]);
    }
  }
}

template <bool kAligned, class T, int N>
__device__ inline void store_chunk(T* row, int column, int columns, const float (&values)[N]) {
  if constexpr (kAligned) {
    if (column < columns) {
#pragma unroll
      for (int first = 0; first < N; first += kWide<T>) {
        float part[kWide<T>];
#pragma unroll
        for (int i = 0; i < kWide<T>; ++i) part[i] = values[first + i];
        store(row + column + first, part);
      }
    }
  } else {
    T* const to = row + column;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < columns - column) to[i] = round_to<T>(values[i]);
    }
  }
}

}  // namespace embedding_kernels::cuda

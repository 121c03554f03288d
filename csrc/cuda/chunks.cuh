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

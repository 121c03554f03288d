// Rotary position embedding: dimension i of a head is turned with i + half by the angle of the row's position.
#pragma once

#include "attention.cuh"

namespace embedding_kernels::cuda {

// Tables [limit, half]; half 0: none.
struct Rotation {
  const float *cosines, *sines;
  int32_t limit, half;
  bool wide;  // eight dimensions at a time
};

// Turns eight pairs, or one; `sign` −1 turns them back.
template <int N>
__device__ inline void turn(const Rotation& rotation, int32_t position, int first, float sign, float (&low)[N],
                            float (&high)[N]) {
  const int32_t row = smaller(larger(position, 0), rotation.limit - 1);
  const int64_t place = static_cast<int64_t>(row) * rotation.half + first;
#pragma unroll
  for (int i = 0; i < N; i += (N == 1 ? 1 : 4)) {
    constexpr int kAtOnce = N == 1 ? 1 : 4;
    float cosines[kAtOnce], sines[kAtOnce];
    load(rotation.cosines + place + i, cosines);
    load(rotation.sines + place + i, sines);
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const float x = low[i + j], y = high[i + j], sine = sign * sines[j];
      low[i + j] = x * cosines[j] - y * sine;
      high[i + j] = y * cosines[j] + x * sine;
    }
  }
}

template <class T>
__device__ inline void load_shared8(const T* from, float (&values)[8]) {
  const ptx::Words4 w = ptx::load_shared_words4(ptx::shared_address(from));
#pragma unroll
  for (int i = 0; i < 4; ++i) unpack_pair<T>(w.word[i], values[2 * i], values[2 * i + 1]);
}
template <class T>
__device__ inline void store_shared8(T* to, const float (&values)[8]) {
  ptx::Words4 w;
#pragma unroll
  for (int i = 0; i < 4; ++i) w.word[i] = pack_pair<T>(values[2 * i], values[2 * i + 1]);
  ptx::store_shared_words4(ptx::shared_address(to), w);
}

// Turns the first `rows` rows of a tile that has column `column` of a row at `index(row, column)`; `position(row)` is a
// row's. Thread `thread` of `threads`.
template <class T, class Index, class Position>
__device__ inline void rotate_rows(T* tile, int rows, const Rotation& rotation, int thread, int threads,
                                   const Index& index, const Position& position) {
  const int pieces = rotation.wide ? rotation.half / 8 : rotation.half;
  for (int item = thread; item < rows * pieces; item += threads) {
    const int row = item / pieces, piece = item % pieces;
    if (rotation.wide) {
      T* const low = tile + index(row, 8 * piece);
      T* const high = tile + index(row, 8 * piece + rotation.half);
      float x[8], y[8];
      load_shared8(low, x);
      load_shared8(high, y);
      turn(rotation, position(row), 8 * piece, 1, x, y);
      store_shared8(low, x);
      store_shared8(high, y);
    } else {
      T* const low = tile + index(row, piece);
      T* const high = tile + index(row, piece + rotation.half);
      float x[1] = {widen(*low)}, y[1] = {widen(*high)};
      turn(rotation, position(row), piece, 1, x, y);
      *low = round_to<T>(x[0]);
      *high = round_to<T>(y[0]);
    }
  }
}

template <class T, int D, class Position>
__device__ inline void rotate_tile(T* tile, int rows, const Rotation& rotation, int thread, int threads,
                                   const Position& position) {
  rotate_rows(
      tile, rows, rotation, thread, threads, [](int row, int column) { return element_index<D>(row, column); },
      position);
}

}  // namespace embedding_kernels::cuda

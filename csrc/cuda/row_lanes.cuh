// Rows of a few accesses each: as many lanes of a warp on a row as it has accesses, so that no lane idles on short
// ones.
#pragma once

#include "floats.cuh"
#include "launch.cuh"

namespace embedding_kernels::cuda {

// Lanes for a row of so many accesses: a power of two.
inline int lanes_for(int64_t accesses) {
  int lanes = 1;
  while (lanes < kWarp && lanes < accesses) lanes *= 2;
  return lanes;
}

// Calls visit(row, lane of the row) for every row, over the grid.
template <class Visit>
__device__ inline void for_rows(int64_t rows, int lanes, const Visit& visit) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t at_once = static_cast<int64_t>(gridDim.x) * blockDim.x / lanes;
  for (int64_t row = thread / lanes; row < rows; row += at_once) visit(row, static_cast<int>(thread % lanes));
}

// finish(row, sum) by one lane of each row, with the sum of what visit(row, lane) gave on its lanes; the order of
// additions is fixed.
template <class Visit, class Finish>
__device__ inline void for_rows_with_sums(int64_t rows, int lanes, const Visit& visit, const Finish& finish) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t at_once = static_cast<int64_t>(gridDim.x) * blockDim.x / lanes;
  const int lane = static_cast<int>(thread % lanes);
  // whole warps take every turn: all of their lanes take part in shuffles
  const int64_t first = thread / kWarp * (kWarp / lanes);
  for (int64_t turn = first; turn < rows; turn += at_once) {
    const int64_t row = turn + thread % kWarp / lanes;
    float sum = row < rows ? visit(row, lane) : 0.0f;
    for (int apart = lanes / 2; apart > 0; apart /= 2) sum += ptx::shuffle_xor(sum, static_cast<uint32_t>(apart));
    if (lane == 0 && row < rows) finish(row, sum);
  }
}

}  // namespace embedding_kernels::cuda

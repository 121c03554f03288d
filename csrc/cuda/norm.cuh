// What forward and backward of the norms share: how many threads take a row, their sums, and weight and bias.
#pragma once

#include "../norm_checks.h"
#include "chunks.cuh"
#include "launch.cuh"
#include "ptx.cuh"

namespace embedding_kernels::cuda {

// A row is taken by a team: one warp, or as many as it needs to hold the row in registers. What is wider than the
// widest team holds is read again from memory.
constexpr int kMostTeam = 512;

// `held`: values that a thread holds.
inline int team_of(int64_t columns, int held) {
  int team = kWarp;
  while (team < kMostTeam && static_cast<int64_t>(team) * held < columns) team *= 2;
  return team;
}

// Each a warp's; two buffers, so that one barrier a sum is enough.
struct TeamSums {
  float of_warp[2][2][kMostTeam / kWarp];
};

// Sums of two values over the team, in a fixed order; every thread gets them. All threads of a block take part. `turn`
// counts the calls.
__device__ inline void team_sums(float& first, float& second, int team, TeamSums& sums, int& turn) {
  first = warp_sum(first);
  second = warp_sum(second);
  if (team == kWarp) return;
  const int warp = threadIdx.x / kWarp, warps = team / kWarp;
  auto& mine = sums.of_warp[turn++ % 2];
  if (threadIdx.x % kWarp == 0) {
    mine[0][warp] = first;
    mine[1][warp] = second;
  }
  ptx::sync_block();
  first = second = 0;
  const int begin = warp / warps * warps;
  for (int w = begin; w < begin + warps; ++w) {
    first += mine[0][w];
    second += mine[1][w];
  }
}

// weight or bias: float32, or of the rows' type; null for none.
struct Vector {
  const void* data;
  bool is_float;
};

inline Vector vector_of(const std::optional<Tensor>& tensor) {
  if (!tensor) return {nullptr, false};
  return {pointer<uint8_t>(*tensor), tensor->scalar_type() == ScalarType::Float};
}
inline bool is_aligned(const Vector& vector) { return reinterpret_cast<uintptr_t>(vector.data) % 16 == 0; }

template <class T, bool kAligned>
__device__ inline void load_vector(const Vector& vector, int column, int columns, float (&values)[kWide<T>]) {
  if (vector.is_float) {
    load_chunk<kAligned>(static_cast<const float*>(vector.data), column, columns, values);
  } else {
    load_chunk<kAligned>(static_cast<const T*>(vector.data), column, columns, values);
  }
}

template <class T>
bool rows_are_wide(const Tensor& rows) {
  return rows_are_wide(pointer<T>(rows), rows.stride(0), rows.size(1));
}

}  // namespace embedding_kernels::cuda

// What Hopper's kernels share: tiles as products of warpgroups read them, and rings of tiles between the warp that has
// them copied and the warpgroups that multiply them.
//
// A tile is one or more panels: rows of 128 bytes, 64 values of 16 bits or 1024 bits, swizzled as in TensorShape, from
// a multiple of 1024 bytes on.
#pragma once

#include "ptx_hopper.cuh"

namespace embedding_kernels::cuda {

constexpr int kWarpgroup = 128;
constexpr int kPanelRow = 128;  // bytes
constexpr int kPanelValues = 64;

// A matrix of a product in shared memory, its rows along the sum: 16 values, or 256 bits, from `address` on. The next
// step of the sum is 32 bytes on, within a panel.
__device__ inline uint64_t along_rows(uint32_t address) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | uint64_t{8 * kPanelRow / 16} << 32 | uint64_t{1} << 16 | (address & 0x3ffff) >> 4;
}
// Its columns along the sum: 16 rows from `address` on, 64 columns a panel, the panels `panel_bytes` apart.
__device__ inline uint64_t along_columns(uint32_t address, uint32_t panel_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | uint64_t{8 * kPanelRow / 16} << 32 | uint64_t{panel_bytes >> 4} << 16 | (address & 0x3ffff) >> 4;
}

// A matrix `bytes` further on in its tile: the low word alone has the address.
__device__ inline uint64_t further(uint64_t matrix, uint32_t bytes) {
  return (matrix & ~uint64_t{0xffffffff}) | (static_cast<uint32_t>(matrix) + (bytes >> 4));
}

// Where a panel has piece `piece` (16 bytes) of row `row`.
__device__ inline uint32_t panel_offset(int row, int piece) {
  return static_cast<uint32_t>(row * kPanelRow + ((piece ^ (row & 7)) << 4));
}

__device__ inline void wait_at(uint32_t barrier, uint32_t parity) {
  while (!ptx::has_passed(barrier, parity)) {
  }
}

// Where a thread stands in a ring of stages.
template <int kStages>
struct RingPlace {
  int stage = 0;
  uint32_t parity = 0;  // of the phase that makes a stage full; a stage is free past the other one
  __device__ void advance() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

// The producer makes a stage full, and everyone who reads it frees it again.
template <int kStages>
struct Ring {
  uint64_t full[kStages], free[kStages];
};

// One thread, before publish_barriers and a barrier of the block; `readers` arrive to free a stage.
template <int kStages>
__device__ inline void begin_ring(Ring<kStages>& ring, uint32_t readers) {
  for (int stage = 0; stage < kStages; ++stage) {
    ptx::begin_barrier(ptx::shared_address(&ring.full[stage]), 1);
    ptx::begin_barrier(ptx::shared_address(&ring.free[stage]), readers);
  }
}
// What the producer's copies for a stage arrive at, and its readers.
template <int kStages>
__device__ inline uint32_t full_at(const Ring<kStages>& ring, const RingPlace<kStages>& place) {
  return ptx::shared_address(&ring) + place.stage * static_cast<uint32_t>(sizeof(uint64_t));
}
template <int kStages>
__device__ inline uint32_t free_at(const Ring<kStages>& ring, const RingPlace<kStages>& place) {
  return full_at(ring, place) + kStages * static_cast<uint32_t>(sizeof(uint64_t));
}
// A whole warp comes, and goes on together: products want its lanes so, and so does give_free.
template <int kStages>
__device__ inline void wait_full(const Ring<kStages>& ring, const RingPlace<kStages>& place) {
  wait_at(full_at(ring, place), place.parity);
  ptx::sync_warp();
}
template <int kStages>
__device__ inline void wait_free(const Ring<kStages>& ring, const RingPlace<kStages>& place) {
  wait_at(free_at(ring, place), place.parity ^ 1);
}
// By one lane of each warp that reads: its whole warp has waited for the products that read the stage, or has met since
// it saw the stage full. A lane left behind would miss the phase that it waits for once the next but one has begun.
template <int kStages>
__device__ inline void give_free(const Ring<kStages>& ring, const RingPlace<kStages>& place, int lane) {
  if (lane == 0) ptx::arrive_at(free_at(ring, place));
}

}  // namespace embedding_kernels::cuda

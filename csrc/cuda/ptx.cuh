// The one header through which kernels reach PTX: one wrapper an instruction, one body a wrapper.
#pragma once

#include <cstdint>

namespace embedding_kernels::ptx {

// Bit i is the predicate of lane i of this warp.
__device__ inline uint32_t vote_ballot(bool predicate) {
  uint32_t lanes;
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %1, 0; vote.sync.ballot.b32 %0, p, 0xffffffff; }"
               : "=r"(lanes)
               : "r"(static_cast<uint32_t>(predicate)));
  return lanes;
}

__device__ inline uint32_t reverse_bits(uint32_t word) {
  uint32_t reversed;
  asm("brev.b32 %0, %1;" : "=r"(reversed) : "r"(word));
  return reversed;
}

}  // namespace embedding_kernels::ptx

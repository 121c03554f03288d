// What csrc/cuda/warpgroup.cuh gives to kernels, for fragments_cute_hopper.cpp, which cannot include it: CuTe brings
// CUDA's own headers, and those of the emulation define CUDA's words once more.
#include "warpgroup.cuh"

namespace kernels {

uint64_t along_rows(uint32_t address) { return embedding_kernels::cuda::along_rows(address); }
uint64_t along_columns(uint32_t address, uint32_t panel_bytes) {
  return embedding_kernels::cuda::along_columns(address, panel_bytes);
}
uint64_t further(uint64_t matrix, uint32_t bytes) { return embedding_kernels::cuda::further(matrix, bytes); }
uint32_t panel_offset(int row, int piece) { return embedding_kernels::cuda::panel_offset(row, piece); }

}  // namespace kernels

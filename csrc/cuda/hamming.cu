// Packing of codes on CUDA.
#include "../hamming_checks.h"
#include "../kernels.h"
#include "launch.cuh"
#include "ptx.cuh"

namespace embedding_kernels::cuda {
namespace {

constexpr int kThreads = 256;

// x > 0 by its bits (see csrc/cpu/hamming_loops.cpp): true for every dtype without a conversion.
__device__ inline bool is_positive(uint32_t bits, uint32_t infinity) { return bits != 0 && bits - 1 < infinity; }

// One warp packs 32 values of a row at a time: a lane a value, a vote, four bytes.
template <class Bits>
__global__ void pack_bits_kernel(const Bits* __restrict__ x, int64_t rows, int64_t dim, int64_t stride,
                                 uint32_t infinity, uint8_t* __restrict__ out) {
  const int64_t words = (dim + kWarp - 1) / kWarp, bytes = (dim + 7) / 8;
  const int lane = threadIdx.x % kWarp;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (blockDim.x / kWarp);
  for (int64_t item = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp; item < rows * words;
       item += warps) {
    const int64_t row = item / words, word = item % words, column = word * kWarp + lane;
    const bool positive = column < dim && is_positive(x[row * stride + column], infinity);
    // reversed, so that the first of the 32 values is the top bit; byte 0 is then the top byte
    const uint32_t packed = ptx::reverse_bits(ptx::vote_ballot(positive));
    const int64_t byte = word * 4 + lane;
    if (lane < 4 && byte < bytes) out[row * bytes + byte] = static_cast<uint8_t>(packed >> (24 - 8 * lane));
  }
}

template <class Bits>
void launch_pack_bits(const Tensor& x, uint32_t infinity, Tensor& out) {
  const int64_t rows = x.size(0), dim = x.size(1);
  const int64_t warps = rows * ((dim + kWarp - 1) / kWarp);
  if (warps == 0) return;
  launch("pack_bits", pack_bits_kernel<Bits>, dim3(blocks_for(warps, kThreads / kWarp)), dim3(kThreads), 0,
         current_stream(x), pointer<Bits>(x), rows, dim, x.stride(0), infinity, mutable_pointer<uint8_t>(out));
}

}  // namespace

Tensor pack_bits(Tensor x) {
  check_pack_bits(x);
  const DeviceGuard guard(x.get_device_index());
  x = dense_rows(x);
  Tensor out = empty_like_device(x, {x.size(0), (x.size(1) + 7) / 8}, ScalarType::Byte);
  switch (x.scalar_type()) {
    case ScalarType::Float:
      launch_pack_bits<uint32_t>(x, 0x7f800000u, out);
      break;
    case ScalarType::BFloat16:
      launch_pack_bits<uint16_t>(x, 0x7f80u, out);
      break;
    default:
      launch_pack_bits<uint16_t>(x, 0x7c00u, out);
  }
  return out;
}

}  // namespace embedding_kernels::cuda

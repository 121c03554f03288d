// How every kernel is started: on the caller's stream and device, dynamic shared memory only, errors raised at once.
// Compiled by nvcc, and by g++ for the host emulation (tests/cuda_host), which brings its own launch.
#pragma once

#if defined(__CUDACC__)
#include <cuda_runtime_api.h>
#else
#include "emulation.h"
#endif
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "../checks.h"

namespace embedding_kernels::cuda {

constexpr int kWarp = 32;

#if defined(__CUDACC__)

using DeviceGuard = torch::stable::accelerator::DeviceGuard;

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) != 0) {
    throw std::runtime_error("embedding_kernels: torch gave no CUDA stream");
  }
  return static_cast<cudaStream_t>(stream);
}

inline void raise_on_error(const char* op, const char* what, cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(op) + ": " + what + ": " + cudaGetErrorString(error));
}

// Blocks take what they share from one struct in dynamic shared memory, aligned to 1024 bytes.
template <class Shared>
__device__ inline Shared& shared_memory() {
  extern __shared__ __align__(1024) unsigned char embedding_kernels_shared[];
  return *reinterpret_cast<Shared*>(embedding_kernels_shared);
}

template <class... Parameters>
void launch(const char* op, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t stream, std::type_identity_t<Parameters>... arguments) {
  // past 48 KiB a kernel has to be told; the call costs a microsecond, so others go without
  if (shared_bytes > 48 * 1024) {
    raise_on_error(op, "shared memory was refused",
                   cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                        cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  }
  kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
  raise_on_error(op, "launch failed", cudaGetLastError());
}

inline int multiprocessors(const Tensor& tensor) {
  int count = 0;
  raise_on_error("embedding_kernels", "the device was not read",
                 cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, tensor.get_device_index()));
  return count;
}

// The major number of the device's compute capability.
inline int capability(const Tensor& tensor) {
  int major = 0;
  raise_on_error("embedding_kernels", "the device was not read",
                 cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, tensor.get_device_index()));
  return major;
}
// Whether the library has code for sm_90a.
#if defined(EMBEDDING_KERNELS_HOPPER)
constexpr bool kForHopper = true;
#else
constexpr bool kForHopper = false;
#endif

inline void copy_to_host(const char* op, void* to, const void* from, size_t bytes, cudaStream_t stream) {
  if (bytes == 0) return;
  raise_on_error(op, "copy to the host failed", cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream));
  raise_on_error(op, "copy to the host failed", cudaStreamSynchronize(stream));
}
inline void fill_zero(const char* op, void* to, size_t bytes, cudaStream_t stream) {
  if (bytes == 0) return;
  raise_on_error(op, "filling memory failed", cudaMemsetAsync(to, 0, bytes, stream));
}

// Data of a tensor for a kernel. The emulation notes the extent here: kernels may touch nothing else.
template <class T>
const T* pointer(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T>
T* mutable_pointer(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

#else

using DeviceGuard = emulation::DeviceGuard;
using emulation::capability;
using emulation::copy_to_host;
using emulation::current_stream;
using emulation::fill_zero;
using emulation::launch;
using emulation::multiprocessors;
using emulation::mutable_pointer;
using emulation::pointer;
using emulation::shared_memory;
constexpr bool kForHopper = true;

#endif

// Which of the calls that Hopper's own kernels can serve go to them; by EMBEDDING_KERNELS_HOPPER, else those that they
// serve better.
enum class HopperCalls { kBetter, kNone, kAll };
inline HopperCalls hopper_calls() {
  const char* const asked = std::getenv("EMBEDDING_KERNELS_HOPPER");
  if (asked == nullptr || *asked == '\0') return HopperCalls::kBetter;
  if (std::strcmp(asked, "none") == 0) return HopperCalls::kNone;
  if (std::strcmp(asked, "all") == 0) return HopperCalls::kAll;
  throw std::invalid_argument(std::string("EMBEDDING_KERNELS_HOPPER must be none or all, got ") + asked);
}
// Whether the device has what is compiled for sm_90a, such code is in the library, and it may run.
inline bool is_hopper(const Tensor& tensor) {
  return hopper_calls() != HopperCalls::kNone && kForHopper && capability(tensor) == 9;
}
// The least longest sequence for which tiles of 64 rows pay.
inline int64_t long_for_hopper() { return hopper_calls() == HopperCalls::kAll ? 0 : 129; }

template <class T>
const T* pointer_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? pointer<T>(*tensor) : nullptr;
}

inline Tensor empty_like_device(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), dtype,
                              std::nullopt, like.device());
}

// Kernels take any strides whose last dimension is dense; other tensors are copied.
inline Tensor dense_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) <= 1 || tensor.stride(last) == 1 ? tensor : torch::stable::contiguous(tensor);
}

// Values of offsets cost a sync, so they are looked at only where the caller asked (kernels clamp them anyway).
inline bool values_are_checked() {
  const char* asked = std::getenv("EMBEDDING_KERNELS_CHECK");
  return asked != nullptr && std::strcmp(asked, "1") == 0;
}
inline void check_offsets_if_asked(const char* op, const char* argument, const Tensor& offsets, int64_t total) {
  if (!values_are_checked()) return;
  std::vector<int32_t> values(static_cast<size_t>(offsets.size(0)));
  copy_to_host(op, values.data(), pointer<int32_t>(offsets), values.size() * sizeof(int32_t), current_stream(offsets));
  check_offsets(op, argument, values.data(), offsets.size(0), total);
}

inline unsigned blocks_for(int64_t items, int64_t a_block, int64_t most = int64_t{1} << 16) {
  const int64_t blocks = (items + a_block - 1) / a_block;
  return static_cast<unsigned>(blocks < most ? blocks : most);
}

}  // namespace embedding_kernels::cuda

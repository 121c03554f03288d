// How every kernel is started: on the caller's stream and device, dynamic shared memory only, errors raised at once.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <string>
#include <type_traits>

namespace embedding_kernels::cuda {

inline cudaStream_t current_stream(const torch::stable::Tensor& tensor) {
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) != 0) {
    throw std::runtime_error("embedding_kernels: torch gave no CUDA stream");
  }
  return static_cast<cudaStream_t>(stream);
}

template <class... Parameters>
void launch(const char* op, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t stream, std::type_identity_t<Parameters>... arguments) {
  kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) {
    throw std::runtime_error(std::string(op) + ": launch failed: " + cudaGetErrorString(error));
  }
}

}  // namespace embedding_kernels::cuda

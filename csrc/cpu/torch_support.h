// What every <family>.cpp needs of torch: threads, element types, dense rows.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "dtype.h"

namespace embedding_kernels {

// The `parallel_for` that the drivers take, on torch's threads, so that torch.set_num_threads rules.
struct TorchParallelFor {
  template <class Task>
  void operator()(int64_t count, const Task& task) const {
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) task(i);
    });
  }
};

inline int64_t torch_threads() { return torch::stable::get_num_threads(); }

inline Dtype dtype_of(torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  return dtype == ScalarType::Float ? kFloat32 : dtype == ScalarType::BFloat16 ? kBFloat16 : kFloat16;
}
inline Dtype dtype_of(const torch::stable::Tensor& tensor) { return dtype_of(tensor.scalar_type()); }

// Kernels take any strides whose last dimension is dense; other tensors are copied.
inline torch::stable::Tensor dense_rows(const torch::stable::Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) <= 1 || tensor.stride(last) == 1 ? tensor : torch::stable::contiguous(tensor);
}

}  // namespace embedding_kernels

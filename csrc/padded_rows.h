// Rows of any type that padding moves, on the CPU and on CUDA: all but a tensor's first dimensions.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace embedding_kernels {

// Bytes of one row of a tensor whose rows are indexed by its first `leading` dimensions.
inline int64_t row_bytes(const torch::stable::Tensor& tensor, int64_t leading) {
  int64_t bytes = static_cast<int64_t>(tensor.element_size());
  for (int64_t d = leading; d < tensor.dim(); ++d) bytes *= tensor.size(d);
  return bytes;
}

// The tensor itself where each row is dense in memory, else a copy.
inline torch::stable::Tensor with_dense_rows(const torch::stable::Tensor& tensor, int64_t leading) {
  int64_t expected = 1;
  for (int64_t d = tensor.dim() - 1; d >= leading; --d) {
    if (tensor.size(d) > 1 && tensor.stride(d) != expected) return torch::stable::contiguous(tensor);
    expected *= tensor.size(d);
  }
  return tensor;
}

// `first` and, after them, the sizes of a row.
inline std::vector<int64_t> sizes_of_rows(std::vector<int64_t> first, const torch::stable::Tensor& tensor,
                                          int64_t leading) {
  for (int64_t d = leading; d < tensor.dim(); ++d) first.push_back(tensor.size(d));
  return first;
}

}  // namespace embedding_kernels

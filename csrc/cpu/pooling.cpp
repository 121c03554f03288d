// Checks and dispatch of the pooling family on torch tensors.
#include "pooling.h"

#include "../kernels.h"
#include "../pooling_checks.h"
#include "hamming.h"
#include "pooling_driver.h"
#include "torch_support.h"

namespace embedding_kernels::cpu {
namespace {

// The tensors that a Pooling points into, made dense where they were not.
struct PoolingTensors {
  Tensor hidden, offsets;
  std::optional<Tensor> weights;
};

// Checks of the offsets, mode and weights that forward and backward share; `total` rows of `dim`.
Pooling pooling_of(const char* op, PoolingTensors& tensors, int64_t total, int64_t dim, const std::string& mode_name,
                   int64_t m, std::optional<int64_t> truncate_dim, const Tensor& device) {
  const PoolingMode mode = check_pooling(op, &device == &tensors.hidden ? "hidden" : "grad", device, tensors.offsets,
                                         total, dim, mode_name, m, tensors.weights, truncate_dim);
  tensors.offsets = torch::stable::contiguous(tensors.offsets);
  if (tensors.weights) tensors.weights = torch::stable::contiguous(*tensors.weights);
  const auto* offsets = static_cast<const int32_t*>(tensors.offsets.const_data_ptr());
  check_offsets(op, "cu_seqlens", offsets, tensors.offsets.size(0), total);
  const auto* weights = tensors.weights ? static_cast<const float*>(tensors.weights->const_data_ptr()) : nullptr;
  return {nullptr, 0, kFloat32, offsets, tensors.offsets.size(0) - 1, truncate_dim.value_or(dim), mode, m, weights};
}

void set_rows(Pooling& pooling, PoolingTensors& tensors) {
  tensors.hidden = dense_rows(tensors.hidden);
  pooling.rows = tensors.hidden.const_data_ptr();
  pooling.stride = tensors.hidden.stride(0);
  pooling.dtype = dtype_of(tensors.hidden);
}

Pooling checked_pooling(const char* op, PoolingTensors& tensors, const std::string& mode, int64_t m,
                        std::optional<int64_t> truncate_dim) {
  check_tensor(op, "hidden", tensors.hidden, kPoolingRows, kFloats, 2);
  Pooling pooling =
      pooling_of(op, tensors, tensors.hidden.size(0), tensors.hidden.size(1), mode, m, truncate_dim, tensors.hidden);
  set_rows(pooling, tensors);
  return pooling;
}

Tensor empty_pooled(const Pooling& pooling, int64_t width, ScalarType dtype) {
  if (pooling.mode == PoolingMode::first_m) {
    return torch::stable::empty({pooling.sequences, pooling.m, width}, dtype);
  }
  return torch::stable::empty({pooling.sequences, width}, dtype);
}

}  // namespace

Tensor segment_pool(Tensor hidden, Tensor cu_seqlens, std::string mode, int64_t m, std::optional<Tensor> weights,
                    bool normalize, std::optional<int64_t> truncate_dim, std::optional<ScalarType> out_dtype) {
  const char* const op = "segment_pool";
  PoolingTensors tensors{hidden, cu_seqlens, weights};
  const Pooling pooling = checked_pooling(op, tensors, mode, m, truncate_dim);
  const ScalarType dtype = checked_out_dtype(op, hidden, out_dtype);

  Tensor out = empty_pooled(pooling, pooling.columns, dtype);
  auto* to = static_cast<uint8_t*>(out.mutable_data_ptr());
  const PoolingLoops& loops = pooling_loops();
  const Dtype stored = dtype_of(dtype);
  const int64_t columns = pooling.columns, row_bytes = columns * dtype_bytes(stored);
  embedding_kernels::segment_pool(
      loops, pooling, torch_threads(), TorchParallelFor(), [&](int64_t sequence, const float* vectors) {
        for (int64_t j = 0; j < pooling.m; ++j) {
          const float* vector = vectors + j * columns;
          const float scale = normalize ? 1.0f / std::max(norm(loops, vector, columns), kNormEps) : 1.0f;
          loops.store_scaled[stored](vector, scale, columns, to + (sequence * pooling.m + j) * row_bytes);
        }
      });
  return out;
}

Tensor segment_pool_pack_bits(Tensor hidden, Tensor cu_seqlens, std::string mode, int64_t m,
                              std::optional<Tensor> weights, std::optional<int64_t> truncate_dim) {
  PoolingTensors tensors{hidden, cu_seqlens, weights};
  const Pooling pooling = checked_pooling("segment_pool_pack_bits", tensors, mode, m, truncate_dim);
  const int64_t bytes = (pooling.columns + 7) / 8;
  Tensor out = empty_pooled(pooling, bytes, ScalarType::Byte);
  auto* to = static_cast<uint8_t*>(out.mutable_data_ptr());
  const auto pack = hamming_loops().pack_bits[kFloat32];
  embedding_kernels::segment_pool(
      pooling_loops(), pooling, torch_threads(), TorchParallelFor(), [&](int64_t sequence, const float* vectors) {
        for (int64_t j = 0; j < pooling.m; ++j) {
          pack(vectors + j * pooling.columns, pooling.columns, to + (sequence * pooling.m + j) * bytes);
        }
      });
  return out;
}

std::tuple<Tensor, Tensor> segment_pool_backward(Tensor grad, std::optional<Tensor> hidden, Tensor cu_seqlens,
                                                 int64_t total_tokens, int64_t dim, ScalarType dtype, std::string mode,
                                                 int64_t m, std::optional<Tensor> weights, bool normalize) {
  const char* const op = "segment_pool_backward";
  check_pooling_gradient(op, grad, hidden, total_tokens, dim, dtype, mode);
  PoolingTensors tensors{grad, cu_seqlens, weights};
  Pooling pooling = pooling_of(op, tensors, total_tokens, dim, mode, m, std::nullopt, grad);
  check_pooled_gradient(op, grad, hidden.has_value(), pooling.sequences, m, dim, pooling.mode, normalize);
  pooling.columns = grad.size(grad.dim() - 1);
  if (hidden) {
    tensors.hidden = *hidden;
    set_rows(pooling, tensors);
  }

  const PoolingLoops& loops = pooling_loops();
  grad = torch::stable::contiguous(grad);
  std::vector<float> sequences(pooling.sequences * m * pooling.columns);
  loops.load[dtype_of(grad)](grad.const_data_ptr(), static_cast<int64_t>(sequences.size()), sequences.data());
  Tensor rows = torch::stable::empty({total_tokens, dim}, dtype);
  const bool weights_learn = weights && hidden;
  Tensor grad_weights = torch::stable::empty({weights_learn ? total_tokens : 0}, ScalarType::Float);
  const PoolingGradient out = {sequences.data(),
                               normalize,
                               dtype_of(dtype),
                               static_cast<uint8_t*>(rows.mutable_data_ptr()),
                               dim * dtype_bytes(dtype_of(dtype)),
                               weights_learn ? static_cast<float*>(grad_weights.mutable_data_ptr()) : nullptr};
  embedding_kernels::segment_pool_backward(loops, pooling, out, torch_threads(), TorchParallelFor());
  return {rows, grad_weights};
}

}  // namespace embedding_kernels::cpu

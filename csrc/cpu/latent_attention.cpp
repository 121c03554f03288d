// Checks and dispatch of the latent attention family on torch tensors.
#include "latent_attention.h"

#include "../kernels.h"
#include "../latent_attention_checks.h"
#include "latent_attention_driver.h"
#include "pooling.h"
#include "torch_support.h"

namespace embedding_kernels::cpu {
namespace {

const uint8_t* row_of(const Tensor& tensor, int64_t row) {
  const auto* data = static_cast<const uint8_t*>(tensor.const_data_ptr());
  return data + row * tensor.stride(0) * static_cast<int64_t>(tensor.element_size());
}

Tensor empty_rows(const Tensor& like) { return torch::stable::empty({like.size(0), like.size(1)}, like.scalar_type()); }

std::vector<float> as_floats(const Tensor& tensor) {
  const Tensor dense = torch::stable::contiguous(tensor);
  std::vector<float> values(dense.numel());
  pooling_loops().load[dtype_of(dense)](dense.const_data_ptr(), static_cast<int64_t>(values.size()), values.data());
  return values;
}

// The arguments that forward and backward share, checked, and made dense where they were not.
struct GatedTensors {
  Tensor hidden;
  std::optional<Tensor> bias;
  Tensor offsets;
  std::optional<Tensor> weights;
  std::vector<float> bias_values = {};

  GatedPooling checked(const char* op) {
    latent_attention::check_gated(op, hidden, bias, offsets, weights);
    hidden = dense_rows(hidden);
    offsets = torch::stable::contiguous(offsets);
    if (weights) weights = torch::stable::contiguous(*weights);
    if (bias) bias_values = as_floats(*bias);
    const auto* starts = static_cast<const int32_t*>(offsets.const_data_ptr());
    check_offsets(op, "cu_seqlens", starts, offsets.size(0), hidden.size(0));
    return {row_of(hidden, 0),
            hidden.stride(0) * static_cast<int64_t>(hidden.element_size()),
            dtype_of(hidden),
            hidden.size(1) / 2,
            bias ? bias_values.data() : nullptr,
            starts,
            offsets.size(0) - 1,
            weights ? static_cast<const float*>(weights->const_data_ptr()) : nullptr};
  }
};

}  // namespace

Tensor grouped_softmax(Tensor scores, int64_t groups) {
  latent_attention::check_groups("grouped_softmax", "scores", scores, groups);
  scores = dense_rows(scores);
  Tensor out = empty_rows(scores);
  const int64_t columns = scores.size(1), size = columns / groups;
  auto* const to = static_cast<uint8_t*>(out.mutable_data_ptr());
  const auto softmax = latent_attention_loops().softmax[dtype_of(scores)];
  for_rows(scores.size(0), columns, size + 16, TorchParallelFor(), [&](int64_t r, float* scratch) {
    softmax(row_of(scores, r), groups, size, scratch, to + r * columns * static_cast<int64_t>(out.element_size()));
  });
  return out;
}

Tensor grouped_softmax_backward(Tensor grad, Tensor probabilities, int64_t groups) {
  latent_attention::check_softmax_backward("grouped_softmax_backward", grad, probabilities, groups);
  grad = dense_rows(grad);
  probabilities = dense_rows(probabilities);
  Tensor out = empty_rows(probabilities);
  const int64_t columns = out.size(1);
  auto* const to = static_cast<uint8_t*>(out.mutable_data_ptr());
  const auto backward = latent_attention_loops().softmax_backward[dtype_of(out)];
  for_rows(out.size(0), columns, 0, TorchParallelFor(), [&](int64_t r, float*) {
    backward(row_of(grad, r), row_of(probabilities, r), groups, columns / groups,
             to + r * columns * static_cast<int64_t>(out.element_size()));
  });
  return out;
}

Tensor geglu_segment_pool(Tensor hidden, std::optional<Tensor> bias, Tensor cu_seqlens, std::optional<Tensor> weights,
                          std::optional<ScalarType> out_dtype) {
  const char* const op = "geglu_segment_pool";
  GatedTensors tensors{hidden, bias, cu_seqlens, weights};
  const GatedPooling pooling = tensors.checked(op);
  const ScalarType dtype = latent_attention::checked_out_dtype(op, hidden, out_dtype);
  Tensor out = torch::stable::empty({pooling.sequences, pooling.columns}, dtype);
  auto* const to = static_cast<uint8_t*>(out.mutable_data_ptr());
  const auto store = pooling_loops().store_scaled[dtype_of(dtype)];
  embedding_kernels::geglu_segment_pool(
      latent_attention_loops(), pooling, TorchParallelFor(),
      [&](int64_t sequence, int64_t column, int64_t count, const float* sums, float scale) {
        store(sums, scale, count, to + (sequence * pooling.columns + column) * dtype_bytes(dtype_of(dtype)));
      });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> geglu_segment_pool_backward(Tensor grad, Tensor hidden, std::optional<Tensor> bias,
                                                               Tensor cu_seqlens, std::optional<Tensor> weights) {
  const char* const op = "geglu_segment_pool_backward";
  GatedTensors tensors{hidden, bias, cu_seqlens, weights};
  const GatedPooling pooling = tensors.checked(op);
  latent_attention::check_pooled_grad(op, grad, hidden, pooling.sequences);
  const std::vector<float> scales = gated_scales(pooling);
  std::vector<float> pooled = as_floats(grad);
  for (int64_t s = 0; s < pooling.sequences; ++s) {
    float* const row = pooled.data() + s * pooling.columns;
    for (int64_t c = 0; c < pooling.columns; ++c) row[c] *= scales[s];
  }
  Tensor rows = empty_rows(hidden);
  Tensor grad_bias = torch::stable::empty({hidden.size(1)}, ScalarType::Float);
  Tensor grad_weights = torch::stable::empty({weights ? hidden.size(0) : 0}, ScalarType::Float);
  const GatedGradient out = {scales.data(), pooled.data(), static_cast<uint8_t*>(rows.mutable_data_ptr()),
                             static_cast<float*>(grad_bias.mutable_data_ptr()),
                             weights ? static_cast<float*>(grad_weights.mutable_data_ptr()) : nullptr};
  embedding_kernels::geglu_segment_pool_backward(latent_attention_loops(), pooling, out, TorchParallelFor());
  return {rows, grad_bias, grad_weights};
}

}  // namespace embedding_kernels::cpu

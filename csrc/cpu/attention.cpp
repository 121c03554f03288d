// Dispatch of the attention family on torch tensors.
#include "attention.h"

#include <cmath>

#include "../attention_checks.h"
#include "../kernels.h"
#include "attention_driver.h"
#include "torch_support.h"

namespace embedding_kernels::cpu {
namespace {

const int32_t* ints(Tensor& tensor) {
  tensor = torch::stable::contiguous(tensor);
  return static_cast<const int32_t*>(tensor.const_data_ptr());
}

const int32_t* ints(std::optional<Tensor>& tensor) { return tensor ? ints(*tensor) : nullptr; }

const float* floats(std::optional<Tensor>& tensor) {
  if (!tensor) return nullptr;
  tensor = torch::stable::contiguous(*tensor);
  return static_cast<const float*>(tensor->const_data_ptr());
}

Heads heads_of(Tensor& tensor) {
  tensor = dense_rows(tensor);
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.size(1), tensor.size(2)};
}

Attention checked_attention(const char* op, AttentionTensors& t, std::optional<double> scale, bool causal,
                            int64_t window_left, int64_t window_right, double softcap) {
  check_attention(op, t, window_left, window_right, softcap, [](Tensor& tensor) { return ints(tensor); });
  Attention attention;
  attention.offsets_q = ints(t.offsets_q);
  attention.offsets_k = ints(t.offsets_k);
  attention.sequences = t.offsets_q.size(0) - 1;
  attention.positions_q = ints(t.positions_q);
  attention.positions_k = ints(t.positions_k);
  attention.seqused_k = ints(t.seqused_k);
  attention.dtype = dtype_of(t.q);
  attention.q = heads_of(t.q);
  attention.k = heads_of(t.k);
  attention.v = heads_of(t.v);
  const double factor = scale.value_or(1.0 / std::sqrt(static_cast<double>(t.q.size(2))));
  const int64_t reach = t.bias_table ? t.bias_table->size(1) / 2 : 0;
  attention.rule = {static_cast<float>(factor), static_cast<float>(softcap), causal, window_left, window_right, reach};
  attention.rotation = {floats(t.rope_cos), floats(t.rope_sin), t.rope_cos ? t.rope_cos->size(1) : 0};
  attention.bias_table = floats(t.bias_table);
  return attention;
}

}  // namespace

std::tuple<Tensor, Tensor> varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k,
                                            int64_t max_seqlen_q, int64_t max_seqlen_k, EK_ATTENTION_OPTIONS) {
  AttentionTensors tensors{q,          k,        v,        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                           bias_table, rope_cos, rope_sin, positions_q,  positions_k,  seqused_k};
  const Attention attention =
      checked_attention("varlen_attention", tensors, scale, causal, window_left, window_right, softcap);
  Tensor out = torch::stable::empty({q.size(0), q.size(1), v.size(2)}, q.scalar_type());
  Tensor lse = torch::stable::empty({q.size(1), q.size(0)}, ScalarType::Float);
  attention_forward(attention_loops(), attention, {out.mutable_data_ptr(), static_cast<float*>(lse.mutable_data_ptr())},
                    torch_threads(), TorchParallelFor());
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> varlen_attention_backward(Tensor grad_out, std::optional<Tensor> grad_lse,
                                                                     Tensor out, Tensor lse, Tensor q, Tensor k,
                                                                     Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k,
                                                                     int64_t max_seqlen_q, int64_t max_seqlen_k,
                                                                     EK_ATTENTION_OPTIONS) {
  const char* const op = "varlen_attention_backward";
  AttentionTensors tensors{q,          k,        v,        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                           bias_table, rope_cos, rope_sin, positions_q,  positions_k,  seqused_k};
  const Attention attention = checked_attention(op, tensors, scale, causal, window_left, window_right, softcap);
  check_attention_gradients(op, grad_out, grad_lse, out, lse, q, v);

  Tensor grad_q = torch::stable::empty({q.size(0), q.size(1), q.size(2)}, q.scalar_type());
  Tensor grad_k = torch::stable::empty({k.size(0), k.size(1), k.size(2)}, k.scalar_type());
  Tensor grad_v = torch::stable::empty({v.size(0), v.size(1), v.size(2)}, v.scalar_type());
  const int64_t heads = bias_table ? bias_table->size(0) : 0, entries = bias_table ? bias_table->size(1) : 0;
  Tensor grad_bias = torch::stable::empty({heads, entries}, ScalarType::Float);
  std::optional<Tensor> saved_lse = lse;
  const AttentionGradient gradient = {
      heads_of(grad_out),        heads_of(out),
      floats(saved_lse),         floats(grad_lse),
      grad_q.mutable_data_ptr(), grad_k.mutable_data_ptr(),
      grad_v.mutable_data_ptr(), bias_table ? static_cast<float*>(grad_bias.mutable_data_ptr()) : nullptr};
  attention_backward(attention_backward_loops(), attention, gradient, torch_threads(), TorchParallelFor());
  return {grad_q, grad_k, grad_v, grad_bias};
}

}  // namespace embedding_kernels::cpu

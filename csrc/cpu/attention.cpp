// Checks and dispatch of the attention family on torch tensors.
#include "attention.h"

#include <cmath>
#include <cstdio>

#include "../checks.h"
#include "../kernels.h"
#include "attention_driver.h"
#include "torch_support.h"

namespace embedding_kernels::cpu {
namespace {

const char* const kQueries =
    "a float32, bfloat16 or float16 tensor [Tq, Hq, Dh] (float64 runs with backend=\"reference\")";
const char* const kOffsets = "an int32 tensor [sequences + 1]";
constexpr int64_t kLeastHeadDim = 16, kHeadDimStep = 8;

// The arguments of varlen_attention, made dense where they were not.
struct AttentionTensors {
  Tensor q, k, v, offsets_q, offsets_k;
  int64_t max_seqlen_q, max_seqlen_k;
  std::optional<Tensor> bias_table, rope_cos, rope_sin, positions_q, positions_k, seqused_k;
};

void check_head_dim(const char* op, const char* argument, const Tensor& tensor) {
  const int64_t dim = tensor.size(2);
  if (dim < kLeastHeadDim || dim > kMostHeadDim || dim % kHeadDimStep != 0) {
    refuse(op, argument,
           "with heads of a multiple of " + std::to_string(kHeadDimStep) + " from " + std::to_string(kLeastHeadDim) +
               " to " + std::to_string(kMostHeadDim) + " dimensions",
           describe(tensor));
  }
}

void check_inputs(const char* op, const Tensor& q, const Tensor& k, const Tensor& v) {
  check_tensor(op, "q", q, kQueries, kFloats, 3);
  const std::string name = dtype_name(q.scalar_type());
  check_tensor(op, "k", k, ("a " + name + " tensor [Tk, Hkv, Dh], as q").c_str(), {q.scalar_type()}, 3);
  check_tensor(op, "v", v, ("a " + name + " tensor [Tk, Hkv, Dv], as q").c_str(), {q.scalar_type()}, 3);
  check_size(op, "k", k, 2, q.size(2), "the heads' dimensions in q");
  check_size(op, "v", v, 0, k.size(0), "the rows of k");
  check_size(op, "v", v, 1, k.size(1), "the heads of k");
  check_head_dim(op, "q", q);
  check_head_dim(op, "v", v);
  if (q.size(1) < 1 || k.size(1) < 1 || q.size(1) % k.size(1) != 0) {
    refuse(op, "k", "with a number of heads that divides the " + std::to_string(q.size(1)) + " of q", describe(k));
  }
}

void check_offset_tensors(const char* op, const AttentionTensors& tensors) {
  for (const auto& [name, offsets] : {std::pair<const char*, const Tensor&>{"cu_seqlens_q", tensors.offsets_q},
                                      {"cu_seqlens_k", tensors.offsets_k}}) {
    check_tensor(op, name, offsets, kOffsets, {ScalarType::Int}, 1);
    if (offsets.size(0) == 0) refuse(op, name, kOffsets, describe(offsets));
  }
  check_size(op, "cu_seqlens_k", tensors.offsets_k, 0, tensors.offsets_q.size(0), "as cu_seqlens_q");
}

void check_bias(const char* op, const Tensor& table, const Tensor& q) {
  check_tensor(op, "bias_table", table, "a float32 tensor [Hq, 2R + 1]", {ScalarType::Float}, 2);
  check_size(op, "bias_table", table, 0, q.size(1), "the heads of q");
  if (table.size(1) % 2 == 0) refuse(op, "bias_table", "of odd size in dimension 1 (2R + 1)", describe(table));
}

void check_rope(const char* op, const AttentionTensors& tensors) {
  if (!tensors.rope_cos && !tensors.rope_sin) return;
  if (!tensors.rope_cos || !tensors.rope_sin) {
    refuse(op, tensors.rope_cos ? "rope_sin" : "rope_cos", "given with the other table of the rotation", "None");
  }
  check_tensor(op, "rope_cos", *tensors.rope_cos, "a float32 tensor [P, Dr / 2]", {ScalarType::Float}, 2);
  check_tensor(op, "rope_sin", *tensors.rope_sin, "a float32 tensor [P, Dr / 2]", {ScalarType::Float}, 2);
  check_size(op, "rope_sin", *tensors.rope_sin, 0, tensors.rope_cos->size(0), "as rope_cos");
  check_size(op, "rope_sin", *tensors.rope_sin, 1, tensors.rope_cos->size(1), "as rope_cos");
  check_range(op, "the last size of rope_cos", tensors.rope_cos->size(1), 1, tensors.q.size(2) / 2);
}

void check_devices(const char* op, const AttentionTensors& t) {
  check_same_device(op, "q", t.q, "k", t.k);
  check_same_device(op, "q", t.q, "v", t.v);
  check_same_device(op, "q", t.q, "cu_seqlens_q", t.offsets_q);
  check_same_device(op, "q", t.q, "cu_seqlens_k", t.offsets_k);
  for (const auto& [name, tensor] : {std::pair<const char*, const std::optional<Tensor>&>{"bias_table", t.bias_table},
                                     {"rope_cos", t.rope_cos},
                                     {"rope_sin", t.rope_sin},
                                     {"positions_q", t.positions_q},
                                     {"positions_k", t.positions_k},
                                     {"seqused_k", t.seqused_k}}) {
    if (tensor) check_same_device(op, "q", t.q, name, *tensor);
  }
}

const int32_t* ints(Tensor& tensor) {
  tensor = torch::stable::contiguous(tensor);
  return static_cast<const int32_t*>(tensor.const_data_ptr());
}

// Values from 0, and less than `limit` where it is not negative.
const int32_t* checked_positions(const char* op, const char* argument, std::optional<Tensor>& tensor,
                                 const Tensor& rows, int64_t limit) {
  if (!tensor) return nullptr;
  const std::string side(1, std::string_view(argument).back());
  check_tensor(op, argument, *tensor, ("an int32 tensor [T" + side + "]").c_str(), {ScalarType::Int}, 1);
  check_size(op, argument, *tensor, 0, rows.size(0), ("one for each row of " + side).c_str());
  const int32_t* const values = ints(*tensor);
  const int64_t count = rows.size(0);
  if (count == 0) return values;
  const auto [lowest, highest] = std::minmax_element(values, values + count);
  if (*lowest < 0) refuse(op, argument, "at least 0 everywhere", std::to_string(*lowest));
  if (limit >= 0 && *highest >= limit) {
    refuse(op, argument, "less than " + std::to_string(limit) + " everywhere (the rows of rope_cos)",
           std::to_string(*highest));
  }
  return values;
}

void check_lengths(const char* op, const std::string& side, const int32_t* offsets, int64_t sequences, int64_t most,
                   bool positions, int64_t limit) {
  check_at_least(op, ("max_seqlen_" + side).c_str(), most, 0);
  int64_t longest = 0;
  for (int64_t s = 0; s < sequences; ++s) longest = std::max<int64_t>(longest, offsets[s + 1] - offsets[s]);
  if (longest > most) {
    refuse(op, "max_seqlen_" + side, "at least " + std::to_string(longest) + " (the longest sequence)",
           std::to_string(most));
  }
  if (limit >= 0 && !positions && longest > limit) {
    refuse(op, "rope_cos", "of at least " + std::to_string(longest) + " rows (the longest sequence)",
           std::to_string(limit) + " rows");
  }
}

const int32_t* checked_seqused(const char* op, std::optional<Tensor>& tensor, const int32_t* offsets,
                               int64_t sequences) {
  if (!tensor) return nullptr;
  check_tensor(op, "seqused_k", *tensor, "an int32 tensor [sequences]", {ScalarType::Int}, 1);
  check_size(op, "seqused_k", *tensor, 0, sequences, "the number of sequences");
  const int32_t* const values = ints(*tensor);
  for (int64_t s = 0; s < sequences; ++s) {
    const int32_t length = offsets[s + 1] - offsets[s];
    if (values[s] < 0 || values[s] > length) {
      refuse(op, "seqused_k", "from 0 to " + std::to_string(length) + " in place " + std::to_string(s),
             std::to_string(values[s]));
    }
  }
  return values;
}

const float* floats(std::optional<Tensor>& tensor) {
  if (!tensor) return nullptr;
  tensor = torch::stable::contiguous(*tensor);
  return static_cast<const float*>(tensor->const_data_ptr());
}

Heads heads_of(Tensor& tensor) {
  tensor = dense_rows(tensor);
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.size(1), tensor.size(2)};
}

// Checks everything, in the order of ops/attention.py.
Attention checked_attention(const char* op, AttentionTensors& t, std::optional<double> scale, bool causal,
                            int64_t window_left, int64_t window_right, double softcap) {
  check_inputs(op, t.q, t.k, t.v);
  check_offset_tensors(op, t);
  check_at_least(op, "window_left", window_left, -1);
  check_at_least(op, "window_right", window_right, -1);
  if (!(softcap >= 0 && std::isfinite(softcap))) {
    char text[32];
    std::snprintf(text, sizeof(text), "%g", softcap);
    refuse(op, "softcap", "a finite number of at least 0", text);
  }
  if (t.bias_table) check_bias(op, *t.bias_table, t.q);
  check_rope(op, t);
  check_devices(op, t);

  Attention attention;
  attention.offsets_q = ints(t.offsets_q);
  attention.offsets_k = ints(t.offsets_k);
  attention.sequences = t.offsets_q.size(0) - 1;
  check_offsets(op, "cu_seqlens_q", attention.offsets_q, t.offsets_q.size(0), t.q.size(0));
  check_offsets(op, "cu_seqlens_k", attention.offsets_k, t.offsets_k.size(0), t.k.size(0));
  const int64_t limit = t.rope_cos ? t.rope_cos->size(0) : -1;
  attention.positions_q = checked_positions(op, "positions_q", t.positions_q, t.q, limit);
  attention.positions_k = checked_positions(op, "positions_k", t.positions_k, t.k, limit);
  check_lengths(op, "q", attention.offsets_q, attention.sequences, t.max_seqlen_q, t.positions_q.has_value(), limit);
  check_lengths(op, "k", attention.offsets_k, attention.sequences, t.max_seqlen_k, t.positions_k.has_value(), limit);
  attention.seqused_k = checked_seqused(op, t.seqused_k, attention.offsets_k, attention.sequences);

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

void check_lse(const char* op, const char* argument, const Tensor& lse, const Tensor& out, const std::string& rows) {
  check_tensor(op, argument, lse, "a float32 tensor [H, T]", {ScalarType::Float}, 2);
  check_size(op, argument, lse, 0, out.size(1), ("the heads of " + rows).c_str());
  check_size(op, argument, lse, 1, out.size(0), ("the rows of " + rows).c_str());
}

void check_like(const char* op, const char* argument, const Tensor& tensor, const Tensor& like,
                const std::string& name) {
  const std::string expected = "a " + dtype_name(like.scalar_type()) + " tensor like " + name;
  check_tensor(op, argument, tensor, expected.c_str(), {like.scalar_type()}, like.dim());
  for (int64_t d = 0; d < like.dim(); ++d) check_size(op, argument, tensor, d, like.size(d), ("as " + name).c_str());
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
  const std::string expected = "a " + dtype_name(q.scalar_type()) + " tensor [Tq, Hq, Dv]";
  check_tensor(op, "out", out, expected.c_str(), {q.scalar_type()}, 3);
  const int64_t sizes[] = {q.size(0), q.size(1), v.size(2)};
  for (int64_t d = 0; d < 3; ++d) check_size(op, "out", out, d, sizes[d], "as varlen_attention gives it");
  check_like(op, "grad_out", grad_out, out, "out");
  check_lse(op, "lse", lse, out, "out");
  if (grad_lse) check_lse(op, "grad_lse", *grad_lse, out, "out");
  check_same_device(op, "q", q, "out", out);
  check_same_device(op, "q", q, "grad_out", grad_out);
  check_same_device(op, "q", q, "lse", lse);
  if (grad_lse) check_same_device(op, "q", q, "grad_lse", *grad_lse);

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

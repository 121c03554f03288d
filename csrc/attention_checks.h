// Refusals of the attention family, in the order and the words of ops/attention.py; for the C++ and the CUDA kernels.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <optional>
#include <string>
#include <utility>

#include "checks.h"

namespace embedding_kernels {

inline constexpr const char* kAttentionQueries =
    "a float32, bfloat16 or float16 tensor [Tq, Hq, Dh] (float64 runs with backend=\"reference\")";
inline constexpr const char* kAttentionOffsets = "an int32 tensor [sequences + 1]";
inline constexpr const char* kPartialOutput =
    "a float32, bfloat16 or float16 tensor [T, H, D] (float64 runs with backend=\"reference\")";

// The arguments of varlen_attention.
struct AttentionTensors {
  Tensor q, k, v, offsets_q, offsets_k;
  int64_t max_seqlen_q, max_seqlen_k;
  std::optional<Tensor> bias_table, rope_cos, rope_sin, positions_q, positions_k, seqused_k;
};

inline void check_head_dim(const char* op, const char* argument, const Tensor& tensor) {
  const int64_t dim = tensor.size(2), step = 8, least = 16, most = 256;
  if (dim < least || dim > most || dim % step != 0) {
    refuse(op, argument,
           "with heads of a multiple of " + std::to_string(step) + " from " + std::to_string(least) + " to " +
               std::to_string(most) + " dimensions",
           describe(tensor));
  }
}

inline void check_attention_inputs(const char* op, const Tensor& q, const Tensor& k, const Tensor& v) {
  check_tensor(op, "q", q, kAttentionQueries, kFloats, 3);
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

inline void check_attention_offsets(const char* op, const AttentionTensors& tensors) {
  for (const auto& [name, offsets] : {std::pair<const char*, const Tensor&>{"cu_seqlens_q", tensors.offsets_q},
                                      {"cu_seqlens_k", tensors.offsets_k}}) {
    check_tensor(op, name, offsets, kAttentionOffsets, {ScalarType::Int}, 1);
    if (offsets.size(0) == 0) refuse(op, name, kAttentionOffsets, describe(offsets));
  }
  check_size(op, "cu_seqlens_k", tensors.offsets_k, 0, tensors.offsets_q.size(0), "as cu_seqlens_q");
}

inline void check_bias_table(const char* op, const Tensor& table, const Tensor& q) {
  check_tensor(op, "bias_table", table, "a float32 tensor [Hq, 2R + 1]", {ScalarType::Float}, 2);
  check_size(op, "bias_table", table, 0, q.size(1), "the heads of q");
  if (table.size(1) % 2 == 0) refuse(op, "bias_table", "of odd size in dimension 1 (2R + 1)", describe(table));
}

inline void check_rope(const char* op, const AttentionTensors& tensors) {
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

inline void check_attention_devices(const char* op, const AttentionTensors& t) {
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

// Values from 0, and less than `limit` where it is not negative; `values_of(tensor)` may give null, and they are not
// looked at.
template <class ValuesOf>
void check_positions(const char* op, const char* argument, std::optional<Tensor>& tensor, const Tensor& rows,
                     int64_t limit, const ValuesOf& values_of) {
  if (!tensor) return;
  const std::string side(1, argument[std::string(argument).size() - 1]);
  check_tensor(op, argument, *tensor, ("an int32 tensor [T" + side + "]").c_str(), {ScalarType::Int}, 1);
  check_size(op, argument, *tensor, 0, rows.size(0), ("one for each row of " + side).c_str());
  const int32_t* const values = values_of(*tensor);
  const int64_t count = rows.size(0);
  if (values == nullptr || count == 0) return;
  const auto [lowest, highest] = std::minmax_element(values, values + count);
  if (*lowest < 0) refuse(op, argument, "at least 0 everywhere", std::to_string(*lowest));
  if (limit >= 0 && *highest >= limit) {
    refuse(op, argument, "less than " + std::to_string(limit) + " everywhere (the rows of rope_cos)",
           std::to_string(*highest));
  }
}

inline void check_lengths(const char* op, const std::string& side, const int32_t* offsets, int64_t sequences,
                          int64_t most, bool positions, int64_t limit) {
  check_at_least(op, ("max_seqlen_" + side).c_str(), most, 0);
  if (offsets == nullptr) return;
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

template <class ValuesOf>
void check_seqused(const char* op, std::optional<Tensor>& tensor, const int32_t* offsets, int64_t sequences,
                   const ValuesOf& values_of) {
  if (!tensor) return;
  check_tensor(op, "seqused_k", *tensor, "an int32 tensor [sequences]", {ScalarType::Int}, 1);
  check_size(op, "seqused_k", *tensor, 0, sequences, "the number of sequences");
  const int32_t* const values = values_of(*tensor);
  if (values == nullptr) return;
  for (int64_t s = 0; s < sequences; ++s) {
    const int32_t length = offsets[s + 1] - offsets[s];
    if (values[s] < 0 || values[s] > length) {
      refuse(op, "seqused_k", "from 0 to " + std::to_string(length) + " in place " + std::to_string(s),
             std::to_string(values[s]));
    }
  }
}

// Everything that varlen_attention asks of its arguments. `values_of(tensor)` makes an int32 tensor dense and gives its
// values on the host: for all tensors, or null for all of them.
template <class ValuesOf>
void check_attention(const char* op, AttentionTensors& t, int64_t window_left, int64_t window_right, double softcap,
                     const ValuesOf& values_of) {
  check_attention_inputs(op, t.q, t.k, t.v);
  check_attention_offsets(op, t);
  check_at_least(op, "window_left", window_left, -1);
  check_at_least(op, "window_right", window_right, -1);
  if (!(softcap >= 0 && std::isfinite(softcap))) {
    char text[32];
    std::snprintf(text, sizeof(text), "%g", softcap);
    refuse(op, "softcap", "a finite number of at least 0", text);
  }
  if (t.bias_table) check_bias_table(op, *t.bias_table, t.q);
  check_rope(op, t);
  check_attention_devices(op, t);
  const int32_t *const offsets_q = values_of(t.offsets_q), *const offsets_k = values_of(t.offsets_k);
  const int64_t count = t.offsets_q.size(0);
  if (offsets_q != nullptr) {
    check_offsets(op, "cu_seqlens_q", offsets_q, count, t.q.size(0));
    check_offsets(op, "cu_seqlens_k", offsets_k, count, t.k.size(0));
  }
  const int64_t limit = t.rope_cos ? t.rope_cos->size(0) : -1;
  check_positions(op, "positions_q", t.positions_q, t.q, limit, values_of);
  check_positions(op, "positions_k", t.positions_k, t.k, limit, values_of);
  check_lengths(op, "q", offsets_q, count - 1, t.max_seqlen_q, t.positions_q.has_value(), limit);
  check_lengths(op, "k", offsets_k, count - 1, t.max_seqlen_k, t.positions_k.has_value(), limit);
  check_seqused(op, t.seqused_k, offsets_k, count - 1, values_of);
}

inline void check_lse(const char* op, const char* argument, const Tensor& lse, const Tensor& out,
                      const std::string& rows) {
  check_tensor(op, argument, lse, "a float32 tensor [H, T]", {ScalarType::Float}, 2);
  check_size(op, argument, lse, 0, out.size(1), ("the heads of " + rows).c_str());
  check_size(op, argument, lse, 1, out.size(0), ("the rows of " + rows).c_str());
}

inline void check_like(const char* op, const char* argument, const Tensor& tensor, const Tensor& like,
                       const std::string& name) {
  const std::string expected = "a " + dtype_name(like.scalar_type()) + " tensor like " + name;
  check_tensor(op, argument, tensor, expected.c_str(), {like.scalar_type()}, like.dim());
  for (int64_t d = 0; d < like.dim(); ++d) check_size(op, argument, tensor, d, like.size(d), ("as " + name).c_str());
}

// What varlen_attention_backward asks beyond that.
inline void check_attention_gradients(const char* op, const Tensor& grad_out, const std::optional<Tensor>& grad_lse,
                                      const Tensor& out, const Tensor& lse, const Tensor& q, const Tensor& v) {
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
}

inline void check_partial_results(const char* op, const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b,
                                  const Tensor& lse_b) {
  check_tensor(op, "out_a", out_a, kPartialOutput, kFloats, 3);
  check_like(op, "out_b", out_b, out_a, "out_a");
  check_lse(op, "lse_a", lse_a, out_a, "out_a");
  check_lse(op, "lse_b", lse_b, out_a, "out_a");
  check_same_device(op, "out_a", out_a, "lse_a", lse_a);
  check_same_device(op, "out_a", out_a, "out_b", out_b);
  check_same_device(op, "out_a", out_a, "lse_b", lse_b);
}

inline void check_partial_gradients(const char* op, const Tensor& grad_out, const std::optional<Tensor>& grad_lse,
                                    const Tensor& out_a) {
  check_like(op, "grad_out", grad_out, out_a, "out_a");
  if (grad_lse) check_lse(op, "grad_lse", *grad_lse, out_a, "out_a");
  check_same_device(op, "out_a", out_a, "grad_out", grad_out);
  if (grad_lse) check_same_device(op, "out_a", out_a, "grad_lse", *grad_lse);
}

}  // namespace embedding_kernels

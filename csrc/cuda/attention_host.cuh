// From the arguments of varlen_attention and its gradient to what their kernels take.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "../attention_checks.h"
#include "attention_rotation.cuh"

namespace embedding_kernels::cuda {

// Rows that may be copied 16 bytes at a time, by the copy engine too: any strides of a multiple of eight values, not 0
// of several rows or heads; others are copied.
inline Tensor wide_rows(const Tensor& tensor) {
  Tensor rows = dense_rows(tensor);
  for (int d = 0; d < 2; ++d) {
    if (rows.stride(d) % 8 != 0 || (rows.stride(d) == 0 && rows.size(d) > 1)) rows = torch::stable::contiguous(rows);
  }
  // contiguous, and yet not from a multiple of 16 bytes on
  if (reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 != 0) rows = torch::stable::clone(rows);
  return rows;
}

template <class T>
HeadRows<T> head_rows(const Tensor& rows) {
  return {pointer<T>(rows), rows.stride(0), rows.stride(1), static_cast<int32_t>(rows.size(2))};
}

// A call's arguments, checked, dense and as the kernels take them. The tensors own what `rule` and `rotation` point to.
struct AttentionCall {
  AttentionTensors tensors;
  DeviceGuard guard;
  AttentionRule rule{};
  Rotation rotation{};
  double scale = 0;

  AttentionCall(const char* op, AttentionTensors arguments, std::optional<double> scale_, bool causal,
                int64_t window_left, int64_t window_right, double softcap)
      : tensors(checked(op, std::move(arguments), window_left, window_right, softcap)),
        guard(tensors.q.get_device_index()) {
    AttentionTensors& t = tensors;
    for (Tensor* const rows : {&t.q, &t.k, &t.v}) *rows = wide_rows(*rows);
    for (std::optional<Tensor>* const table : {&t.bias_table, &t.rope_cos, &t.rope_sin}) {
      if (*table) *table = torch::stable::contiguous(**table);
    }
    rule.queries = side_of(t.offsets_q, t.positions_q, t.q);
    rule.keys = side_of(t.offsets_k, t.positions_k, t.k);
    rule.seqused_k = pointer_or_null<int32_t>(t.seqused_k);
    rule.sequences = static_cast<int32_t>(t.offsets_q.size(0) - 1);
    rule.before = limit_of(window_left);
    rule.after = causal ? 0 : limit_of(window_right);
    rule.group = static_cast<int32_t>(t.q.size(1) / t.k.size(1));
    rule.table = pointer_or_null<float>(t.bias_table);
    rule.reach = t.bias_table ? static_cast<int32_t>(t.bias_table->size(1) / 2) : 0;
    scale = scale_.value_or(1.0 / std::sqrt(static_cast<double>(t.q.size(2))));
    rule.factor = static_cast<float>(softcap > 0 ? scale / softcap : scale * static_cast<double>(kLog2E));
    rule.cap = static_cast<float>(softcap * static_cast<double>(kLog2E));
    rule.formed = softcap > 0 || rule.table != nullptr || !(rule.factor > 0 && rule.factor < INFINITY);
    // without a row there is none for any position, and nothing is turned
    if (t.rope_cos && t.rope_cos->size(0) > 0) {
      const auto half = static_cast<int32_t>(t.rope_cos->size(1));
      rotation = {pointer<float>(*t.rope_cos), pointer<float>(*t.rope_sin),
                  static_cast<int32_t>(std::min<int64_t>(t.rope_cos->size(0), kNoLimit)), half, false};
      rotation.wide = half % 8 == 0 && reinterpret_cast<uintptr_t>(rotation.cosines) % 16 == 0 &&
                      reinterpret_cast<uintptr_t>(rotation.sines) % 16 == 0;
    }
  }

  // Whether any pair is possible; else nothing is launched.
  bool empty() const { return rule.sequences < 1 || rule.queries.total == 0 || rule.keys.total == 0; }

 private:
  static AttentionTensors checked(const char* op, AttentionTensors t, int64_t window_left, int64_t window_right,
                                  double softcap) {
    std::vector<std::vector<int32_t>> copies;
    copies.reserve(5);  // pointers into them must stay
    check_attention(op, t, window_left, window_right, softcap, [&](Tensor& tensor) -> const int32_t* {
      tensor = torch::stable::contiguous(tensor);
      if (!values_are_checked()) return nullptr;
      const DeviceGuard of_values(tensor.get_device_index());
      std::vector<int32_t>& values = copies.emplace_back(static_cast<size_t>(tensor.size(0)));
      copy_to_host(op, values.data(), pointer<int32_t>(tensor), values.size() * sizeof(int32_t),
                   current_stream(tensor));
      return values.data();
    });
    if (t.q.scalar_type() == ScalarType::Float) {
      refuse(op, "q", "a bfloat16 or float16 tensor in the CUDA C++ kernel (float32 runs with backend=\"triton\")",
             describe(t.q));
    }
    return t;
  }

  static AttentionSide side_of(const Tensor& offsets, const std::optional<Tensor>& positions, const Tensor& rows) {
    return {pointer<int32_t>(offsets), pointer_or_null<int32_t>(positions),
            static_cast<int32_t>(std::min<int64_t>(rows.size(0), kNoLimit))};
  }
  static int32_t limit_of(int64_t window) {
    return window < 0 ? kNoLimit : static_cast<int32_t>(std::min<int64_t>(window, kNoLimit));
  }
};

// Rows of q or k turned by their positions; in attention_rotation.cu. `back` turns float32 rows [total, heads, dim]
// back, rounded to the dtype of `like`.
Tensor rotated(const char* op, const AttentionCall& call, const Tensor& rows, const AttentionSide& side);
Tensor turned_back(const char* op, const AttentionCall& call, const Tensor& rows, const AttentionSide& side,
                   ScalarType dtype);

// Calls `body(T{})` with the element type of bfloat16 or float16 rows.
template <class Body>
void with_half_type(ScalarType dtype, const Body& body) {
  if (dtype == ScalarType::BFloat16) {
    body(BFloat16{});
  } else {
    body(Float16{});
  }
}

}  // namespace embedding_kernels::cuda

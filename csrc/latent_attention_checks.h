// Refusals of the latent attention family, in the same words on every device.
#pragma once

#include <optional>

#include "checks.h"

namespace embedding_kernels::latent_attention {

// Rows [T, groups * size] under the name `argument`.
inline void check_groups(const char* op, const char* argument, const Tensor& rows, int64_t groups) {
  check_tensor(op, argument, rows,
               "a float32, bfloat16 or float16 tensor [T, groups * size] (float64 runs with backend=\"reference\")",
               kFloats, 2);
  check_at_least(op, "groups", groups, 1);
  if (rows.size(1) % groups != 0) {
    refuse(op, "groups",
           std::string("a divisor of the width of ") + argument + " (" + std::to_string(rows.size(1)) + ")",
           std::to_string(groups));
  }
}

inline void check_softmax_backward(const char* op, const Tensor& grad, const Tensor& probabilities, int64_t groups) {
  check_groups(op, "probabilities", probabilities, groups);
  const std::string expected =
      "a " + dtype_name(probabilities.scalar_type()) + " tensor [T, groups * size], as probabilities";
  check_tensor(op, "grad", grad, expected.c_str(), {probabilities.scalar_type()}, 2);
  check_size(op, "grad", grad, 0, probabilities.size(0), "the rows of probabilities");
  check_size(op, "grad", grad, 1, probabilities.size(1), "the width of probabilities");
  check_same_device(op, "probabilities", probabilities, "grad", grad);
}

// What geglu_segment_pool and its gradient share, but for the values of the offsets.
inline void check_gated(const char* op, const Tensor& hidden, const std::optional<Tensor>& bias, const Tensor& offsets,
                        const std::optional<Tensor>& weights) {
  const char* const expected_offsets = "an int32 tensor [sequences + 1]";
  check_tensor(op, "hidden", hidden,
               "a float32, bfloat16 or float16 tensor [T, 2 F] (float64 runs with backend=\"reference\")", kFloats, 2);
  if (hidden.size(1) % 2 != 0) refuse(op, "hidden", "of even width (value and gate)", describe(hidden));
  if (bias) {
    const std::string expected = "a float32 tensor [2 F], or " + dtype_name(hidden.scalar_type()) + " as hidden";
    check_tensor(op, "bias", *bias, expected.c_str(), {ScalarType::Float, hidden.scalar_type()}, 1);
    check_size(op, "bias", *bias, 0, hidden.size(1), "the width of hidden");
  }
  check_tensor(op, "cu_seqlens", offsets, expected_offsets, {ScalarType::Int}, 1);
  if (offsets.size(0) == 0) refuse(op, "cu_seqlens", expected_offsets, describe(offsets));
  if (weights) {
    check_tensor(op, "weights", *weights, "a float32 tensor [T]", {ScalarType::Float}, 1);
    check_size(op, "weights", *weights, 0, hidden.size(0), "one for each row of hidden");
  }
  if (bias) check_same_device(op, "hidden", hidden, "bias", *bias);
  check_same_device(op, "hidden", hidden, "cu_seqlens", offsets);
  if (weights) check_same_device(op, "hidden", hidden, "weights", *weights);
}

inline ScalarType checked_out_dtype(const char* op, const Tensor& hidden, std::optional<ScalarType> out_dtype) {
  const ScalarType dtype = out_dtype.value_or(hidden.scalar_type());
  if (!is_float(dtype)) refuse(op, "out_dtype", "float32, bfloat16 or float16", dtype_name(dtype));
  return dtype;
}

inline void check_pooled_grad(const char* op, const Tensor& grad, const Tensor& hidden, int64_t sequences) {
  check_tensor(op, "grad", grad, "a float32, bfloat16 or float16 tensor [S, F]", kFloats, 2);
  check_size(op, "grad", grad, 0, sequences, "the number of sequences");
  check_size(op, "grad", grad, 1, hidden.size(1) / 2, "half the width of hidden");
  check_same_device(op, "hidden", hidden, "grad", grad);
}

}  // namespace embedding_kernels::latent_attention

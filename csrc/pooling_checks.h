// Refusals of the pooling family, in the order and the words of ops/pooling.py; for the C++ and the CUDA kernels.
#pragma once

#include <array>
#include <optional>
#include <string>
#include <string_view>

#include "checks.h"
#include "pooling_mode.h"

namespace embedding_kernels {

inline constexpr const char* kPoolingRows =
    "a float32, bfloat16 or float16 tensor [T, D] (float64 runs with backend=\"reference\")";

// in the order of PoolingMode
inline constexpr std::array<std::string_view, 7> kPoolingModes = {"mean",  "weighted_mean", "mean_sqrt_len", "max",
                                                                  "first", "first_m",       "last"};

inline PoolingMode checked_mode(const char* op, const std::string& name) {
  std::string names;
  for (size_t i = 0; i < kPoolingModes.size(); ++i) {
    if (kPoolingModes[i] == name) return static_cast<PoolingMode>(i);
    names += (i ? ", " : "") + std::string(kPoolingModes[i]);
  }
  refuse(op, "mode", "one of " + names, "'" + name + "'");
}

// What forward and backward share, but for the values of the offsets; `total` rows of `dim`. `first` names the argument
// whose device is the call's.
inline PoolingMode check_pooling(const char* op, const char* first, const Tensor& device, const Tensor& offsets,
                                 int64_t total, int64_t dim, const std::string& mode_name, int64_t m,
                                 const std::optional<Tensor>& weights, std::optional<int64_t> truncate_dim) {
  const char* const expected = "an int32 tensor [sequences + 1]";
  check_tensor(op, "cu_seqlens", offsets, expected, {ScalarType::Int}, 1);
  if (offsets.size(0) == 0) refuse(op, "cu_seqlens", expected, describe(offsets));
  const PoolingMode mode = checked_mode(op, mode_name);
  if (mode == PoolingMode::first_m) {
    check_at_least(op, "m", m, 1);
  } else {
    check_range(op, "m", m, 1, 1);
  }
  if (weights) {
    if (!sums_rows(mode)) refuse(op, "weights", "None in mode " + mode_name, describe(*weights));
    check_tensor(op, "weights", *weights, "a float32 tensor [T]", {ScalarType::Float}, 1);
    check_size(op, "weights", *weights, 0, total, "one for each row of hidden");
  }
  if (truncate_dim) check_range(op, "truncate_dim", *truncate_dim, 1, dim);
  check_same_device(op, first, device, "cu_seqlens", offsets);
  if (weights) check_same_device(op, first, device, "weights", *weights);
  return mode;
}

inline ScalarType checked_out_dtype(const char* op, const Tensor& hidden, std::optional<ScalarType> out_dtype) {
  const ScalarType dtype = out_dtype.value_or(hidden.scalar_type());
  if (!is_float(dtype)) refuse(op, "out_dtype", "float32, bfloat16 or float16", dtype_name(dtype));
  return dtype;
}

// Before `check_pooling`, and after it and the values of the offsets.
inline void check_pooling_gradient(const char* op, const Tensor& grad, const std::optional<Tensor>& hidden,
                                   int64_t total, int64_t dim, ScalarType dtype, const std::string& mode) {
  const bool several = mode == "first_m";
  check_tensor(
      op, "grad", grad,
      several ? "a float32, bfloat16 or float16 tensor [S, m, D]" : "a float32, bfloat16 or float16 tensor [S, D]",
      kFloats, several ? 3 : 2);
  if (!is_float(dtype)) refuse(op, "dtype", "float32, bfloat16 or float16", dtype_name(dtype));
  check_at_least(op, "total_tokens", total, 0);
  if (!hidden) return;
  check_tensor(op, "hidden", *hidden, kPoolingRows, kFloats, 2);
  check_size(op, "hidden", *hidden, 0, total, "total_tokens");
  check_size(op, "hidden", *hidden, 1, dim, "dim");
  check_same_device(op, "grad", grad, "hidden", *hidden);
}
inline void check_pooled_gradient(const char* op, const Tensor& grad, bool reads_hidden, int64_t sequences, int64_t m,
                                  int64_t dim, PoolingMode mode, bool normalize) {
  check_size(op, "grad", grad, 0, sequences, "the number of sequences");
  if (grad.dim() == 3) check_size(op, "grad", grad, 1, m, "m");
  check_range(op, "the last size of grad", grad.size(grad.dim() - 1), 0, dim);
  if (!reads_hidden && (mode == PoolingMode::max || normalize)) {
    refuse(op, "hidden", "given for mode max and for normalize", "None");
  }
}

// ---- padded and packed layout ----

inline void check_mask(const char* op, const Tensor& mask) {
  check_tensor(op, "mask", mask, "a bool, uint8, int32 or int64 tensor [B, S]",
               {ScalarType::Bool, ScalarType::Byte, ScalarType::Int, ScalarType::Long}, 2);
}

inline void check_pack_padded(const char* op, const Tensor& padded, const Tensor& mask, int64_t total) {
  if (padded.dim() < 2) refuse(op, "padded", "a tensor [B, S, ...]", describe(padded));
  check_mask(op, mask);
  check_size(op, "mask", mask, 0, padded.size(0), "the batch of padded");
  check_size(op, "mask", mask, 1, padded.size(1), "the length of padded");
  check_at_least(op, "total_tokens", total, 0);
  check_same_device(op, "padded", padded, "mask", mask);
}

inline void check_unpack_padded(const char* op, const Tensor& packed, const Tensor& mask) {
  if (packed.dim() < 1) refuse(op, "packed", "a tensor [T, ...]", describe(packed));
  check_mask(op, mask);
  check_same_device(op, "packed", packed, "mask", mask);
}

// `kept`: entries of the mask that are not 0.
inline void check_kept(const char* op, const char* argument, int64_t value, int64_t kept) {
  if (value != kept) {
    refuse(op, argument, std::to_string(kept) + " (the mask entries that are not 0)", std::to_string(value));
  }
}

}  // namespace embedding_kernels

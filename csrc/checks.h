// Refusals of bad input across the stable ABI: op, argument, expected, got, in the words of ops/_checks.py.
// std::invalid_argument reaches Python as a ValueError with exactly this text; check before any parallel region, which
// loses it.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <stdexcept>
#include <string>

namespace embedding_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(dtype);
  }
}

inline std::string describe(const Tensor& tensor) {
  std::string text = dtype_name(tensor.scalar_type()) + " [";
  for (int64_t d = 0; d < tensor.dim(); ++d) text += (d ? ", " : "") + std::to_string(tensor.size(d));
  return text + "]";
}

[[noreturn]] inline void refuse(const char* op, const std::string& argument, const std::string& expected,
                                const std::string& got) {
  throw std::invalid_argument(std::string(op) + ": " + argument + " must be " + expected + ", got " + got);
}

inline bool is_float(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

// `expected` is the whole phrase of the message; no dtypes means any.
inline void check_tensor(const char* op, const char* argument, const Tensor& tensor, const char* expected,
                         std::initializer_list<ScalarType> dtypes, int64_t rank) {
  bool fits = dtypes.size() == 0;
  for (ScalarType dtype : dtypes) fits = fits || tensor.scalar_type() == dtype;
  if (!fits || tensor.dim() != rank) refuse(op, argument, expected, describe(tensor));
}

constexpr std::initializer_list<ScalarType> kFloats = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};

inline void check_size(const char* op, const char* argument, const Tensor& tensor, int64_t dim, int64_t size,
                       const char* meaning) {
  if (tensor.size(dim) != size) {
    refuse(op, argument,
           "of size " + std::to_string(size) + " in dimension " + std::to_string(dim) + " (" + meaning + ")",
           describe(tensor));
  }
}

inline std::string device_name(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  return (tensor.is_cuda() ? "cuda:" : "another device, index ") + std::to_string(tensor.get_device_index());
}

inline void check_same_device(const char* op, const char* first, const Tensor& first_tensor, const char* argument,
                              const Tensor& tensor) {
  const bool same = tensor.is_cpu() == first_tensor.is_cpu() && tensor.is_cuda() == first_tensor.is_cuda() &&
                    tensor.get_device_index() == first_tensor.get_device_index();
  if (!same) {
    refuse(op, argument, std::string("on the device of ") + first + " (" + device_name(first_tensor) + ")",
           device_name(tensor));
  }
}

inline void check_at_least(const char* op, const char* argument, int64_t value, int64_t low) {
  if (value < low) refuse(op, argument, "at least " + std::to_string(low), std::to_string(value));
}

inline void check_range(const char* op, const char* argument, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) {
    refuse(op, argument, "from " + std::to_string(low) + " to " + std::to_string(high), std::to_string(value));
  }
}

// Values of cu_seqlens on the CPU: from 0, never falling, to `total`.
inline void check_offsets(const char* op, const char* argument, const int32_t* offsets, int64_t count, int64_t total) {
  if (offsets[0] != 0) refuse(op, argument, "0 in its first place", std::to_string(offsets[0]));
  for (int64_t i = 1; i < count; ++i) {
    if (offsets[i] < offsets[i - 1]) {
      refuse(
          op, argument, "non-decreasing",
          std::to_string(offsets[i]) + " after " + std::to_string(offsets[i - 1]) + " in place " + std::to_string(i));
    }
  }
  if (offsets[count - 1] != total) {
    refuse(op, argument, std::to_string(total) + " in its last place (the number of rows)",
           std::to_string(offsets[count - 1]));
  }
}

}  // namespace embedding_kernels

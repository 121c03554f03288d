// Refusals of the norm family, in the order and the words of ops/norm.py; for the C++ and the CUDA kernels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "checks.h"

namespace embedding_kernels {

inline constexpr const char* kNormRows =
    "a float32, bfloat16 or float16 tensor [T, D] (float64 runs with backend=\"reference\")";

inline void check_norm_rows(const char* op, const char* argument, const Tensor& tensor, const Tensor& rows,
                            const char* name) {
  const std::string expected = "a " + dtype_name(rows.scalar_type()) + " tensor [T, D], as " + name;
  check_tensor(op, argument, tensor, expected.c_str(), {rows.scalar_type()}, 2);
  check_size(op, argument, tensor, 0, rows.size(0), (std::string("the rows of ") + name).c_str());
  check_size(op, argument, tensor, 1, rows.size(1), (std::string("the width of ") + name).c_str());
  check_same_device(op, name, rows, argument, tensor);
}

inline void check_norm_vector(const char* op, const char* argument, const Tensor& tensor, const Tensor& rows,
                              const char* name) {
  const std::string expected = "a float32 tensor [D], or " + dtype_name(rows.scalar_type()) + " as " + name;
  check_tensor(op, argument, tensor, expected.c_str(), {ScalarType::Float, rows.scalar_type()}, 1);
  check_size(op, argument, tensor, 0, rows.size(1), (std::string("the width of ") + name).c_str());
  check_same_device(op, name, rows, argument, tensor);
}

inline void check_norm_eps(const char* op, double eps) {
  if (!(eps >= 0)) refuse(op, "eps", "at least 0", std::to_string(eps));
}

inline void check_norm(const char* op, const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight,
                       const std::optional<Tensor>& bias, double eps) {
  check_tensor(op, "x", x, kNormRows, kFloats, 2);
  if (residual) check_norm_rows(op, "residual", *residual, x, "x");
  check_norm_vector(op, "weight", weight, x, "x");
  if (bias) check_norm_vector(op, "bias", *bias, x, "x");
  check_norm_eps(op, eps);
}

inline void check_norm_backward(const char* op, const Tensor& grad_normed, const std::optional<Tensor>& grad_summed,
                                const Tensor& summed, const Tensor& weight, const std::optional<Tensor>& bias,
                                double eps) {
  check_tensor(op, "summed", summed, kNormRows, kFloats, 2);
  check_norm_rows(op, "grad_normed", grad_normed, summed, "summed");
  if (grad_summed) check_norm_rows(op, "grad_summed", *grad_summed, summed, "summed");
  check_norm_vector(op, "weight", weight, summed, "summed");
  if (bias) check_norm_vector(op, "bias", *bias, summed, "summed");
  check_norm_eps(op, eps);
}

// (source, target) of each copy of a row over another. All sources are read before any target is written.
using RowCopies = std::vector<std::pair<int64_t, int64_t>>;

// The values of a tensor of rows, or none where they are not to be read.
using RowValues = std::optional<std::vector<int64_t>>;

template <class Read>
RowValues checked_rows(const char* op, const char* argument, const Tensor& places, const Tensor& rows, const char* name,
                       const Read& read) {
  check_tensor(op, argument, places, "an int64 tensor [N]", {ScalarType::Long}, 1);
  check_same_device(op, name, rows, argument, places);
  RowValues found = read(places);
  for (size_t i = 0; found && i < found->size(); ++i) {
    const int64_t place = (*found)[i];
    if (place < 0 || place >= rows.size(0)) {
      refuse(op, argument, "rows of " + std::string(name) + " (0 to " + std::to_string(rows.size(0) - 1) + ")",
             std::to_string(place));
    }
  }
  return found;
}

// Rows of `rows`, as many sources as targets, no row the target of two; empty where `read` reads no values.
template <class Read>
RowCopies checked_copies(const char* op, const Tensor& sources, const Tensor& targets, const Tensor& rows,
                         const char* name, const Read& read) {
  const RowValues from = checked_rows(op, "source_rows", sources, rows, name, read);
  const RowValues to = checked_rows(op, "target_rows", targets, rows, name, read);
  check_size(op, "target_rows", targets, 0, sources.size(0), "one for each of source_rows");
  RowCopies copies;
  if (!from || !to) return copies;
  std::vector<int64_t> sorted = *to;
  std::sort(sorted.begin(), sorted.end());
  const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
  if (twice != sorted.end()) refuse(op, "target_rows", "distinct", std::to_string(*twice) + " twice");
  for (size_t i = 0; i < from->size(); ++i) copies.emplace_back((*from)[i], (*to)[i]);
  return copies;
}

}  // namespace embedding_kernels

// Checks and dispatch of the norm family on torch tensors.
#include "norm.h"

#include "../kernels.h"
#include "../norm_checks.h"
#include "norm_driver.h"
#include "token_prepend.h"
#include "torch_support.h"

namespace embedding_kernels::cpu {
namespace {

// weight and bias as float32, and what else the loops want to know.
class Kind {
 public:
  Kind(const Tensor& rows, const Tensor& weight, const std::optional<Tensor>& bias, double eps, bool centred, bool more)
      : weight_(load(weight, more ? 1.0f : 0.0f)), bias_(bias ? load(*bias, 0.0f) : std::vector<float>()) {
    kind_ = {rows.size(1), static_cast<float>(eps), centred, weight_.data(), bias ? bias_.data() : nullptr};
  }
  operator const NormKind&() const { return kind_; }

 private:
  static std::vector<float> load(const Tensor& vector, float more) {
    const Tensor dense = torch::stable::contiguous(vector);
    std::vector<float> values(dense.size(0));
    norm_loops().load[dtype_of(dense)](dense.const_data_ptr(), more, dense.size(0), values.data());
    return values;
  }

  std::vector<float> weight_, bias_;
  NormKind kind_;
};

NormRows rows_of(const Tensor& tensor, const int64_t* places = nullptr) {
  return {static_cast<const uint8_t*>(tensor.const_data_ptr()),
          tensor.stride(0) * static_cast<int64_t>(tensor.element_size()), places};
}

Tensor empty_rows(const Tensor& like) { return torch::stable::empty({like.size(0), like.size(1)}, like.scalar_type()); }
uint8_t* bytes_of(Tensor& tensor) { return static_cast<uint8_t*>(tensor.mutable_data_ptr()); }

// With `places`, the sum of row r is that of the rows at places[r].
std::tuple<Tensor, Tensor> forward(const char* op, Tensor x, std::optional<Tensor> residual, const Tensor& weight,
                                   const std::optional<Tensor>& bias, double eps, bool centred, bool more,
                                   const int64_t* places = nullptr) {
  check_norm(op, x, residual, weight, bias, eps);
  x = dense_rows(x);
  if (residual) residual = dense_rows(*residual);
  const Kind kind(x, weight, bias, eps, centred, more);
  Tensor normed = empty_rows(x);
  Tensor summed = residual ? empty_rows(x) : torch::stable::empty({0}, x.scalar_type());
  norm_forward(norm_loops(), dtype_of(x), kind, x.size(0), rows_of(x, places),
               residual ? rows_of(*residual, places) : NormRows{}, bytes_of(normed),
               residual ? bytes_of(summed) : nullptr, x.size(1) * static_cast<int64_t>(x.element_size()),
               TorchParallelFor());
  return {normed, summed};
}

struct Gradients {
  Tensor x, weight, bias;
};

Gradients backward(const char* op, Tensor grad, std::optional<Tensor> grad_summed, Tensor summed, const Tensor& weight,
                   const std::optional<Tensor>& bias, double eps, bool centred, bool more) {
  check_norm_backward(op, grad, grad_summed, summed, weight, bias, eps);
  summed = dense_rows(summed);
  grad = dense_rows(grad);
  if (grad_summed) grad_summed = dense_rows(*grad_summed);
  const Kind kind(summed, weight, bias, eps, centred, more);
  const int64_t dim = summed.size(1);
  Tensor grad_x = empty_rows(summed);
  Tensor grad_weight = torch::stable::empty({dim}, ScalarType::Float);
  Tensor grad_bias = torch::stable::empty({bias ? dim : 0}, ScalarType::Float);
  norm_backward(norm_loops(), dtype_of(summed), kind, summed.size(0), rows_of(grad),
                grad_summed ? rows_of(*grad_summed) : NormRows{}, rows_of(summed), bytes_of(grad_x),
                dim * static_cast<int64_t>(summed.element_size()), static_cast<float*>(grad_weight.mutable_data_ptr()),
                bias ? static_cast<float*>(grad_bias.mutable_data_ptr()) : nullptr, TorchParallelFor());
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace

std::tuple<Tensor, Tensor> add_rms_norm(Tensor x, std::optional<Tensor> residual, Tensor weight, double eps,
                                        bool one_plus_weight) {
  return forward("add_rms_norm", x, residual, weight, std::nullopt, eps, false, one_plus_weight);
}

std::tuple<Tensor, Tensor> add_rms_norm_backward(Tensor grad_normed, std::optional<Tensor> grad_summed, Tensor summed,
                                                 Tensor weight, double eps, bool one_plus_weight) {
  const Gradients gradients = backward("add_rms_norm_backward", grad_normed, grad_summed, summed, weight, std::nullopt,
                                       eps, false, one_plus_weight);
  return {gradients.x, gradients.weight};
}

std::tuple<Tensor, Tensor> token_prepend_rms_norm(Tensor x, std::optional<Tensor> residual, Tensor source_rows,
                                                  Tensor target_rows, Tensor weight, double eps, bool one_plus_weight) {
  const char* const op = "token_prepend_rms_norm";
  check_tensor(op, "x", x, kNormRows, kFloats, 2);
  const std::vector<int64_t> places = places_of(copies_of(op, source_rows, target_rows, x, "x"), x.size(0));
  if (residual) return forward(op, x, residual, weight, std::nullopt, eps, false, one_plus_weight, places.data());
  check_norm(op, x, residual, weight, std::nullopt, eps);
  Tensor moved = take_rows(x, places);
  return {std::get<0>(forward(op, moved, std::nullopt, weight, std::nullopt, eps, false, one_plus_weight)), moved};
}

std::tuple<Tensor, Tensor> token_prepend_rms_norm_backward(Tensor grad_normed, std::optional<Tensor> grad_summed,
                                                           Tensor summed, Tensor source_rows, Tensor target_rows,
                                                           Tensor weight, double eps, bool one_plus_weight) {
  const char* const op = "token_prepend_rms_norm_backward";
  check_tensor(op, "summed", summed, kNormRows, kFloats, 2);
  const RowCopies copies = copies_of(op, source_rows, target_rows, summed, "summed");
  Gradients gradients =
      backward(op, grad_normed, grad_summed, summed, weight, std::nullopt, eps, false, one_plus_weight);
  return_gradients(copies, gradients.x);
  return {gradients.x, gradients.weight};
}

std::tuple<Tensor, Tensor> add_layer_norm(Tensor x, std::optional<Tensor> residual, Tensor weight,
                                          std::optional<Tensor> bias, double eps) {
  return forward("add_layer_norm", x, residual, weight, bias, eps, true, false);
}

std::tuple<Tensor, Tensor, Tensor> add_layer_norm_backward(Tensor grad_normed, std::optional<Tensor> grad_summed,
                                                           Tensor summed, Tensor weight, std::optional<Tensor> bias,
                                                           double eps) {
  const Gradients gradients =
      backward("add_layer_norm_backward", grad_normed, grad_summed, summed, weight, bias, eps, true, false);
  return {gradients.x, gradients.weight, gradients.bias};
}

}  // namespace embedding_kernels::cpu

// Refusals of the anchor scores family, in the same words on every device.
#pragma once

#include "checks.h"

namespace embedding_kernels::anchor {

// What all operators share, but for the values of the offsets. `queries` [Q, m, H, D] or anchors [Q, m, D] are called
// `name`.
inline void check_views(const char* op, const Tensor& views, const char* name, const Tensor& queries,
                        const Tensor& offsets) {
  const bool heads = std::string(name) == "queries";
  check_tensor(op, "views", views,
               "a float32, bfloat16 or float16 tensor [P, m, D] (float64 runs with backend=\"reference\")", kFloats, 3);
  const std::string expected =
      "a " + dtype_name(views.scalar_type()) + " tensor " + (heads ? "[Q, m, H, D]" : "[Q, m, D]") + ", as views";
  check_tensor(op, name, queries, expected.c_str(), {views.scalar_type()}, heads ? 4 : 3);
  check_size(op, name, queries, 1, views.size(1), "the views");
  check_size(op, name, queries, heads ? 3 : 2, views.size(2), "the width of views");
  check_tensor(op, "cu_passages", offsets, "an int32 tensor [Q + 1]", {ScalarType::Int}, 1);
  check_size(op, "cu_passages", offsets, 0, queries.size(0) + 1, (std::string("one more than ") + name).c_str());
  check_same_device(op, "views", views, name, queries);
  check_same_device(op, "views", views, "cu_passages", offsets);
  if (!heads) check_at_least(op, "views.shape[1]", views.size(1), 1);
}

inline void check_sizes(const char* op, const Tensor& grad, const Tensor& other, const char* meaning) {
  for (int64_t d = 0; d < grad.dim(); ++d) check_size(op, "grad", grad, d, other.size(d), meaning);
}

inline void check_attention_grad(const char* op, const Tensor& grad, const Tensor& views, const Tensor& queries) {
  const std::string expected = "a " + dtype_name(views.scalar_type()) + " tensor [Q, m, H, D]";
  check_tensor(op, "grad", grad, expected.c_str(), {views.scalar_type()}, 4);
  check_sizes(op, grad, queries, "as queries");
  check_same_device(op, "views", views, "grad", grad);
}

inline void check_scores_grad(const char* op, const Tensor& grad, const Tensor& views, bool per_view) {
  check_tensor(op, "grad", grad, per_view ? "a float32 tensor [P, m]" : "a float32 tensor [P]", {ScalarType::Float},
               per_view ? 2 : 1);
  check_sizes(op, grad, views, "as views");
  check_same_device(op, "views", views, "grad", grad);
}

}  // namespace embedding_kernels::anchor

// merge_attention (family attention) on torch tensors.
#include <cmath>

#include "../attention_checks.h"
#include "../kernels.h"
#include "attention.h"
#include "torch_support.h"

namespace embedding_kernels::cpu {
namespace {

// One side's rows, made dense, and its lse.
struct Side {
  Tensor out, lse;
  const uint8_t* data;
  const float* sums;
  int64_t row_stride, head_stride;

  Side(const Tensor& rows, const Tensor& logarithms)
      : out(dense_rows(rows)), lse(torch::stable::contiguous(logarithms)) {
    const auto item = static_cast<int64_t>(out.element_size());
    data = static_cast<const uint8_t*>(out.const_data_ptr());
    sums = static_cast<const float*>(lse.const_data_ptr());
    row_stride = out.stride(0) * item;
    head_stride = out.stride(1) * item;
  }
  const void* row(int64_t token, int64_t head) const { return data + token * row_stride + head * head_stride; }
};

// Share of each side, and the joint lse.
struct Shares {
  float a, b, lse;

  Shares(float lse_a, float lse_b) {
    if (lse_a == -INFINITY && lse_b == -INFINITY) {
      a = b = 0;
      lse = -INFINITY;
      return;
    }
    const float most = std::max(lse_a, lse_b);
    const float sum = std::exp(lse_a - most) + std::exp(lse_b - most);
    lse = most + std::log(sum);
    a = std::exp(lse_a - lse);
    b = std::exp(lse_b - lse);
  }
};

Tensor empty_like_out(const Tensor& out) {
  return torch::stable::empty({out.size(0), out.size(1), out.size(2)}, out.scalar_type());
}
Tensor empty_lse(const Tensor& out) { return torch::stable::empty({out.size(1), out.size(0)}, ScalarType::Float); }

constexpr int64_t kGrainElements = int64_t{1} << 15;

// task(token, head, place in lse) for every row, over threads.
template <class Task>
void for_rows(const Tensor& out, const Task& task) {
  const int64_t tokens = out.size(0), heads = out.size(1);
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(heads * out.size(2), 1));
  torch::stable::parallel_for(0, tokens, grain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t h = 0; h < heads; ++h) task(t, h, h * tokens + t);
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor> merge_attention(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) {
  check_partial_results("merge_attention", out_a, lse_a, out_b, lse_b);
  const Side a(out_a, lse_a), b(out_b, lse_b);
  Tensor out = empty_like_out(out_a), lse = empty_lse(out_a);
  auto* to = static_cast<uint8_t*>(out.mutable_data_ptr());
  auto* sums = static_cast<float*>(lse.mutable_data_ptr());
  const int64_t heads = out.size(1), dim = out.size(2), bytes = dim * static_cast<int64_t>(out.element_size());
  const auto blend = attention_loops().blend[dtype_of(out_a)];
  for_rows(out, [&](int64_t t, int64_t h, int64_t place) {
    const Shares shares(a.sums[place], b.sums[place]);
    sums[place] = shares.lse;
    blend(a.row(t, h), shares.a, b.row(t, h), shares.b, dim, to + (t * heads + h) * bytes);
  });
  return {out, lse};
}

// With w the shares: d out_a = w_a g; d lse_a = w_a (g . out_a - g . out + glse), and the same for b.
std::tuple<Tensor, Tensor, Tensor, Tensor> merge_attention_backward(Tensor grad_out, std::optional<Tensor> grad_lse,
                                                                    Tensor out_a, Tensor lse_a, Tensor out_b,
                                                                    Tensor lse_b) {
  const char* const op = "merge_attention_backward";
  check_partial_results(op, out_a, lse_a, out_b, lse_b);
  check_partial_gradients(op, grad_out, grad_lse, out_a);
  const Side a(out_a, lse_a), b(out_b, lse_b), g(grad_out, grad_lse ? *grad_lse : lse_a);
  Tensor grad_a = empty_like_out(out_a), grad_b = empty_like_out(out_a);
  Tensor grad_lse_a = empty_lse(out_a), grad_lse_b = empty_lse(out_a);
  auto *to_a = static_cast<uint8_t*>(grad_a.mutable_data_ptr()),
       *to_b = static_cast<uint8_t*>(grad_b.mutable_data_ptr());
  auto *sums_a = static_cast<float*>(grad_lse_a.mutable_data_ptr()),
       *sums_b = static_cast<float*>(grad_lse_b.mutable_data_ptr());
  const Dtype dtype = dtype_of(out_a);
  const int64_t heads = out_a.size(1), dim = out_a.size(2), bytes = dim * static_cast<int64_t>(out_a.element_size());
  const AttentionLoops& loops = attention_loops();
  for_rows(out_a, [&](int64_t t, int64_t h, int64_t place) {
    const Shares shares(a.sums[place], b.sums[place]);
    const void* const grad = g.row(t, h);
    const int64_t offset = (t * heads + h) * bytes;
    loops.blend[dtype](grad, shares.a, grad, 0.0f, dim, to_a + offset);
    loops.blend[dtype](grad, shares.b, grad, 0.0f, dim, to_b + offset);
    // g . out_a - g . out = w_b (g . out_a - g . out_b), and the other way round
    const float dot_a = shares.a == 0 ? 0.0f : loops.dot[dtype](grad, a.row(t, h), dim);
    const float dot_b = shares.b == 0 ? 0.0f : loops.dot[dtype](grad, b.row(t, h), dim);
    const float along = shares.a * shares.b * (dot_a - dot_b), direct = grad_lse ? g.sums[place] : 0.0f;
    sums_a[place] = along + shares.a * direct;
    sums_b[place] = shares.b * direct - along;
  });
  return {grad_a, grad_lse_a, grad_b, grad_lse_b};
}

}  // namespace embedding_kernels::cpu

// merge_attention and its gradient: as fast as memory, 2 reads and a write of [total, heads, dim], 3 and 2 backward.
#include <cmath>

#include "../attention_checks.h"
#include "../kernels.h"
#include "row_lanes.cuh"

namespace embedding_kernels::cuda {
namespace {

constexpr int kThreads = 256;

// Rows [total, heads, dim] of any strides but the last.
template <class T>
struct PartialRows {
  const T* data;
  int64_t row_stride, head_stride;

  __device__ const T* at(int64_t row, int64_t head) const { return data + row * row_stride + head * head_stride; }
};

struct MergeShape {
  int64_t total, heads, dim;
  int lanes;  // of a row
};

// The share of each side, and the joint lse.
struct Shares {
  float a, b, lse;
};
__device__ inline Shares shares_of(float lse_a, float lse_b) {
  if (lse_a == -INFINITY && lse_b == -INFINITY) return {0, 0, -INFINITY};
  const float most = fmaxf(lse_a, lse_b);
  const float lse = most + logf(expf(lse_a - most) + expf(lse_b - most));
  return {expf(lse_a - lse), expf(lse_b - lse), lse};
}

// A side without keys counts 0 whatever stands in its rows.
__device__ inline float shared_out(float share, float value) { return share == 0 ? 0 : share * value; }

template <class T, int N>
__global__ void merge_kernel(MergeShape shape, PartialRows<T> out_a, const float* __restrict__ lse_a,
                             PartialRows<T> out_b, const float* __restrict__ lse_b, T* __restrict__ out,
                             float* __restrict__ lse) {
  for_rows(shape.total * shape.heads, shape.lanes, [&](int64_t item, int lane) {
    const int64_t row = item / shape.heads, head = item % shape.heads, place = head * shape.total + row;
    const Shares shares = shares_of(lse_a[place], lse_b[place]);
    if (lane == 0) lse[place] = shares.lse;
    const T *const a = out_a.at(row, head), *const b = out_b.at(row, head);
    for (int64_t d = lane * N; d < shape.dim; d += shape.lanes * N) {
      float x[N], y[N];
      load(a + d, x);
      load(b + d, y);
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = shared_out(shares.a, x[i]) + shared_out(shares.b, y[i]);
      store(out + item * shape.dim + d, x);
    }
  });
}

// With w the shares: d out_a = w_a g; d lse_a = w_a (g . out_a − g . out + glse), and the same for b. As the shares add
// up to 1, g . out_a − g . out is w_b g . (out_a − out_b).
template <class T, int N>
__global__ void merge_gradient_kernel(MergeShape shape, PartialRows<T> grad_out, const float* __restrict__ grad_lse,
                                      PartialRows<T> out_a, const float* __restrict__ lse_a, PartialRows<T> out_b,
                                      const float* __restrict__ lse_b, T* __restrict__ grad_a,
                                      float* __restrict__ grad_lse_a, T* __restrict__ grad_b,
                                      float* __restrict__ grad_lse_b) {
  for_rows_with_sums(
      shape.total * shape.heads, shape.lanes,
      [&](int64_t item, int lane) {
        const int64_t row = item / shape.heads, head = item % shape.heads, place = head * shape.total + row;
        const Shares shares = shares_of(lse_a[place], lse_b[place]);
        const T *const a = out_a.at(row, head), *const b = out_b.at(row, head), *const g = grad_out.at(row, head);
        float along = 0;
        for (int64_t d = lane * N; d < shape.dim; d += shape.lanes * N) {
          float x[N], y[N], grad[N], to_a[N], to_b[N];
          load(a + d, x);
          load(b + d, y);
          load(g + d, grad);
#pragma unroll
          for (int i = 0; i < N; ++i) {
            along += grad[i] * ((shares.a == 0 ? 0 : x[i]) - (shares.b == 0 ? 0 : y[i]));
            to_a[i] = shared_out(shares.a, grad[i]);
            to_b[i] = shared_out(shares.b, grad[i]);
          }
          store(grad_a + item * shape.dim + d, to_a);
          store(grad_b + item * shape.dim + d, to_b);
        }
        return along;
      },
      [&](int64_t item, float along) {
        const int64_t row = item / shape.heads, head = item % shape.heads, place = head * shape.total + row;
        const Shares shares = shares_of(lse_a[place], lse_b[place]);
        const float both = shares.a * shares.b, moved = both == 0 ? 0 : both * along;
        const float direct = grad_lse == nullptr ? 0 : grad_lse[place];
        grad_lse_a[place] = moved + shared_out(shares.a, direct);
        grad_lse_b[place] = shared_out(shares.b, direct) - moved;
      });
}

template <class T>
PartialRows<T> partial_rows(const Tensor& rows) {
  return {pointer<T>(rows), rows.stride(0), rows.stride(1)};
}

template <class T>
bool are_wide(const Tensor& rows) {
  const T* const data = pointer<T>(rows);
  return rows_are_wide(data, rows.stride(0), rows.size(2)) && rows.stride(1) % kWide<T> == 0;
}

Tensor empty_rows(const Tensor& like) {
  return empty_like_device(like, {like.size(0), like.size(1), like.size(2)}, like.scalar_type());
}
Tensor empty_lse(const Tensor& out) { return empty_like_device(out, {out.size(1), out.size(0)}, ScalarType::Float); }

// Calls `body(T{}, N)` with the values of an access where all of `rows` allow it, and otherwise with 1.
template <class Body>
void with_width(std::initializer_list<const Tensor*> rows, const Body& body) {
  with_float_type((*rows.begin())->scalar_type(), [&]<class T>(T type) {
    bool wide = true;
    for (const Tensor* const tensor : rows) wide = wide && are_wide<T>(*tensor);
    if (wide) {
      body(type, std::integral_constant<int, kWide<T>>{});
    } else {
      body(type, std::integral_constant<int, 1>{});
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor> merge_attention(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) {
  const char* const op = "merge_attention";
  check_partial_results(op, out_a, lse_a, out_b, lse_b);
  const DeviceGuard guard(out_a.get_device_index());
  out_a = dense_rows(out_a), out_b = dense_rows(out_b);
  lse_a = torch::stable::contiguous(lse_a), lse_b = torch::stable::contiguous(lse_b);
  Tensor out = empty_rows(out_a), lse = empty_lse(out_a);
  if (lse.numel() == 0) return {out, lse};
  with_width({&out_a, &out_b}, [&]<class T, int N>(T, std::integral_constant<int, N>) {
    const MergeShape shape = {out_a.size(0), out_a.size(1), out_a.size(2), lanes_for((out_a.size(2) + N - 1) / N)};
    launch(op, merge_kernel<T, N>, dim3(blocks_for(shape.total * shape.heads * shape.lanes, kThreads)), dim3(kThreads),
           0, current_stream(out_a), shape, partial_rows<T>(out_a), pointer<float>(lse_a), partial_rows<T>(out_b),
           pointer<float>(lse_b), mutable_pointer<T>(out), mutable_pointer<float>(lse));
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> merge_attention_backward(Tensor grad_out, std::optional<Tensor> grad_lse,
                                                                    Tensor out_a, Tensor lse_a, Tensor out_b,
                                                                    Tensor lse_b) {
  const char* const op = "merge_attention_backward";
  check_partial_results(op, out_a, lse_a, out_b, lse_b);
  check_partial_gradients(op, grad_out, grad_lse, out_a);
  const DeviceGuard guard(out_a.get_device_index());
  for (Tensor* const rows : {&grad_out, &out_a, &out_b}) *rows = dense_rows(*rows);
  for (Tensor* const lse : {&lse_a, &lse_b}) *lse = torch::stable::contiguous(*lse);
  if (grad_lse) grad_lse = torch::stable::contiguous(*grad_lse);
  Tensor grad_a = empty_rows(out_a), grad_b = empty_rows(out_a);
  Tensor grad_lse_a = empty_lse(out_a), grad_lse_b = empty_lse(out_a);
  if (grad_lse_a.numel() == 0) return {grad_a, grad_lse_a, grad_b, grad_lse_b};
  with_width({&grad_out, &out_a, &out_b}, [&]<class T, int N>(T, std::integral_constant<int, N>) {
    const MergeShape shape = {out_a.size(0), out_a.size(1), out_a.size(2), lanes_for((out_a.size(2) + N - 1) / N)};
    launch(op, merge_gradient_kernel<T, N>, dim3(blocks_for(shape.total * shape.heads * shape.lanes, kThreads)),
           dim3(kThreads), 0, current_stream(out_a), shape, partial_rows<T>(grad_out), pointer_or_null<float>(grad_lse),
           partial_rows<T>(out_a), pointer<float>(lse_a), partial_rows<T>(out_b), pointer<float>(lse_b),
           mutable_pointer<T>(grad_a), mutable_pointer<float>(grad_lse_a), mutable_pointer<T>(grad_b),
           mutable_pointer<float>(grad_lse_b));
  });
  return {grad_a, grad_lse_a, grad_b, grad_lse_b};
}

}  // namespace embedding_kernels::cuda

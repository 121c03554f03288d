// Rows turned by their positions before a pass that reads them many times, and gradients turned back after it.
#include "attention_host.cuh"

namespace embedding_kernels::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
__device__ inline void load8(const T* from, float (&values)[8]) {
  if constexpr (sizeof(T) == 2) {
    load(from, values);
  } else {
    float low[4], high[4];
    load(from, low);
    load(from + 4, high);
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = low[i], values[4 + i] = high[i];
  }
}

// out [total, heads, dim]: rows of x, also dense from head to head; a warp a row. A unit is eight pairs or, past the
// turned dimensions, eight values; one of each where the tables are not wide.
template <class From, class To>
__global__ void attention_rotate_kernel(const From* __restrict__ x, int64_t row_stride, int64_t head_stride,
                                        int32_t heads, int32_t dim, AttentionSide side, int32_t sequences,
                                        Rotation rotation, float sign, To* __restrict__ out) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / kWarp);
  const int32_t size = rotation.wide ? 8 : 1;
  const int32_t pairs = rotation.half / size, units = dim / size - pairs;
  for (int64_t row = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp; row < side.total;
       row += warps) {
    int32_t position;
    if (side.positions != nullptr) {
      position = side.positions[row];
    } else {
      position = static_cast<int32_t>(row) -
                 side.offsets[last_reached(sequences, lane, [&](int32_t s) { return side.offsets[s] <= row; })];
    }
    for (int32_t item = lane; item < heads * units; item += kWarp) {
      const int32_t head = item / units, unit = item % units;
      const From* const from = x + row * row_stride + head * head_stride;
      To* const to = out + (row * heads + head) * dim;
      const int32_t low = unit * size, high = low + rotation.half;
      if (rotation.wide) {
        float a[8], b[8];
        if (unit < pairs) {
          load8(from + low, a);
          load8(from + high, b);
          turn(rotation, position, low, sign, a, b);
          store(to + low, a);
        } else {
          load8(from + high, b);
        }
        store(to + high, b);
      } else {
        float a[1], b[1] = {widen(from[high])};
        if (unit < pairs) {
          a[0] = widen(from[low]);
          turn(rotation, position, low, sign, a, b);
          to[low] = round_to<To>(a[0]);
        }
        to[high] = round_to<To>(b[0]);
      }
    }
  }
}

template <class From, class To>
Tensor launch_rotation(const char* op, const AttentionCall& call, const Tensor& rows, const AttentionSide& side,
                       float sign, ScalarType dtype) {
  Tensor out = empty_like_device(rows, {rows.size(0), rows.size(1), rows.size(2)}, dtype);
  if (side.total == 0) return out;
  launch(op, attention_rotate_kernel<From, To>, dim3(blocks_for(side.total, kThreads / kWarp)), dim3(kThreads), 0,
         current_stream(rows), pointer<From>(rows), rows.stride(0), rows.stride(1), static_cast<int32_t>(rows.size(1)),
         static_cast<int32_t>(rows.size(2)), side, call.rule.sequences, call.rotation, sign, mutable_pointer<To>(out));
  return out;
}

}  // namespace

Tensor rotated(const char* op, const AttentionCall& call, const Tensor& rows, const AttentionSide& side) {
  if (call.rotation.half == 0) return rows;
  Tensor out = rows;
  with_half_type(rows.scalar_type(),
                 [&]<class T>(T) { out = launch_rotation<T, T>(op, call, rows, side, 1, rows.scalar_type()); });
  return out;
}

Tensor turned_back(const char* op, const AttentionCall& call, const Tensor& rows, const AttentionSide& side,
                   ScalarType dtype) {
  Tensor out = rows;
  with_half_type(dtype, [&]<class T>(T) { out = launch_rotation<float, T>(op, call, rows, side, -1, dtype); });
  return out;
}

}  // namespace embedding_kernels::cuda

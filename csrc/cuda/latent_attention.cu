// Softmax in groups of columns, and its gradient, on CUDA.
//
// Bytes alone count: 2 * 2 bytes a score forward and 3 * 2 backward in bfloat16. 8,192 rows of 8 groups of 512 are
// 134 MB, 28 us of 4.8 TB/s; the some 15 instructions of a score take half of that.
#include <cmath>

#include "../kernels.h"
#include "../latent_attention_checks.h"
#include "launch.cuh"
#include "raw.cuh"

namespace embedding_kernels::cuda {
namespace {

constexpr int kThreads = 256;
// Values of a line that a thread keeps in registers; what is left is read again, from the caches.
constexpr int kHeld = 16;

// Blocks of a multiprocessor: as many as registers allow without spilling.
template <int N>
constexpr int kBlocks = 2 + N / 4;

// A line is a group of a row. A team of threads takes it: lanes of one warp, a power of two, or the whole block.
struct Lines {
  int64_t count, groups, size;
  int team;
};

struct TeamShared {
  float of_warp[kThreads / kWarp];
};

// Of the values of a team's threads, for each of them; combine(a, b) is symmetric, so that all get the same bits.
template <class Combine>
__device__ inline float over_team(float value, int team, TeamShared& shared, const Combine& combine) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    if (lanes < team) value = combine(value, ptx::shuffle_xor(value, static_cast<uint32_t>(lanes)));
  }
  if (team <= kWarp) return value;
  if (threadIdx.x % kWarp == 0) shared.of_warp[threadIdx.x / kWarp] = value;
  ptx::sync_block();
  value = shared.of_warp[0];
  for (int warp = 1; warp < kThreads / kWarp; ++warp) value = combine(value, shared.of_warp[warp]);
  // before the next call writes there
  ptx::sync_block();
  return value;
}

// exp(x) for x <= 0, to the last place of T.
template <class T>
__device__ inline float exponential(float x) {
  if constexpr (sizeof(T) == 4) {
    return expf(x);
  } else {
    return ptx::exp2_near(x * 1.44269504088896341f);
  }
}

// The line of a thread in one turn of its block. Past the last line there is nothing to load or store.
template <class T, int N>
struct Line {
  int64_t row, column;  // where it begins
  int64_t size;         // 0 past the last
  int held;             // how much of it registers hold
  int step, place;      // the team's values at once, and this thread's among them

  __device__ Line(const Lines& lines, int64_t first) : step(lines.team * N) {
    const int64_t line = first + threadIdx.x / lines.team;
    row = line / lines.groups;
    column = (line - row * lines.groups) * lines.size;
    size = line < lines.count ? lines.size : 0;
    held = static_cast<int>(size < lines.team * kHeld ? size : lines.team * kHeld);
    place = static_cast<int>(threadIdx.x % lines.team) * N;
  }

  // Starts the loads of this thread's first values.
  __device__ void load_held(const T* from, Raw<T, N> (&raw)[kHeld / N]) const {
#pragma unroll
    for (int c = 0; c < kHeld / N; ++c) {
      if (c * step + place < held) raw[c] = load_raw<T, N>(from + c * step + place);
    }
  }
};

template <class T, int N>
__global__ void __launch_bounds__(kThreads, kBlocks<N>)
    softmax_kernel(const T* __restrict__ scores, int64_t stride, Lines lines, T* __restrict__ out) {
  constexpr int kChunks = kHeld / N;
  auto& shared = shared_memory<TeamShared>();
  const int64_t teams = kThreads / lines.team;
  for (int64_t first = blockIdx.x * teams; first < lines.count; first += gridDim.x * teams) {
    const Line<T, N> line(lines, first);
    const T* const from = scores + line.row * stride + line.column;
    T* const to = out + line.row * (lines.groups * lines.size) + line.column;
    Raw<T, N> raw[kChunks] = {};
    line.load_held(from, raw);
    float held[kChunks][N], other[N];
    float most = -INFINITY;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (c * line.step >= line.held) break;
      widen(raw[c], held[c]);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (c * line.step + line.place >= line.held) held[c][i] = -INFINITY;
        most = fmaxf(most, held[c][i]);
      }
    }
    for (int64_t at = kChunks * line.step + line.place; at < line.size; at += line.step) {
      load<T, N>(from + at, other);
#pragma unroll
      for (int i = 0; i < N; ++i) most = fmaxf(most, other[i]);
    }
    most = over_team(most, lines.team, shared, [](float a, float b) { return fmaxf(a, b); });
    // a group that holds NaN or inf, or nothing but -inf, is NaN by these differences
    float sum = 0;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (c * line.step >= line.held) break;
#pragma unroll
      for (int i = 0; i < N; ++i) sum += held[c][i] = exponential<T>(held[c][i] - most);
    }
    for (int64_t at = kChunks * line.step + line.place; at < line.size; at += line.step) {
      load<T, N>(from + at, other);
#pragma unroll
      for (int i = 0; i < N; ++i) sum += exponential<T>(other[i] - most);
    }
    const float scale = 1.0f / over_team(sum, lines.team, shared, [](float a, float b) { return a + b; });
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (c * line.step + line.place >= line.held) break;
#pragma unroll
      for (int i = 0; i < N; ++i) held[c][i] *= scale;
      store<T, N>(to + c * line.step + line.place, held[c]);
    }
    for (int64_t at = kChunks * line.step + line.place; at < line.size; at += line.step) {
      load<T, N>(from + at, other);
#pragma unroll
      for (int i = 0; i < N; ++i) other[i] = exponential<T>(other[i] - most) * scale;
      store<T, N>(to + at, other);
    }
  }
}

// p (grad - sum of grad p), the sum within a group.
template <class T, int N>
__global__ void __launch_bounds__(kThreads, kBlocks<N>)
    softmax_gradient_kernel(const T* __restrict__ grad, int64_t grad_stride, const T* __restrict__ probabilities,
                            int64_t stride, Lines lines, T* __restrict__ out) {
  constexpr int kChunks = kHeld / N;
  auto& shared = shared_memory<TeamShared>();
  const int64_t teams = kThreads / lines.team;
  for (int64_t first = blockIdx.x * teams; first < lines.count; first += gridDim.x * teams) {
    const Line<T, N> line(lines, first);
    const T* const from_grad = grad + line.row * grad_stride + line.column;
    const T* const from = probabilities + line.row * stride + line.column;
    T* const to = out + line.row * (lines.groups * lines.size) + line.column;
    Raw<T, N> raw_g[kChunks] = {}, raw_p[kChunks] = {};
    line.load_held(from_grad, raw_g);
    line.load_held(from, raw_p);
    float g[N], p[N];
    float sum = 0;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (c * line.step + line.place >= line.held) break;
      widen(raw_g[c], g);
      widen(raw_p[c], p);
#pragma unroll
      for (int i = 0; i < N; ++i) sum += g[i] * p[i];
    }
    for (int64_t at = kChunks * line.step + line.place; at < line.size; at += line.step) {
      load<T, N>(from_grad + at, g);
      load<T, N>(from + at, p);
#pragma unroll
      for (int i = 0; i < N; ++i) sum += g[i] * p[i];
    }
    sum = over_team(sum, lines.team, shared, [](float a, float b) { return a + b; });
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (c * line.step + line.place >= line.held) break;
      widen(raw_g[c], g);
      widen(raw_p[c], p);
#pragma unroll
      for (int i = 0; i < N; ++i) p[i] *= g[i] - sum;
      store<T, N>(to + c * line.step + line.place, p);
    }
    for (int64_t at = kChunks * line.step + line.place; at < line.size; at += line.step) {
      load<T, N>(from_grad + at, g);
      load<T, N>(from + at, p);
#pragma unroll
      for (int i = 0; i < N; ++i) p[i] *= g[i] - sum;
      store<T, N>(to + at, p);
    }
  }
}

// Whether the groups of rows of `tensor` may be read 16 bytes at a time.
template <class T>
bool groups_are_wide(const Tensor& tensor, int64_t size) {
  return rows_are_wide(pointer<T>(tensor), tensor.stride(0), size);
}

// The lines of `out`, by teams whose threads read `at_once` values.
Lines lines_of(const Tensor& out, int64_t groups, int at_once) {
  const int64_t size = out.size(1) / groups;
  int team = 1;
  while (team < kWarp && team * at_once < size) team *= 2;
  return {out.size(0) * groups, groups, size, size > kWarp * kHeld ? kThreads : team};
}

dim3 grid_of(const Lines& lines) { return dim3(blocks_for(lines.count, kThreads / lines.team)); }

}  // namespace

Tensor grouped_softmax(Tensor scores, int64_t groups) {
  const char* const op = "grouped_softmax";
  latent_attention::check_groups(op, "scores", scores, groups);
  const DeviceGuard guard(scores.get_device_index());
  scores = dense_rows(scores);
  Tensor out = empty_like_device(scores, {scores.size(0), scores.size(1)}, scores.scalar_type());
  if (out.numel() == 0) return out;
  with_float_type(scores.scalar_type(), [&]<class T>(T) {
    with_access<T>(groups_are_wide<T>(scores, scores.size(1) / groups), [&]<int N>(std::integral_constant<int, N>) {
      const Lines lines = lines_of(out, groups, N);
      launch(op, softmax_kernel<T, N>, grid_of(lines), dim3(kThreads), sizeof(TeamShared), current_stream(scores),
             pointer<T>(scores), scores.stride(0), lines, mutable_pointer<T>(out));
    });
  });
  return out;
}

Tensor grouped_softmax_backward(Tensor grad, Tensor probabilities, int64_t groups) {
  const char* const op = "grouped_softmax_backward";
  latent_attention::check_softmax_backward(op, grad, probabilities, groups);
  const DeviceGuard guard(probabilities.get_device_index());
  grad = dense_rows(grad);
  probabilities = dense_rows(probabilities);
  Tensor out = empty_like_device(probabilities, {grad.size(0), grad.size(1)}, grad.scalar_type());
  if (out.numel() == 0) return out;
  const int64_t size = grad.size(1) / groups;
  with_float_type(grad.scalar_type(), [&]<class T>(T) {
    const bool wide = groups_are_wide<T>(grad, size) && groups_are_wide<T>(probabilities, size);
    with_access<T>(wide, [&]<int N>(std::integral_constant<int, N>) {
      const Lines lines = lines_of(out, groups, N);
      launch(op, softmax_gradient_kernel<T, N>, grid_of(lines), dim3(kThreads), sizeof(TeamShared),
             current_stream(grad), pointer<T>(grad), grad.stride(0), pointer<T>(probabilities), probabilities.stride(0),
             lines, mutable_pointer<T>(out));
    });
  });
  return out;
}

}  // namespace embedding_kernels::cuda

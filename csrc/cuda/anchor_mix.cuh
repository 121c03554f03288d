// Where weighted sums of views go, and how those of the spans of a long query are joined.
#pragma once

#include "anchor_scores.cuh"

namespace embedding_kernels::cuda {

// Passages whose sums one block forms; a longer query is joined from several.
constexpr int kMixSpan = 256;
using MixSpan = Span<kMixSpan>;
using MixJoin = Join<kMixSpan>;

// Sums [.., views, heads, dim], and where those of spans wait to be joined: with the largest score of each, and the sum
// of powers relative to it, where weights are a softmax.
template <class T>
struct Mixed {
  T* out;
  float* parts;
  float* softmax;  // [.., views, heads, 2]
};

// Room for the sums of spans, where a query may have several.
struct MixParts {
  Tensor sums, softmax;
  bool weighs;

  MixParts(const Tensor& like, const Segments& segments, int64_t rows, int64_t dim, bool by_softmax)
      : weighs(by_softmax) {
    const int64_t parts = segments.total > kMixSpan ? MixSpan::parts(segments) * rows : 0;
    sums = empty_like_device(like, {parts, dim}, ScalarType::Float);
    softmax = empty_like_device(like, {weighs ? parts : 0, 2}, ScalarType::Float);
  }

  template <class T>
  Mixed<T> mixed(Tensor& out) {
    return {mutable_pointer<T>(out), mutable_pointer<float>(sums), weighs ? mutable_pointer<float>(softmax) : nullptr};
  }
};

// Sums of the queries of several spans. A block takes one view and head.
template <class T, int N>
__global__ void __launch_bounds__(kSegmentThreads)
    join_mix_kernel(Segments segments, int rows, int dim, Mixed<T> mixed) {
  const MixJoin join(segments, blockIdx.x / rows);
  if (!join.exists) return;
  const int row = blockIdx.x % rows;
  float most = -INFINITY;
  for (int64_t s = 0; mixed.softmax != nullptr && s < join.spans; ++s) {
    most = fmaxf(most, mixed.softmax[2 * ((join.part + s) * rows + row)]);
  }
  const float base = most == -INFINITY ? 0.0f : most;
  for (int column = threadIdx.x * N; column < dim; column += kSegmentThreads * N) {
    float sums[N] = {}, part[N], total = 0;
    for (int64_t s = 0; s < join.spans; ++s) {
      const int64_t at = (join.part + s) * rows + row;
      float factor = 1;
      if (mixed.softmax != nullptr) {
        factor = expf(mixed.softmax[2 * at] - base);
        total += mixed.softmax[2 * at + 1] * factor;
      }
      load_floats(mixed.parts + at * dim + column, part);
#pragma unroll
      for (int i = 0; i < N; ++i) sums[i] += part[i] * factor;
    }
    const float scale = mixed.softmax == nullptr ? 1.0f : 1.0f / total;
    T* const to = mixed.out + (join.segment * rows + row) * dim + column;
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = round_to<T>(sums[i] * scale);
  }
}

template <class T>
void launch_join(const char* op, const Segments& segments, int64_t rows, int dim, const Mixed<T>& mixed,
                 cudaStream_t stream) {
  if (segments.total <= kMixSpan) return;
  const dim3 grid(static_cast<unsigned>(MixJoin::turns(segments) * rows));
  with_access<float>(dim % 4 == 0, [&]<int N>(std::integral_constant<int, N>) {
    launch(op, join_mix_kernel<T, N>, grid, dim3(kSegmentThreads), 0, stream, segments, static_cast<int>(rows), dim,
           mixed);
  });
}

}  // namespace embedding_kernels::cuda

// Means of gated rows on CUDA: value * gelu(gate) is formed in registers and never written.
//
// In bfloat16 with F columns a row has 4 F bytes. 8,192 rows of F = 16,384 are 537 MB, 112 us of 4.8 TB/s; some 30
// instructions a product are 140 us of 132 multiprocessors. So the gated unit counts as much as memory, and gelu is
// one rational function (18 instructions), where erff would be 30.
#include "../kernels.h"
#include "../latent_attention_checks.h"
#include "latent_attention.cuh"

namespace embedding_kernels::cuda {
namespace {

// Loads of rows that a thread has under way.
constexpr int kRowsAtOnce = 2;

// Where means and, of sequences of several spans, partial sums go.
struct Means {
  void* out;  // [sequences, columns]
  Element element;
  float* parts;  // 2 rows for each whole span of the total

  template <int N>
  __device__ void store(int64_t at, const float (&sums)[N], float scale) const {
    // exactly 0 without weight, whatever the rows hold
#pragma unroll
    for (int i = 0; i < N; ++i) store_as(element, out, at + i, scale == 0 ? 0.0f : sums[i] * scale);
  }
};

template <class T, int N>
__device__ inline void add_gated(const RawGated<T, N>& raw, const float (&value_bias)[N], const float (&gate_bias)[N],
                                 float weight, float (&sums)[N]) {
  float value[N], gate[N];
  widen(raw.value, value);
  widen(raw.gate, gate);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float x = gate[i] + gate_bias[i];
    sums[i] += (value[i] + value_bias[i]) * (x * normal_distribution(x)) * weight;
  }
}

template <class T, int N>
__global__ void __launch_bounds__(kSegmentThreads, 3)
    gated_pool_kernel(GatedRows<T> gated, Sequences sequences, Tile tile, Means means) {
  auto& shared = shared_memory<PoolShared>();
  const PoolSpan span(sequences, blockIdx.x / tile.at_once);
  if (!span.exists()) return;
  const bool whole = span.is_whole();
  const float scale = whole ? scale_of(sequences, span.first, span.last, shared) : 1.0f;
  for (int64_t t = blockIdx.x % tile.at_once; t < tile.count; t += tile.at_once) {
    const int64_t column = t * tile.width + threadIdx.x % tile.across * N;
    const bool inside = column < gated.columns;
    float sums[N] = {};
    if (inside && scale != 0) {
      float value_bias[N], gate_bias[N];
      gated.load_bias(column, value_bias);
      gated.load_bias(gated.columns + column, gate_bias);
      for (int64_t row = span.start + threadIdx.x / tile.across; row < span.end; row += kRowsAtOnce * tile.down) {
        RawGated<T, N> raw[kRowsAtOnce] = {};
#pragma unroll
        for (int u = 0; u < kRowsAtOnce; ++u) {
          if (row + u * tile.down < span.end) raw[u] = load_gated<T, N>(gated, row + u * tile.down, column);
        }
#pragma unroll
        for (int u = 0; u < kRowsAtOnce; ++u) {
          if (row + u * tile.down >= span.end) break;
          add_gated(raw[u], value_bias, gate_bias, sequences.weight(row + u * tile.down), sums);
        }
      }
    }
    sum_down(tile, sums, shared.sums);
    if (!inside || static_cast<int>(threadIdx.x) >= tile.across) continue;
    if (whole) {
      means.store(span.segment * gated.columns + column, sums, scale);
    } else {
      store_floats(means.parts + span.part() * gated.columns + column, sums);
    }
  }
}

// Means of the sequences of several spans.
template <int N>
__global__ void __launch_bounds__(kSegmentThreads)
    join_spans_kernel(Sequences sequences, int64_t columns, Tile tile, Means means) {
  auto& shared = shared_memory<PoolShared>();
  const PoolJoin join(sequences, blockIdx.x / tile.at_once);
  if (!join.exists) return;
  const float scale = scale_of(sequences, join.first, join.last, shared);
  for (int64_t t = blockIdx.x % tile.at_once; t < tile.count; t += tile.at_once) {
    const int64_t column = t * tile.width + threadIdx.x % tile.across * N;
    const bool inside = column < columns;
    float sums[N] = {}, part[N];
    for (int64_t s = threadIdx.x / tile.across; inside && s < join.spans; s += tile.down) {
      load_floats(means.parts + (join.part + s) * columns + column, part);
#pragma unroll
      for (int i = 0; i < N; ++i) sums[i] += part[i];
    }
    sum_down(tile, sums, shared.sums);
    if (!inside || static_cast<int>(threadIdx.x) >= tile.across) continue;
    means.store(join.segment * columns + column, sums, scale);
  }
}

void join_spans(const char* op, const Tensor& hidden, const Sequences& sequences, int64_t columns, const Means& means) {
  const int64_t turns = PoolJoin::turns(sequences);
  const int processors = multiprocessors(hidden);
  const auto start = [&]<int N>(std::integral_constant<int, N>) {
    const Tile tile = pool_tile<N>(columns, turns, processors);
    launch(op, join_spans_kernel<N>, grid_of(tile, turns), dim3(kSegmentThreads), sizeof(PoolShared),
           current_stream(hidden), sequences, columns, tile, means);
  };
  with_access<float>(columns % 4 == 0, start);
}

}  // namespace

Tensor geglu_segment_pool(Tensor hidden, std::optional<Tensor> bias, Tensor cu_seqlens, std::optional<Tensor> weights,
                          std::optional<ScalarType> out_dtype) {
  const char* const op = "geglu_segment_pool";
  latent_attention::check_gated(op, hidden, bias, cu_seqlens, weights);
  const ScalarType dtype = latent_attention::checked_out_dtype(op, hidden, out_dtype);
  const DeviceGuard guard(hidden.get_device_index());
  GatedTensors tensors(hidden, bias, cu_seqlens, weights);
  check_offsets_if_asked(op, "cu_seqlens", tensors.offsets, hidden.size(0));
  const Sequences sequences = tensors.sequences();
  const int64_t columns = hidden.size(1) / 2;
  Tensor out = empty_like_device(hidden, {sequences.count, columns}, dtype);
  if (out.numel() == 0) return out;
  // only sequences longer than a span leave partial sums
  Tensor parts = empty_like_device(hidden, {PoolSpan::parts(sequences), columns}, ScalarType::Float);
  void* const to = dtype == ScalarType::Float ? static_cast<void*>(mutable_pointer<float>(out))
                                              : static_cast<void*>(mutable_pointer<uint16_t>(out));
  const Means means = {to, element_of(dtype), mutable_pointer<float>(parts)};
  const int64_t turns = PoolSpan::turns(sequences);
  with_float_type(hidden.scalar_type(), [&]<class T>(T) {
    const GatedRows<T> gated = tensors.rows<T>();
    with_access<T>(tensors.are_wide<T>(), [&]<int N>(std::integral_constant<int, N>) {
      const Tile tile = pool_tile<N>(columns, turns, multiprocessors(hidden));
      launch(op, gated_pool_kernel<T, N>, grid_of(tile, turns), dim3(kSegmentThreads), sizeof(PoolShared),
             current_stream(hidden), gated, sequences, tile, means);
    });
  });
  if (sequences.total > kSpan) join_spans(op, hidden, sequences, columns, means);
  return out;
}

}  // namespace embedding_kernels::cuda

// Gradients of the mean of gated rows on CUDA: of rows, biases and weights, from one reading of the rows.
//
// In bfloat16 with F columns a row has 4 F bytes to read and as many to write. 8,192 rows of F = 16,384 are 1.07 GB,
// 224 us of 4.8 TB/s; some 45 instructions a product are 210 us of 132 multiprocessors.
#include "../kernels.h"
#include "../latent_attention_checks.h"
#include "latent_attention.cuh"

namespace embedding_kernels::cuda {
namespace {

constexpr int kRowsAtOnce = 2;
constexpr int64_t kColumnsABlock = 4096;

struct PooledGrad {
  const void* grad;  // [sequences, columns]
  Element element;
  int64_t stride, columns;
};

// Of each sequence the scale, and the gradient of its mean times that: what a row of weight 1 gets.
__global__ void __launch_bounds__(kSegmentThreads)
    scale_kernel(PooledGrad grad, Sequences sequences, float* __restrict__ scales, float* __restrict__ scaled) {
  auto& shared = shared_memory<PoolShared>();
  const int64_t strips = (grad.columns + kColumnsABlock - 1) / kColumnsABlock;
  const int64_t sequence = blockIdx.x / strips, column = blockIdx.x % strips * kColumnsABlock;
  const float scale = scale_of(sequences, sequences.start(sequence), sequences.end(sequence), shared);
  if (column == 0 && threadIdx.x == 0) scales[sequence] = scale;
  const int64_t end = column + kColumnsABlock < grad.columns ? column + kColumnsABlock : grad.columns;
  for (int64_t c = column + threadIdx.x; c < end; c += kSegmentThreads) {
    scaled[sequence * grad.columns + c] = load_as(grad.element, grad.grad, sequence * grad.stride + c) * scale;
  }
}

// What a gradient is made of and where its parts go.
template <class T>
struct Gradient {
  const float* scales;  // [sequences]
  const float* scaled;  // [sequences, columns]
  T* rows;              // [total, 2 columns]
  float* bias_parts;    // [turns, 2 columns]
  float* products;      // [tiles, total] or null: of a tile's columns, scaled gradient times gated product
};

// The sequence of each row of a turn, or -1 where there is none or one without weight, whose rows get no gradient
// whatever they hold.
__device__ inline void find_sequences(const Sequences& sequences, const float* scales, int64_t start,
                                      PoolShared& shared) {
  const int64_t last = (start + kSpan < sequences.total ? start + kSpan : sequences.total) - 1;
  int64_t low = segment_of(sequences, start) + 1, high = segment_of(sequences, last) + 1;
  const int64_t row = start + threadIdx.x;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    const bool above = sequences.start(middle) > row;
    high = above ? middle : high;
    low = above ? low : middle + 1;
  }
  const int64_t sequence = low - 1;
  const bool found = sequence >= 0 && sequence < sequences.count && scales[sequence] != 0;
  shared.sequences[threadIdx.x] = found ? static_cast<int32_t>(sequence) : -1;
  ptx::sync_block();
}

template <int N>
struct GatedSlopes {
  float of_value[N], of_gate[N];
  float product;
};

// Gradients of N values and gates from that of their weighted products.
template <class T, int N>
__device__ inline GatedSlopes<N> gated_slopes(const RawGated<T, N>& raw, const float (&value_bias)[N],
                                              const float (&gate_bias)[N], const float (&grad)[N], float weight) {
  constexpr float inverse_root = 0.398942280401432678f, half_log2e = 0.72134752044448170f;
  GatedSlopes<N> slopes;
  widen(raw.value, slopes.of_gate);
  widen(raw.gate, slopes.of_value);
  slopes.product = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float value = slopes.of_gate[i] + value_bias[i], gate = slopes.of_value[i] + gate_bias[i];
    const float distribution = normal_distribution(gate), weighted = grad[i] * weight;
    const float density = inverse_root * ptx::exp2_near(gate * gate * -half_log2e);
    slopes.product += grad[i] * value * (gate * distribution);
    slopes.of_value[i] = weighted * (gate * distribution);
    slopes.of_gate[i] = weighted * value * (distribution + gate * density);
  }
  return slopes;
}

// A turn takes kSpan rows, whichever sequences they are in. Rows of the block go in step: all lanes of a warp come to
// the sums over a row.
template <class T, int N>
__global__ void __launch_bounds__(kSegmentThreads, 2)
    gated_gradient_kernel(GatedRows<T> gated, Sequences sequences, Tile tile, Gradient<T> out) {
  auto& shared = shared_memory<PoolShared>();
  const int64_t turn = blockIdx.x / tile.at_once, start = turn * kSpan, columns = gated.columns;
  find_sequences(sequences, out.scales, start, shared);
  for (int64_t t = blockIdx.x % tile.at_once; t < tile.count; t += tile.at_once) {
    const int64_t column = t * tile.width + threadIdx.x % tile.across * N;
    const bool inside = column < columns;
    float value_bias[N] = {}, gate_bias[N] = {}, value_sums[N] = {}, gate_sums[N] = {}, grad[N] = {};
    if (inside) {
      gated.load_bias(column, value_bias);
      gated.load_bias(columns + column, gate_bias);
    }
    int held = -1;
    for (int i = threadIdx.x / tile.across; i < kSpan; i += kRowsAtOnce * tile.down) {
      RawGated<T, N> raw[kRowsAtOnce] = {};
      int owner[kRowsAtOnce];
#pragma unroll
      for (int u = 0; u < kRowsAtOnce; ++u) {
        const int place = i + u * tile.down;
        owner[u] = inside && place < kSpan && start + place < sequences.total ? shared.sequences[place] : -1;
        if (owner[u] >= 0) raw[u] = load_gated<T, N>(gated, start + place, column);
      }
#pragma unroll
      for (int u = 0; u < kRowsAtOnce; ++u) {
        const int64_t row = start + i + u * tile.down;
        const bool written = i + u * tile.down < kSpan && row < sequences.total;
        GatedSlopes<N> slopes = {};
        if (owner[u] >= 0) {
          if (owner[u] != held) load_floats(out.scaled + owner[u] * columns + column, grad);
          held = owner[u];
          slopes = gated_slopes(raw[u], value_bias, gate_bias, grad, sequences.weight(row));
#pragma unroll
          for (int j = 0; j < N; ++j) {
            value_sums[j] += slopes.of_value[j];
            gate_sums[j] += slopes.of_gate[j];
          }
        }
        if (written && inside) {
          store<T, N>(out.rows + row * (2 * columns) + column, slopes.of_value);
          store<T, N>(out.rows + row * (2 * columns) + columns + column, slopes.of_gate);
        }
        if (out.products == nullptr) continue;
        float product = slopes.product;
        for (int lanes = tile.across / 2; lanes > 0; lanes /= 2) product += ptx::shuffle_xor(product, lanes);
        if (written && threadIdx.x % tile.across == 0) out.products[t * sequences.total + row] = product;
      }
    }
    float* const parts = out.bias_parts + turn * (2 * columns) + column;
    const bool first = inside && static_cast<int>(threadIdx.x) < tile.across;
    sum_down(tile, value_sums, shared.sums);
    if (first) store_floats(parts, value_sums);
    sum_down(tile, gate_sums, shared.sums);
    if (first) store_floats(parts + columns, gate_sums);
  }
}

// out[c] = sum of parts[r, c] over r.
template <int N>
__global__ void __launch_bounds__(kSegmentThreads)
    sum_rows_kernel(const float* __restrict__ parts, int64_t rows, int64_t columns, Tile tile,
                    float* __restrict__ out) {
  auto& shared = shared_memory<PoolShared>();
  const int64_t column = blockIdx.x * int64_t{tile.width} + threadIdx.x % tile.across * N;
  const bool inside = column < columns;
  float sums[N] = {}, part[N];
  for (int64_t r = threadIdx.x / tile.across; inside && r < rows; r += tile.down) {
    load_floats(parts + r * columns + column, part);
#pragma unroll
    for (int i = 0; i < N; ++i) sums[i] += part[i];
  }
  sum_down(tile, sums, shared.sums);
  if (inside && static_cast<int>(threadIdx.x) < tile.across) store_floats(out + column, sums);
}

// In place, from each weight's own product the gradient of the mean: less the weighted mean of them all.
__global__ void __launch_bounds__(kSegmentThreads)
    weight_gradient_kernel(Sequences sequences, const float* __restrict__ scales, float* grad_weights) {
  auto& shared = shared_memory<PoolShared>();
  const int64_t sequence = blockIdx.x, first = sequences.start(sequence), last = sequences.end(sequence);
  double sum = 0;
  for (int64_t row = first + threadIdx.x; row < last; row += kSegmentThreads) {
    sum += static_cast<double>(grad_weights[row]) * sequences.weights[row];
  }
  const double mean = sum_block(sum, shared) * scales[sequence];
  for (int64_t row = first + threadIdx.x; row < last; row += kSegmentThreads) {
    grad_weights[row] = static_cast<float>(grad_weights[row] - mean);
  }
}

void sum_rows(const char* op, const Tensor& parts, int64_t rows, int64_t columns, Tensor& out) {
  with_access<float>(columns % 4 == 0, [&]<int N>(std::integral_constant<int, N>) {
    const Tile tile = tile_over<N>(columns, 16);
    launch(op, sum_rows_kernel<N>, dim3(static_cast<unsigned>(tile.count)), dim3(kSegmentThreads), sizeof(PoolShared),
           current_stream(parts), pointer<float>(parts), rows, columns, tile, mutable_pointer<float>(out));
  });
}

PooledGrad pooled(const Tensor& grad) {
  const void* const data = grad.scalar_type() == ScalarType::Float ? static_cast<const void*>(pointer<float>(grad))
                                                                   : static_cast<const void*>(pointer<uint16_t>(grad));
  return {data, element_of(grad.scalar_type()), grad.stride(0), grad.size(1)};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> geglu_segment_pool_backward(Tensor grad, Tensor hidden, std::optional<Tensor> bias,
                                                               Tensor cu_seqlens, std::optional<Tensor> weights) {
  const char* const op = "geglu_segment_pool_backward";
  latent_attention::check_gated(op, hidden, bias, cu_seqlens, weights);
  latent_attention::check_pooled_grad(op, grad, hidden, cu_seqlens.size(0) - 1);
  const DeviceGuard guard(hidden.get_device_index());
  const cudaStream_t stream = current_stream(hidden);
  const GatedTensors tensors(hidden, bias, cu_seqlens, weights);
  check_offsets_if_asked(op, "cu_seqlens", tensors.offsets, hidden.size(0));
  const Sequences sequences = tensors.sequences();
  const int64_t width = hidden.size(1), columns = width / 2, total = sequences.total;
  Tensor grad_hidden = empty_like_device(hidden, {total, width}, hidden.scalar_type());
  Tensor grad_bias = empty_like_device(hidden, {width}, ScalarType::Float);
  Tensor grad_weights = empty_like_device(hidden, {weights ? total : 0}, ScalarType::Float);
  if (grad_hidden.numel() == 0 || sequences.count == 0) {
    for (Tensor* each : {&grad_hidden, &grad_bias, &grad_weights}) {
      fill_zero(op, mutable_pointer<uint8_t>(*each), each->numel() * each->element_size(), stream);
    }
    return {grad_hidden, grad_bias, grad_weights};
  }
  grad = dense_rows(grad);
  Tensor scales = empty_like_device(hidden, {sequences.count}, ScalarType::Float);
  Tensor scaled = empty_like_device(hidden, {sequences.count, columns}, ScalarType::Float);
  const int64_t strips = (columns + kColumnsABlock - 1) / kColumnsABlock;
  launch(op, scale_kernel, dim3(static_cast<unsigned>(sequences.count * strips)), dim3(kSegmentThreads),
         sizeof(PoolShared), stream, pooled(grad), sequences, mutable_pointer<float>(scales),
         mutable_pointer<float>(scaled));
  const int64_t turns = (total + kSpan - 1) / kSpan;
  Tensor bias_parts = empty_like_device(hidden, {turns, width}, ScalarType::Float);
  Tensor products;
  with_float_type(hidden.scalar_type(), [&]<class T>(T) {
    const GatedRows<T> gated = tensors.rows<T>();
    with_access<T>(tensors.are_wide<T>(), [&]<int N>(std::integral_constant<int, N>) {
      const Tile tile = pool_tile<N>(columns, turns, multiprocessors(hidden));
      products = empty_like_device(hidden, {weights ? tile.count : 0, total}, ScalarType::Float);
      const Gradient<T> out = {pointer<float>(scales), pointer<float>(scaled), mutable_pointer<T>(grad_hidden),
                               mutable_pointer<float>(bias_parts),
                               weights ? mutable_pointer<float>(products) : nullptr};
      launch(op, gated_gradient_kernel<T, N>, grid_of(tile, turns), dim3(kSegmentThreads), sizeof(PoolShared), stream,
             gated, sequences, tile, out);
      if (weights) sum_rows(op, products, tile.count, total, grad_weights);
    });
  });
  sum_rows(op, bias_parts, turns, width, grad_bias);
  if (weights) {
    launch(op, weight_gradient_kernel, dim3(static_cast<unsigned>(sequences.count)), dim3(kSegmentThreads),
           sizeof(PoolShared), stream, sequences, pointer<float>(scales), mutable_pointer<float>(grad_weights));
  }
  return {grad_hidden, grad_bias, grad_weights};
}

}  // namespace embedding_kernels::cuda

// Gradients of residual addition and norm on CUDA.
//
// With n the row less its mean, times its scale, and h = weight * grad: grad_x = scale (h - mean(h) - n mean(h n)), the
// first mean for layer norm alone. Read are grad and summed (and grad_summed), written is grad_x: at 16,384 rows of
// 4096 bfloat16 columns 384 MiB (512), 84 us (112) at an H200's 4.8 TB/s.
//
// The gradients of weight and bias are sums over all rows: a block adds up its own in registers, and a second launch
// adds the blocks', in their order and in float64.
#include "../kernels.h"
#include "norm.cuh"
#include "token_prepend.cuh"

namespace embedding_kernels::cuda {
namespace {

constexpr int kHeld = 16;    // values of each of four rows that a thread holds: summed, grad, and the two sums
constexpr int kBlock = 256;  // of several teams, unless one is wider
constexpr int kBlocksAProcessor = 2;
constexpr int64_t kMostSteps = 32;  // rows that one sum in a register runs over: its rounding stays small

template <class T>
struct NormGradient {
  const T *grad, *grad_summed, *summed;
  int64_t grad_stride, grad_summed_stride, summed_stride, rows;
  int columns;
  Vector weight;
  float eps;
  bool centred, one_plus_weight;  // layer norm, else RMS norm
  int team;
  int steps;  // rows of a team
  T* grad_x;
  float *weight_sums, *bias_sums;  // [blocks, columns]; bias_sums may be null
  // The gradient of a row that copy c was written over goes to row c of `copied`; null without copies.
  const int64_t* over;
  float* copied;
};

struct GradientShared {
  TeamSums sums;
  float of_teams[kMostTeam * kHeld];
};

// A row of a NormGradient, as one thread of its team sees it.
template <class T, bool kAligned>
struct GradientRow {
  static constexpr int N = kWide<T>, kChunks = kHeld / N;
  const NormGradient<T>& norm;
  int64_t row;
  int columns;  // none of a row that is not there

  __device__ void load_rows(int at, float (&x)[N], float (&grad)[N]) const {
    load_chunk<kAligned>(norm.summed + row * norm.summed_stride, at, columns, x);
    load_chunk<kAligned>(norm.grad + row * norm.grad_stride, at, columns, grad);
  }
  __device__ void load_more(int at, float (&more)[N]) const {
    load_chunk<kAligned>(norm.grad_summed + row * norm.grad_summed_stride, at,
                         norm.grad_summed != nullptr ? columns : 0, more);
  }
  __device__ void load_weight(int at, float (&weight)[N]) const {
    load_vector<T, kAligned>(norm.weight, at, norm.columns, weight);
#pragma unroll
    for (int i = 0; i < N; ++i) weight[i] = norm.one_plus_weight ? weight[i] + 1 : weight[i];
  }

  // Adds the sums over x less its mean, squared or not, and of weight * grad, times that or not.
  __device__ void add(int at, const float (&x)[N], const float (&grad)[N], const float (&weight)[N], float mean,
                      bool squared, float& of_x, float& of_grad) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float value = at + i < columns ? x[i] - mean : 0, h = grad[i] * weight[i];
      of_x += squared ? value * value : value;
      of_grad += squared ? h * value : h;
    }
  }

  // `x` becomes the normal row. `shift` and `slope` are mean(h) and mean(h n).
  __device__ void write(int at, float (&x)[N], const float (&grad)[N], const float (&weight)[N], const float (&more)[N],
                        float mean, float scale, float shift, float slope) const {
    float value[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      x[i] = at + i < columns ? (x[i] - mean) * scale : 0;
      value[i] = (grad[i] * weight[i] - shift - x[i] * slope) * scale + more[i];
    }
    const int64_t over = norm.over != nullptr && columns > 0 ? norm.over[row] : 0;
    if (over != 0) {
      store_chunk<kAligned>(norm.copied + (over - 1) * norm.columns, at, columns, value);
    } else {
      store_chunk<kAligned>(norm.grad_x + row * norm.columns, at, columns, value);
    }
  }
};

template <class T, bool kAligned>
__global__ void __launch_bounds__(kMostTeam, 1) norm_gradient_kernel(NormGradient<T> norm) {
  using Row = GradientRow<T, kAligned>;
  constexpr int N = Row::N, kChunks = Row::kChunks;
  auto& shared = shared_memory<GradientShared>();
  int turn = 0;
  const int team = norm.team, teams = blockDim.x / team, thread = threadIdx.x % team;
  const auto column = [&](int chunk) { return (chunk * team + thread) * N; };
  const auto count = static_cast<float>(norm.columns);
  float* const weight_sums = norm.weight_sums + static_cast<int64_t>(blockIdx.x) * norm.columns;
  float* const bias_sums =
      norm.bias_sums == nullptr ? nullptr : norm.bias_sums + static_cast<int64_t>(blockIdx.x) * norm.columns;

  float weight_sum[kChunks][N] = {}, bias_sum[kChunks][N] = {};
  for (int step = 0; step < norm.steps; ++step) {
    const int64_t r = (static_cast<int64_t>(blockIdx.x) * norm.steps + step) * teams + threadIdx.x / team;
    const Row row{norm, r, r < norm.rows ? norm.columns : 0};
    float x[kChunks][N], grad[kChunks][N], more[kChunks][N], weight[N];
#pragma unroll
    for (int c = 0; c < kChunks; ++c) row.load_rows(column(c), x[c], grad[c]);
    // all loads of a row under way at once, if the registers allow it
    if constexpr (kAligned) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) row.load_more(column(c), more[c]);
    }

    float mean = 0, shift = 0, of_x = 0, of_grad = 0;
    for (int squared = norm.centred ? 0 : 1; squared < 2; ++squared) {
      mean = of_x / count;
      shift = of_grad / count;
      of_x = of_grad = 0;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        row.load_weight(column(c), weight);
        row.add(column(c), x[c], grad[c], weight, mean, squared, of_x, of_grad);
      }
      for (int at = column(kChunks); at < row.columns; at += team * N) {
        float far_x[N], far_grad[N];
        row.load_rows(at, far_x, far_grad);
        row.load_weight(at, weight);
        row.add(at, far_x, far_grad, weight, mean, squared, of_x, of_grad);
      }
      team_sums(of_x, of_grad, team, shared.sums, turn);
    }
    const float scale = 1 / sqrtf(of_x / count + norm.eps);
    const float slope = of_grad * scale / count;

#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if constexpr (!kAligned) row.load_more(column(c), more[c]);
      row.load_weight(column(c), weight);
      row.write(column(c), x[c], grad[c], weight, more[c], mean, scale, shift, slope);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        weight_sum[c][i] += grad[c][i] * x[c][i];
        bias_sum[c][i] += grad[c][i];
      }
    }
    // sums of what is not held stand in memory; such a team is a block
    for (int at = column(kChunks); at < row.columns; at += team * N) {
      float far_x[N], far_grad[N], far_more[N], sum[N] = {};
      row.load_rows(at, far_x, far_grad);
      row.load_more(at, far_more);
      row.load_weight(at, weight);
      row.write(at, far_x, far_grad, weight, far_more, mean, scale, shift, slope);
      if (step > 0) load_chunk<kAligned>(weight_sums, at, row.columns, sum);
#pragma unroll
      for (int i = 0; i < N; ++i) sum[i] += far_grad[i] * far_x[i];
      store_chunk<kAligned>(weight_sums, at, row.columns, sum);
      if (bias_sums == nullptr) continue;
      if (step > 0) {
        load_chunk<kAligned>(bias_sums, at, row.columns, sum);
#pragma unroll
        for (int i = 0; i < N; ++i) far_grad[i] += sum[i];
      }
      store_chunk<kAligned>(bias_sums, at, row.columns, far_grad);
    }
  }

  const int room = team * kHeld;
  const auto write_sums = [&](const float (&sum)[kChunks][N], float* out) {
    ptx::sync_block();
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int i = 0; i < N; ++i) shared.of_teams[threadIdx.x / team * room + column(c) + i] = sum[c][i];
    }
    ptx::sync_block();
    for (int c = threadIdx.x; c < room && c < norm.columns; c += blockDim.x) {
      float total = 0;
      for (int t = 0; t < teams; ++t) total += shared.of_teams[t * room + c];
      out[c] = total;
    }
  };
  write_sums(weight_sum, weight_sums);
  if (bias_sums != nullptr) write_sums(bias_sum, bias_sums);
}

// ---- sums of the blocks ----

constexpr int kSumColumns = 32, kMostLanes = 32;  // lanes take every so many parts of a column

struct SumShared {
  double of_lanes[kMostLanes][kSumColumns];
};

// Column sums of parts [count, columns]; blockIdx.y picks weight or bias.
__global__ void __launch_bounds__(kSumColumns* kMostLanes)
    add_parts_kernel(const float* weight_sums, const float* bias_sums, int64_t count, int64_t columns,
                     float* grad_weight, float* grad_bias) {
  auto& shared = shared_memory<SumShared>();
  const float* parts = blockIdx.y == 0 ? weight_sums : bias_sums;
  float* out = blockIdx.y == 0 ? grad_weight : grad_bias;
  const int inside = threadIdx.x % kSumColumns, lane = threadIdx.x / kSumColumns, lanes = blockDim.x / kSumColumns;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kSumColumns + inside;
  double total = 0;
  if (column < columns) {
#pragma unroll 4
    for (int64_t part = lane; part < count; part += lanes) total += parts[part * columns + column];
  }
  shared.of_lanes[lane][inside] = total;
  ptx::sync_block();
  if (lane > 0 || column >= columns) return;
  total = 0;
  for (int l = 0; l < lanes; ++l) total += shared.of_lanes[l][inside];
  out[column] = static_cast<float>(total);
}

// ---- host ----

struct Options {
  double eps;
  bool centred, one_plus_weight;
};

struct Gradients {
  Tensor x, weight, bias;
};

Gradients backward(const char* op, Tensor grad, std::optional<Tensor> grad_summed, Tensor summed, Tensor weight,
                   bool with_bias, const Options& options, const CopyTables* copies = nullptr) {
  summed = dense_rows(summed);
  grad = dense_rows(grad);
  if (grad_summed) grad_summed = dense_rows(*grad_summed);
  weight = torch::stable::contiguous(weight);
  const int64_t rows = summed.size(0), columns = summed.size(1);
  Gradients out{empty_like_device(summed, {rows, columns}, summed.scalar_type()),
                empty_like_device(summed, {columns}, ScalarType::Float),
                empty_like_device(summed, {with_bias ? columns : 0}, ScalarType::Float)};
  if (columns == 0) return out;

  const int team = team_of(columns, kHeld), block = team > kBlock ? team : kBlock;
  const int64_t tiles = (rows + block / team - 1) / (block / team);
  const int64_t wanted =
      (tiles + kBlocksAProcessor * multiprocessors(summed) - 1) / (kBlocksAProcessor * multiprocessors(summed));
  const int64_t steps = wanted < kMostSteps ? wanted : kMostSteps,
                blocks = steps == 0 ? 0 : (tiles + steps - 1) / steps;
  Tensor sums = empty_like_device(summed, {with_bias ? 2 : 1, blocks, columns}, ScalarType::Float);
  std::optional<Tensor> copied;
  if (copies != nullptr) copied = empty_like_device(summed, {copies->copies(), columns}, ScalarType::Float);
  const Vector of_weight = vector_of(weight);
  auto* const weight_sums = mutable_pointer<float>(sums);
  auto* const bias_sums = with_bias ? weight_sums + blocks * columns : nullptr;
  const cudaStream_t stream = current_stream(summed);
  with_float_type(summed.scalar_type(), [&](auto type) {
    using T = decltype(type);
    if (blocks == 0) return;
    const bool aligned = rows_are_wide<T>(summed) && rows_are_wide<T>(grad) &&
                         (!grad_summed || rows_are_wide<T>(*grad_summed)) && is_aligned(of_weight);
    const NormGradient<T> norm{pointer<T>(grad),
                               pointer_or_null<T>(grad_summed),
                               pointer<T>(summed),
                               grad.stride(0),
                               grad_summed ? grad_summed->stride(0) : 0,
                               summed.stride(0),
                               rows,
                               static_cast<int>(columns),
                               of_weight,
                               static_cast<float>(options.eps),
                               options.centred,
                               options.one_plus_weight,
                               team,
                               static_cast<int>(steps),
                               mutable_pointer<T>(out.x),
                               weight_sums,
                               bias_sums,
                               copies ? copies->of_rows().over : nullptr,
                               copied ? mutable_pointer<float>(*copied) : nullptr};
    launch(op, aligned ? norm_gradient_kernel<T, true> : norm_gradient_kernel<T, false>,
           dim3(static_cast<unsigned>(blocks)), dim3(block), sizeof(GradientShared), stream, norm);
  });
  int lanes = 1;
  while (lanes < kMostLanes && lanes < blocks) lanes *= 2;
  launch(op, add_parts_kernel, dim3(blocks_for(columns, kSumColumns, INT32_MAX), with_bias ? 2 : 1),
         dim3(kSumColumns * lanes), sizeof(SumShared), stream, weight_sums, bias_sums, blocks, columns,
         mutable_pointer<float>(out.weight), mutable_pointer<float>(out.bias));
  if (copies != nullptr) return_gradients(op, *copies, out.x, copied, out.x);
  return out;
}

}  // namespace

std::tuple<Tensor, Tensor> add_rms_norm_backward(Tensor grad_normed, std::optional<Tensor> grad_summed, Tensor summed,
                                                 Tensor weight, double eps, bool one_plus_weight) {
  const char* const op = "add_rms_norm_backward";
  check_norm_backward(op, grad_normed, grad_summed, summed, weight, std::nullopt, eps);
  const DeviceGuard guard(summed.get_device_index());
  const Gradients out = backward(op, grad_normed, grad_summed, summed, weight, false, {eps, false, one_plus_weight});
  return {out.x, out.weight};
}

std::tuple<Tensor, Tensor, Tensor> add_layer_norm_backward(Tensor grad_normed, std::optional<Tensor> grad_summed,
                                                           Tensor summed, Tensor weight, std::optional<Tensor> bias,
                                                           double eps) {
  const char* const op = "add_layer_norm_backward";
  check_norm_backward(op, grad_normed, grad_summed, summed, weight, bias, eps);
  const DeviceGuard guard(summed.get_device_index());
  const Gradients out = backward(op, grad_normed, grad_summed, summed, weight, bias.has_value(), {eps, true, false});
  return {out.x, out.weight, out.bias};
}

std::tuple<Tensor, Tensor> token_prepend_rms_norm_backward(Tensor grad_normed, std::optional<Tensor> grad_summed,
                                                           Tensor summed, Tensor source_rows, Tensor target_rows,
                                                           Tensor weight, double eps, bool one_plus_weight) {
  const char* const op = "token_prepend_rms_norm_backward";
  check_tensor(op, "summed", summed, kNormRows, kFloats, 2);
  const DeviceGuard guard(summed.get_device_index());
  check_copies(op, source_rows, target_rows, summed, "summed");
  check_norm_backward(op, grad_normed, grad_summed, summed, weight, std::nullopt, eps);
  const CopyTables copies(op, source_rows, target_rows, summed.size(0));
  const Gradients out =
      backward(op, grad_normed, grad_summed, summed, weight, false, {eps, false, one_plus_weight}, &copies);
  return {out.x, out.weight};
}

}  // namespace embedding_kernels::cuda

// Residual addition and norm on CUDA, with token prepending where rows are copied between the two.
//
// A row is read once and written once or twice: at 4096 columns of bfloat16 add_rms_norm moves 16 KiB in and as much
// out for each row. 16,384 rows are 512 MiB, 112 us at an H200's 4.8 TB/s.
#include "../kernels.h"
#include "norm.cuh"
#include "token_prepend.cuh"

namespace embedding_kernels::cuda {
namespace {

constexpr int kHeld = 16;  // values of a row that a thread holds
constexpr int kLeastBlock = 128, kBlocksAProcessor = 16;

template <class T>
struct Norm {
  const T *x, *residual;
  int64_t x_stride, residual_stride, rows;
  int columns;
  const int64_t* shifts;  // row r of the outputs is of row r + shifts[r]; null for no copies
  Vector weight, bias;
  float eps;
  bool centred, one_plus_weight;  // layer norm, else RMS norm
  int team;
  T *normed, *summed;
};

// A row of a Norm, as one thread of its team sees it.
template <class T, bool kAligned>
struct NormRow {
  static constexpr int N = kWide<T>, kChunks = kHeld / N;
  const Norm<T>& norm;
  int64_t row;
  int columns;  // none of a row that is not there

  // Without a branch, so that all loads of a row are under way at once.
  __device__ void load(int64_t place, int at, float (&values)[N], float (&more)[N]) const {
    load_chunk<kAligned>(norm.x + place * norm.x_stride, at, columns, values);
    load_chunk<kAligned>(norm.residual + place * norm.residual_stride, at, norm.residual != nullptr ? columns : 0,
                         more);
  }

  // x + residual, rounded as it is handed on.
  __device__ void add(float (&values)[N], const float (&more)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      values[i] = norm.residual != nullptr ? widen(round_to<T>(values[i] + more[i])) : values[i];
    }
  }

  __device__ void hand_on(int at, const float (&values)[N]) const {
    if (norm.summed != nullptr) store_chunk<kAligned>(norm.summed + row * norm.columns, at, columns, values);
  }

  // The sum where it is not held.
  __device__ void again(int64_t place, int at, float (&values)[N]) const {
    if (norm.summed != nullptr) {
      load_chunk<kAligned>(norm.summed + row * norm.columns, at, columns, values);
    } else {
      load_chunk<kAligned>(norm.x + place * norm.x_stride, at, columns, values);
    }
  }

  // The squares of the values less their mean, or their values.
  __device__ float sum(int at, const float (&values)[N], float mean, bool squared) const {
    float total = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float value = at + i < columns ? values[i] - mean : 0;
      total += squared ? value * value : value;
    }
    return total;
  }

  __device__ void write(int at, const float (&values)[N], float mean, float scale) const {
    float weight[N], bias[N], normed[N];
    load_vector<T, kAligned>(norm.weight, at, columns, weight);
    if (norm.bias.data != nullptr) load_vector<T, kAligned>(norm.bias, at, columns, bias);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      normed[i] = (values[i] - mean) * scale * (norm.one_plus_weight ? weight[i] + 1 : weight[i]);
      if (norm.bias.data != nullptr) normed[i] += bias[i];
    }
    store_chunk<kAligned>(norm.normed + row * norm.columns, at, columns, normed);
  }
};

template <class T, bool kAligned>
__global__ void __launch_bounds__(kMostTeam, 1) norm_kernel(Norm<T> norm) {
  using Row = NormRow<T, kAligned>;
  constexpr int N = Row::N, kChunks = Row::kChunks;
  auto& sums = shared_memory<TeamSums>();
  int turn = 0;
  const int teams = blockDim.x / norm.team, thread = threadIdx.x % norm.team;
  const auto column = [&](int chunk) { return (chunk * norm.team + thread) * N; };
  const auto count = static_cast<float>(norm.columns);
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * teams; first < norm.rows;
       first += static_cast<int64_t>(gridDim.x) * teams) {
    const int64_t r = first + threadIdx.x / norm.team;
    const Row row{norm, r, r < norm.rows ? norm.columns : 0};
    const int64_t place = norm.shifts != nullptr && r < norm.rows ? r + norm.shifts[r] : r;

    float held[kChunks][N], more[kChunks][N];
#pragma unroll
    for (int c = 0; c < kChunks; ++c) row.load(place, column(c), held[c], more[c]);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      row.add(held[c], more[c]);
      row.hand_on(column(c), held[c]);
    }
    for (int at = column(kChunks); at < row.columns; at += norm.team * N) {
      float values[N], far_more[N];
      row.load(place, at, values, far_more);
      row.add(values, far_more);
      row.hand_on(at, values);
    }

    // centred before it is squared: the mean square less the squared mean cancels
    float mean = 0, total = 0;
    for (int squared = norm.centred ? 0 : 1; squared < 2; ++squared) {
      mean = total / count;
      total = 0;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) total += row.sum(column(c), held[c], mean, squared);
      for (int at = column(kChunks); at < row.columns; at += norm.team * N) {
        float values[N];
        row.again(place, at, values);
        total += row.sum(at, values, mean, squared);
      }
      float unused = 0;
      team_sums(total, unused, norm.team, sums, turn);
    }
    const float scale = 1 / sqrtf(total / count + norm.eps);

#pragma unroll
    for (int c = 0; c < kChunks; ++c) row.write(column(c), held[c], mean, scale);
    for (int at = column(kChunks); at < row.columns; at += norm.team * N) {
      float values[N];
      row.again(place, at, values);
      row.write(at, values, mean, scale);
    }
  }
}

template <class T>
void launch_norm(const char* op, const Norm<T>& norm, bool aligned, const Tensor& x) {
  const int block = norm.team > kLeastBlock ? norm.team : kLeastBlock;
  const int64_t most = int64_t{kBlocksAProcessor} * multiprocessors(x);
  launch(op, aligned ? norm_kernel<T, true> : norm_kernel<T, false>,
         dim3(blocks_for(norm.rows, block / norm.team, most)), dim3(block), sizeof(TeamSums), current_stream(x), norm);
}

struct Options {
  double eps;
  bool centred, one_plus_weight;
};

std::tuple<Tensor, Tensor> forward(const char* op, Tensor x, std::optional<Tensor> residual, Tensor weight,
                                   std::optional<Tensor> bias, const Options& options,
                                   const std::optional<Tensor>& shifts = std::nullopt, bool copies = false) {
  x = dense_rows(x);
  if (residual) residual = dense_rows(*residual);
  weight = torch::stable::contiguous(weight);
  if (bias) bias = torch::stable::contiguous(*bias);
  const int64_t rows = x.size(0), columns = x.size(1);
  Tensor normed = empty_like_device(x, {rows, columns}, x.scalar_type());
  const bool sums = residual || copies;
  Tensor summed =
      sums ? empty_like_device(x, {rows, columns}, x.scalar_type()) : empty_like_device(x, {0}, x.scalar_type());
  if (rows == 0 || columns == 0) return {normed, summed};
  const Vector of_weight = vector_of(weight), of_bias = vector_of(bias);
  with_float_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const bool aligned = rows_are_wide<T>(x) && (!residual || rows_are_wide<T>(*residual)) && is_aligned(of_weight) &&
                         is_aligned(of_bias);
    const Norm<T> norm{pointer<T>(x),
                       pointer_or_null<T>(residual),
                       x.stride(0),
                       residual ? residual->stride(0) : 0,
                       rows,
                       static_cast<int>(columns),
                       pointer_or_null<int64_t>(shifts),
                       of_weight,
                       of_bias,
                       static_cast<float>(options.eps),
                       options.centred,
                       options.one_plus_weight,
                       team_of(columns, kHeld),
                       mutable_pointer<T>(normed),
                       sums ? mutable_pointer<T>(summed) : nullptr};
    launch_norm(op, norm, aligned, x);
  });
  return {normed, summed};
}

}  // namespace

std::tuple<Tensor, Tensor> add_rms_norm(Tensor x, std::optional<Tensor> residual, Tensor weight, double eps,
                                        bool one_plus_weight) {
  const char* const op = "add_rms_norm";
  check_norm(op, x, residual, weight, std::nullopt, eps);
  const DeviceGuard guard(x.get_device_index());
  return forward(op, x, residual, weight, std::nullopt, {eps, false, one_plus_weight});
}

std::tuple<Tensor, Tensor> add_layer_norm(Tensor x, std::optional<Tensor> residual, Tensor weight,
                                          std::optional<Tensor> bias, double eps) {
  const char* const op = "add_layer_norm";
  check_norm(op, x, residual, weight, bias, eps);
  const DeviceGuard guard(x.get_device_index());
  return forward(op, x, residual, weight, bias, {eps, true, false});
}

std::tuple<Tensor, Tensor> token_prepend_rms_norm(Tensor x, std::optional<Tensor> residual, Tensor source_rows,
                                                  Tensor target_rows, Tensor weight, double eps, bool one_plus_weight) {
  const char* const op = "token_prepend_rms_norm";
  check_tensor(op, "x", x, kNormRows, kFloats, 2);
  const DeviceGuard guard(x.get_device_index());
  check_copies(op, source_rows, target_rows, x, "x");
  check_norm(op, x, residual, weight, std::nullopt, eps);
  const std::optional<Tensor> shifts = shifts_of(op, source_rows, target_rows, x.size(0));
  return forward(op, x, residual, weight, std::nullopt, {eps, false, one_plus_weight}, shifts, true);
}

}  // namespace embedding_kernels::cuda

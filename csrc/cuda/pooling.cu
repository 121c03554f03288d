// segment_pool and segment_pool_pack_bits on CUDA.
//
// Each row is read once: 16,384 rows of 1024 bfloat16 columns are 32 MiB, 7 us at an H200's 4.8 TB/s, in 1024 blocks of
// 32 KiB. Sums are compensated, so that their error does not grow with the length of a sequence.
#include "../kernels.h"
#include "pooling.cuh"

namespace embedding_kernels::cuda {
namespace {

// Where vectors go: floats of one type, or bits.
struct Vectors {
  void* data;
  Element element;
  int columns;
};

// One value; all lanes of a warp come, with neighbouring columns from a multiple of 32 on.
__device__ inline void store_column(const Vectors& out, int64_t vector, int column, bool inside, float value) {
  if (out.element == Element::kBits) {
    // reversed, so that the first of 32 values is the top bit; byte 0 is then the top byte
    const uint32_t bits = ptx::reverse_bits(ptx::vote_ballot(inside && value > 0));
    const int lane = threadIdx.x % kWarp, width = (out.columns + 7) / 8, byte = (column - lane) / 8 + lane;
    if (lane < 4 && byte < width) {
      static_cast<uint8_t*>(out.data)[vector * width + byte] = static_cast<uint8_t>(bits >> (24 - 8 * lane));
    }
    return;
  }
  if (inside) store_element(out.data, out.element, vector * out.columns + column, value);
}

// ---- a strip of rows ----

template <int N>
struct PoolShared {
  float of_lanes[kPoolLanes][kStripChunks * N];
  double weights[kPoolLanes];
};

// A thread's chunk of columns over every 16th row.
template <int N>
struct Pooled {
  float values[N], lost[N];
  double weights = 0;

  __device__ explicit Pooled(bool largest) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      values[i] = largest ? -INFINITY : 0;
      lost[i] = 0;
    }
  }
  __device__ void add(int i, float value) {
    const float mended = value - lost[i], sum = values[i] + mended, excess = (sum - values[i]) - mended;
    // inf - inf: an infinite sum has lost nothing and stays infinite
    lost[i] = excess == excess ? excess : 0;
    values[i] = sum;
  }
};

// Four rows at a time, so that their loads are under way at once. `weights.sums` tells sums from maxima.
template <class T, bool kAligned, int N>
__device__ inline void take_rows(const T* rows, int64_t stride, int64_t first, int64_t last, int column, int columns,
                                 const RowWeights& weights, int64_t start, Pooled<N>& pooled) {
  constexpr int kAtOnce = 4;
  for (int64_t row = first + threadIdx.x / kStripChunks; row < last; row += kAtOnce * kPoolLanes) {
    float x[kAtOnce][N], weight[kAtOnce];
    load_chunks<kAligned>(rows + row * stride, kPoolLanes * stride, (last - row + kPoolLanes - 1) / kPoolLanes, column,
                          columns, x);
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int64_t r = row + k * kPoolLanes;
      weight[k] = r < last ? weights.weight(r, start) : 0;
    }
    if (weights.sums) {
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) pooled.weights += weight[k];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        pooled.add(i, (weight[0] * x[0][i] + weight[1] * x[1][i]) + (weight[2] * x[2][i] + weight[3] * x[3][i]));
      }
    } else {
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          if (row + k * kPoolLanes < last) pooled.values[i] = larger(pooled.values[i], x[k][i]);
        }
      }
    }
  }
}

// Of kCount values `stride` apart, in pairs, which rounds less than in a row.
template <int kCount>
__device__ inline float join(const float* values, int stride, bool largest) {
  if constexpr (kCount == 1) {
    return *values;
  } else {
    const float a = join<kCount / 2>(values, stride, largest);
    const float b = join<kCount / 2>(values + kCount / 2 * stride, stride, largest);
    return largest ? larger(a, b) : a + b;
  }
}

// The block's result for the thread's column of the strip, and for its weights; threads past the strip have none.
template <int N>
__device__ inline float join_lanes(const Pooled<N>& pooled, bool largest, PoolShared<N>& shared, double& weights) {
  const int lane = threadIdx.x / kStripChunks, chunk = threadIdx.x % kStripChunks;
#pragma unroll
  for (int i = 0; i < N; ++i) shared.of_lanes[lane][chunk * N + i] = pooled.values[i];
  if (chunk == 0) shared.weights[lane] = pooled.weights;
  ptx::sync_block();
  weights = 0;
  if (threadIdx.x >= kStripChunks * N) return 0;
  for (int l = 0; l < kPoolLanes; ++l) weights += shared.weights[l];
  return join<kPoolLanes>(&shared.of_lanes[0][threadIdx.x], kStripChunks * N, largest);
}

template <class T>
struct Pool {
  const T* rows;
  int64_t stride;
  int strips;
  Parts parts;
  RowWeights weights;
  Vectors out;
  // of sequences of several parts: [slots, columns] and [slots]
  float* partial;
  double* partial_weights;
};

__device__ inline void finish_column(const Vectors& out, const RowWeights& weights, const Part& part, int column,
                                     float value, double sum) {
  const float scale = weights.scale(sum, part.length);
  // 0 whatever the rows hold, where there are none or they have no weight
  store_column(out, part.sequence, column, column < out.columns, scale == 0 ? 0 : value * scale);
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kPoolThreads, 3) pool_kernel(Pool<T> pool) {
  constexpr int N = kWide<T>;
  auto& shared = shared_memory<PoolShared<N>>();
  const int64_t slot = blockIdx.x / pool.strips;
  const int strip = static_cast<int>(blockIdx.x % pool.strips) * kStripChunks * N, columns = pool.out.columns;
  const Part part = pool.parts.at_slot(slot);
  if (part.place < 0 || part.place >= part.count) return;
  Pooled<N> pooled(!pool.weights.sums);
  take_rows<T, kAligned>(pool.rows, pool.stride, part.first, part.last,
                         strip + static_cast<int>(threadIdx.x % kStripChunks) * N, columns, pool.weights, part.start,
                         pooled);
  double weights;
  const float value = join_lanes(pooled, !pool.weights.sums, shared, weights);
  if (threadIdx.x >= kStripChunks * N) return;
  const int column = strip + static_cast<int>(threadIdx.x);
  if (part.count == 1) {
    finish_column(pool.out, pool.weights, part, column, value, weights);
    return;
  }
  if (column < columns) pool.partial[slot * columns + column] = value;
  if (column == 0 && pool.weights.given != nullptr) pool.partial_weights[slot] = weights;
}

// The same over the parts of a sequence, which are rows of float32 without weights of their own.
template <bool kAligned>
__global__ void __launch_bounds__(kPoolThreads)
    join_parts_kernel(const float* partial, const double* partial_weights, int strips, Parts parts, RowWeights weights,
                      Vectors out) {
  constexpr int N = kWide<float>;
  auto& shared = shared_memory<PoolShared<N>>();
  const int64_t sequence = blockIdx.x / strips;
  const int strip = static_cast<int>(blockIdx.x % strips) * kStripChunks * N;
  const Part part = parts.part(sequence, 0);
  if (part.count == 1) return;
  const int64_t first = parts.first_slot(sequence), last = first + part.count;
  Pooled<N> pooled(!weights.sums);
  take_rows<float, kAligned>(partial, out.columns, first, last,
                             strip + static_cast<int>(threadIdx.x % kStripChunks) * N, out.columns,
                             RowWeights{nullptr, false, false, weights.sums}, 0, pooled);
  pooled.weights = 0;
  if (weights.given != nullptr) {
    for (int64_t slot = first + threadIdx.x / kStripChunks; slot < last; slot += kPoolLanes) {
      pooled.weights += partial_weights[slot];
    }
  }
  double sum;
  const float value = join_lanes(pooled, !weights.sums, shared, sum);
  if (threadIdx.x >= kStripChunks * N) return;
  finish_column(out, weights, part, strip + static_cast<int>(threadIdx.x), value, sum);
}

// ---- whole vectors: of one row each, or to be normalised ----

constexpr int kVectorThreads = 128, kVectorChunk = 8;

struct VectorShared {
  float of_warps[kVectorThreads / kWarp];
};

// Which row a vector is: its own number, or the first, j-th or last of its sequence.
struct RowOfVector {
  Parts parts;
  int64_t m;
  bool own, last;

  // -1 for none
  __device__ int64_t row(int64_t vector) const {
    if (own) return vector;
    const Part part = parts.part(vector / m, 0);
    const int64_t place = last ? part.length - 1 : vector % m;
    return place >= 0 && place < part.length ? part.start + place : -1;
  }
};

template <class T, bool kAligned>
__global__ void __launch_bounds__(kVectorThreads)
    finish_vectors_kernel(const T* rows, int64_t stride, RowOfVector row_of, bool normalize, Vectors out) {
  constexpr int N = kVectorChunk;
  auto& shared = shared_memory<VectorShared>();
  const int64_t vector = blockIdx.x, row = row_of.row(vector);
  const T* const from = rows + (row < 0 ? 0 : row * stride);
  const int columns = row < 0 ? 0 : out.columns;
  float scale = 1;
  if (normalize) {
    float squares = 0;
    for (int column = threadIdx.x * N; column < columns; column += kVectorThreads * N) {
      float x[N];
      load_chunk<kAligned>(from, column, columns, x);
#pragma unroll
      for (int i = 0; i < N; ++i) squares += x[i] * x[i];
    }
    squares = warp_sum(squares);
    if (threadIdx.x % kWarp == 0) shared.of_warps[threadIdx.x / kWarp] = squares;
    ptx::sync_block();
    squares = 0;
#pragma unroll
    for (int w = 0; w < kVectorThreads / kWarp; ++w) squares += shared.of_warps[w];
    const float norm = sqrtf(squares);
    // a norm that is no number stays none
    scale = 1 / (norm < kNormEps ? kNormEps : norm);
  }
  for (int column = threadIdx.x * N; column < out.columns; column += kVectorThreads * N) {
    float x[N];
    load_chunk<kAligned>(from, column, columns, x);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] *= scale;
    const int64_t at = vector * out.columns;
    if (out.element == Element::kFloat32) {
      store_chunk<kAligned>(static_cast<float*>(out.data) + at, column, out.columns, x);
    } else if (out.element == Element::kBFloat16) {
      store_chunk<kAligned>(static_cast<BFloat16*>(out.data) + at, column, out.columns, x);
    } else if (out.element == Element::kFloat16) {
      store_chunk<kAligned>(static_cast<Float16*>(out.data) + at, column, out.columns, x);
    } else {
      uint32_t bits = 0;
#pragma unroll
      for (int i = 0; i < N; ++i) bits |= (x[i] > 0 ? 1u : 0u) << (7 - i);
      static_cast<uint8_t*>(out.data)[vector * ((out.columns + 7) / 8) + column / 8] = static_cast<uint8_t>(bits);
    }
  }
}

// ---- host ----

Vectors vectors_of(Tensor& out, int64_t columns) {
  return {mutable_pointer<uint8_t>(out), element_of(out.scalar_type()), static_cast<int>(columns)};
}

// `rows` are hidden or, as they are, pooled.
void finish_vectors(const PoolingCall& call, const Tensor& rows, const RowOfVector& row_of, bool normalize,
                    Tensor& out) {
  const int64_t columns = call.columns, vectors = (call.offsets.size(0) - 1) * call.m;
  with_float_type(rows.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const bool aligned = columns % kVectorChunk == 0 && rows_are_wide(pointer<T>(rows), rows.stride(0), columns);
    launch(call.op, aligned ? finish_vectors_kernel<T, true> : finish_vectors_kernel<T, false>,
           dim3(static_cast<unsigned>(vectors)), dim3(kVectorThreads), sizeof(VectorShared), current_stream(rows),
           pointer<T>(rows), rows.stride(0), row_of, normalize, vectors_of(out, columns));
  });
}

// Sums and maxima, over parts where a sequence may have several.
void pool_strips(const PoolingCall& call, const Parts& parts, Tensor& out) {
  const int64_t columns = call.columns, slots = may_split(parts) ? slots_of(parts) : 0;
  Tensor partial = empty_like_device(out, {slots, columns}, ScalarType::Float);
  Tensor partial_weights = empty_like_device(out, {call.weights ? slots : 0}, ScalarType::Double);
  const RowWeights weights = weights_of(call.mode, call.weights);
  const Vectors vectors = vectors_of(out, columns);
  auto* const sums = mutable_pointer<float>(partial);
  auto* const weight_sums = mutable_pointer<double>(partial_weights);
  const cudaStream_t stream = current_stream(out);
  with_float_type(call.hidden.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const bool aligned = rows_are_wide(pointer<T>(call.hidden), call.hidden.stride(0), columns);
    const unsigned strips = strips_of<T>(columns);
    launch(call.op, aligned ? pool_kernel<T, true> : pool_kernel<T, false>, blocks_of(slots_of(parts), strips),
           dim3(kPoolThreads), sizeof(PoolShared<kWide<T>>), stream,
           Pool<T>{pointer<T>(call.hidden), call.hidden.stride(0), static_cast<int>(strips), parts, weights, vectors,
                   sums, weight_sums});
  });
  if (!may_split(parts)) return;
  const unsigned strips = strips_of<float>(columns);
  launch(call.op, columns % kWide<float> == 0 ? join_parts_kernel<true> : join_parts_kernel<false>,
         blocks_of(parts.sequences, strips), dim3(kPoolThreads), sizeof(PoolShared<kWide<float>>), stream, sums,
         weight_sums, static_cast<int>(strips), parts, weights, vectors);
}

PoolingCall checked_call(const char* op, const Tensor& hidden, const Tensor& offsets, const std::string& mode,
                         int64_t m, const std::optional<Tensor>& weights, std::optional<int64_t> truncate_dim) {
  check_tensor(op, "hidden", hidden, kPoolingRows, kFloats, 2);
  const PoolingMode checked =
      check_pooling(op, "hidden", hidden, offsets, hidden.size(0), hidden.size(1), mode, m, weights, truncate_dim);
  return {op, hidden, offsets, checked, m, weights, truncate_dim.value_or(hidden.size(1))};
}

// On the device of the call.
void make_dense(PoolingCall& call) {
  call.offsets = torch::stable::contiguous(call.offsets);
  check_offsets_if_asked(call.op, "cu_seqlens", call.offsets, call.hidden.size(0));
  call.hidden = dense_rows(call.hidden);
  if (call.weights) call.weights = torch::stable::contiguous(*call.weights);
}

Tensor empty_vectors(const PoolingCall& call, int64_t width, ScalarType dtype) {
  const int64_t sequences = call.offsets.size(0) - 1;
  return call.mode == PoolingMode::first_m ? empty_like_device(call.hidden, {sequences, call.m, width}, dtype)
                                           : empty_like_device(call.hidden, {sequences, width}, dtype);
}

}  // namespace

void pool(const PoolingCall& call, bool normalize, Tensor& out) {
  if (out.numel() == 0) return;
  const Parts parts = parts_of(call.offsets, call.hidden.size(0));
  if (!sums_rows(call.mode) && call.mode != PoolingMode::max) {
    const RowOfVector row_of{parts, call.m, false, call.mode == PoolingMode::last};
    finish_vectors(call, call.hidden, row_of, normalize, out);
  } else if (normalize) {
    Tensor pooled = empty_like_device(out, {parts.sequences, call.columns}, ScalarType::Float);
    pool_strips(call, parts, pooled);
    finish_vectors(call, pooled, {parts, 1, true, false}, true, out);
  } else {
    pool_strips(call, parts, out);
  }
}

Tensor segment_pool(Tensor hidden, Tensor cu_seqlens, std::string mode, int64_t m, std::optional<Tensor> weights,
                    bool normalize, std::optional<int64_t> truncate_dim, std::optional<ScalarType> out_dtype) {
  const char* const op = "segment_pool";
  PoolingCall call = checked_call(op, hidden, cu_seqlens, mode, m, weights, truncate_dim);
  const DeviceGuard guard(hidden.get_device_index());
  make_dense(call);
  Tensor out = empty_vectors(call, call.columns, checked_out_dtype(op, hidden, out_dtype));
  pool(call, normalize, out);
  return out;
}

Tensor segment_pool_pack_bits(Tensor hidden, Tensor cu_seqlens, std::string mode, int64_t m,
                              std::optional<Tensor> weights, std::optional<int64_t> truncate_dim) {
  PoolingCall call = checked_call("segment_pool_pack_bits", hidden, cu_seqlens, mode, m, weights, truncate_dim);
  const DeviceGuard guard(hidden.get_device_index());
  make_dense(call);
  Tensor out = empty_vectors(call, (call.columns + 7) / 8, ScalarType::Byte);
  pool(call, false, out);
  return out;
}

}  // namespace embedding_kernels::cuda

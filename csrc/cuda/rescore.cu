// rescore_topk: the scores of all candidates, gathered row by row, then the place of each among its query's.
//
// A gather of whole rows: bytes decide, candidates times the bytes of a row, at the speed of memory for rows of 128
// bytes and more. Places come from comparing every two candidates of a query, 256 at a time from shared memory: exact
// and without an order to keep, whatever repeats, for as many candidates and answers as there are; a few instructions
// a pair, so that 1,000 candidates of a query cost about as much as their rows of 1,024 bytes.
#include "../hamming_checks.h"
#include "../kernels.h"
#include "floats.cuh"
#include "launch.cuh"
#include "ptx.cuh"

namespace embedding_kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRowsAWarp = 4;        // rows under way at once, which share what is read of the query
constexpr int kQueryColumns = 2048;  // values of a query in shared memory at a time

struct Rows {
  const void* queries;
  ScalarType query_dtype;
  int64_t query_stride, dim;
  const float* scale;         // [dim] or null
  const int64_t* candidates;  // [queries, candidate_count]
  int64_t candidate_count;
  const void* vectors;
  int64_t vector_count, stride;  // in elements
  int64_t blocks;                // of candidates, a query
};

// Eight dimensions.
struct Bits {
  uint8_t value;
};
struct Int8 {
  int8_t value;
};

// What a thread reads at once of a row of T: kMost dimensions by 16 bytes (bits: 8 by one), or kLeast, and their
// product with as many of the query.
template <class T>
struct Access {
  static constexpr int kMost = kWide<T>, kLeast = 1, kDims = 1;

  static __device__ float product(const float (&query)[1], T value, float sum) {
    return ptx::fused_multiply_add(query[0], widen(value), sum);
  }
  static __device__ float product(const float (&query)[kMost], const ptx::Words4& words, float sum) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        sum = ptx::fused_multiply_add(query[i], ptx::float_of(words.word[i]), sum);
      } else {
        float first, second;
        unpack_pair<T>(words.word[i], first, second);
        sum = ptx::fused_multiply_add(query[2 * i + 1], second, ptx::fused_multiply_add(query[2 * i], first, sum));
      }
    }
    return sum;
  }
};
template <>
struct Access<Int8> {
  static constexpr int kMost = 16, kLeast = 1, kDims = 1;

  static __device__ float product(const float (&query)[1], Int8 value, float sum) {
    return ptx::fused_multiply_add(query[0], static_cast<float>(value.value), sum);
  }
  static __device__ float product(const float (&query)[16], const ptx::Words4& words, float sum) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const auto value = static_cast<int8_t>(words.word[i / 4] >> (i % 4 * 8));
      sum = ptx::fused_multiply_add(query[i], static_cast<float>(value), sum);
    }
    return sum;
  }
};
template <>
struct Access<Bits> {
  static constexpr int kMost = 8, kLeast = 8, kDims = 8;

  // a sum of the chosen values: 0 times infinity does not come into it
  static __device__ float product(const float (&query)[8], Bits bits, float sum) {
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += (bits.value >> (7 - i) & 1) != 0 ? query[i] : 0.0f;
    return sum;
  }
};

template <class T, int N>
__device__ inline auto read(const T* from) {
  if constexpr (N == Access<T>::kLeast) {
    return *from;
  } else {
    return ptx::load_constant_words4(from);
  }
}

__device__ inline float query_value(const Rows& r, int64_t query, int64_t column) {
  const int64_t at = query * r.query_stride + column;
  const float value = r.query_dtype == ScalarType::Float      ? static_cast<const float*>(r.queries)[at]
                      : r.query_dtype == ScalarType::BFloat16 ? widen(static_cast<const BFloat16*>(r.queries)[at])
                                                              : widen(static_cast<const Float16*>(r.queries)[at]);
  return r.scale != nullptr ? value * r.scale[column] : value;
}

struct Query {
  float values[kQueryColumns];
};

template <int N>
__device__ inline void read_query(const Query& query, int column, float (&values)[N]) {
  if constexpr (N == 1) {
    values[0] = query.values[column];
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const ptx::Words4 words = ptx::load_shared_words4(ptx::shared_address(query.values + column + i));
#pragma unroll
      for (int j = 0; j < 4; ++j) values[i + j] = ptx::float_of(words.word[j]);
    }
  }
}

// Scores of kRowsAWarp candidates a warp, N dimensions a lane and row at once. Of one that is no row, anything.
template <class T, int N>
__global__ void __launch_bounds__(kThreads, 2) score_kernel(const Rows r, float* __restrict__ scores) {
  Query& shared = shared_memory<Query>();
  const int lane = threadIdx.x % kWarp;
  const int64_t query = blockIdx.x / r.blocks;
  const int64_t first = ((blockIdx.x % r.blocks) * (kThreads / kWarp) + threadIdx.x / kWarp) * kRowsAWarp;
  const T* rows[kRowsAWarp];
  float sums[kRowsAWarp] = {};
#pragma unroll
  for (int i = 0; i < kRowsAWarp; ++i) {
    const int64_t row = first + i < r.candidate_count ? r.candidates[query * r.candidate_count + first + i] : -1;
    rows[i] = static_cast<const T*>(r.vectors) + (row < 0 || row >= r.vector_count ? 0 : row) * r.stride;
  }
  for (int64_t begin = 0; begin < r.dim; begin += kQueryColumns) {
    ptx::sync_block();
    for (int i = threadIdx.x; i < kQueryColumns; i += kThreads) {
      shared.values[i] = begin + i < r.dim ? query_value(r, query, begin + i) : 0.0f;
    }
    ptx::sync_block();
    const int64_t left = r.dim - begin;
    const int columns = static_cast<int>(left < kQueryColumns ? left : kQueryColumns);
    for (int column = lane * N; column < columns; column += kWarp * N) {
      float values[N];
      read_query(shared, column, values);
      decltype(read<T, N>(rows[0])) read_of[kRowsAWarp];
#pragma unroll
      for (int i = 0; i < kRowsAWarp; ++i) read_of[i] = read<T, N>(rows[i] + (begin + column) / Access<T>::kDims);
#pragma unroll
      for (int i = 0; i < kRowsAWarp; ++i) sums[i] = Access<T>::product(values, read_of[i], sums[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kRowsAWarp; ++i) {
    const float score = warp_sum(sums[i]);
    if (lane == 0 && first + i < r.candidate_count) scores[query * r.candidate_count + first + i] = score;
  }
}

// In the order of scores: zeros are equal, what is not a number counts as -infinity.
__device__ inline uint32_t order_key(float score) {
  const float ordered = score == score ? (score == 0.0f ? 0.0f : score) : -INFINITY;
  const uint32_t bits = ptx::bits_of(ordered);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

struct Compared {
  int64_t indices[kThreads];
  uint32_t keys[kThreads];
};

// What an absent candidate is while candidates are compared: after all rows.
constexpr int64_t kPastAllRows = 0x7fffffffffffffff;

// Each candidate to its place: highest score first, then the lowest index, then the first of equal ones.
__global__ void __launch_bounds__(kThreads)
    rank_kernel(const float* __restrict__ scores, const int64_t* __restrict__ candidates, int64_t count,
                int64_t vector_count, int64_t blocks, int64_t k, float* __restrict__ out_scores,
                int64_t* __restrict__ out_indices) {
  Compared& others = shared_memory<Compared>();
  const int64_t query = blockIdx.x / blocks, own = (blockIdx.x % blocks) * kThreads + threadIdx.x;
  const auto index_of = [&](int64_t at) {
    const int64_t index = at < count ? candidates[query * count + at] : -1;
    return index < 0 || index >= vector_count ? kPastAllRows : index;
  };
  const auto score_of = [&](int64_t at, int64_t index) {
    return index == kPastAllRows ? -INFINITY : scores[query * count + at];
  };
  const int64_t index = index_of(own);
  const float score = score_of(own, index);
  const uint32_t key = order_key(score);
  int64_t place = 0;
  for (int64_t begin = 0; begin < count; begin += kThreads) {
    ptx::sync_block();
    const int64_t other = begin + threadIdx.x;
    const int64_t their_index = index_of(other);
    others.indices[threadIdx.x] = their_index;
    others.keys[threadIdx.x] = order_key(score_of(other, their_index));
    ptx::sync_block();
    const int compared = static_cast<int>(count - begin < kThreads ? count - begin : kThreads);
    for (int i = 0; i < compared; ++i) {
      const uint32_t their_key = others.keys[i];
      bool before = their_key > key;
      if (their_key == key) {
        const int64_t their_index = others.indices[i];
        before = their_index < index || (their_index == index && begin + i < own);
      }
      place += before;
    }
  }
  if (own < count && place < k) {
    out_scores[query * k + place] = score;
    out_indices[query * k + place] = index == kPastAllRows ? -1 : index;
  }
  // places past the last candidate; threads past it count on
  for (int64_t spare = own; spare < k; spare += blocks * kThreads) {
    if (spare < count) continue;
    out_scores[query * k + spare] = -INFINITY;
    out_indices[query * k + spare] = -1;
  }
}

template <class T>
void launch_scores(const Rows& rows, int64_t queries, bool wide, float* scores, cudaStream_t stream) {
  const auto kernel = wide ? score_kernel<T, Access<T>::kMost> : score_kernel<T, Access<T>::kLeast>;
  launch("rescore_topk", kernel, dim3(static_cast<unsigned>(queries * rows.blocks)), dim3(kThreads), sizeof(Query),
         stream, rows, scores);
}

void launch_scores(const Tensor& vectors, const Rows& rows, int64_t queries, float* scores, cudaStream_t stream) {
  const auto wide = [&](auto value) {
    using T = decltype(value);
    return rows_are_wide(static_cast<const T*>(rows.vectors), rows.stride, rows.dim);
  };
  switch (vectors.scalar_type()) {
    case ScalarType::Float:
      return launch_scores<float>(rows, queries, wide(float{}), scores, stream);
    case ScalarType::BFloat16:
      return launch_scores<BFloat16>(rows, queries, wide(BFloat16{}), scores, stream);
    case ScalarType::Half:
      return launch_scores<Float16>(rows, queries, wide(Float16{}), scores, stream);
    case ScalarType::Char:
      return launch_scores<Int8>(rows, queries, wide(Int8{}), scores, stream);
    default:
      return launch_scores<Bits>(rows, queries, false, scores, stream);
  }
}

void check_candidates_if_asked(const Tensor& candidates, int64_t vectors) {
  if (!values_are_checked() || candidates.numel() == 0) return;
  std::vector<int64_t> values(static_cast<size_t>(candidates.numel()));
  copy_to_host("rescore_topk", values.data(), pointer<int64_t>(candidates), values.size() * sizeof(int64_t),
               current_stream(candidates));
  check_candidates(values.data(), candidates.numel(), vectors);
}

}  // namespace

std::tuple<Tensor, Tensor> rescore_topk(Tensor queries, Tensor candidates, Tensor vectors, int64_t k,
                                        std::optional<Tensor> scale) {
  check_rescore_topk(queries, candidates, vectors, k, scale);
  const DeviceGuard guard(queries.get_device_index());
  queries = dense_rows(queries);
  candidates = torch::stable::contiguous(candidates);
  vectors = dense_rows(vectors);
  check_candidates_if_asked(candidates, vectors.size(0));
  const std::optional<Tensor> factors = scale ? std::optional(torch::stable::contiguous(*scale)) : std::nullopt;
  const int64_t count = queries.size(0), candidate_count = candidates.size(1);
  Tensor scores = empty_like_device(queries, {count, k}, ScalarType::Float);
  Tensor indices = empty_like_device(queries, {count, k}, ScalarType::Long);
  if (count == 0) return {scores, indices};
  const cudaStream_t stream = current_stream(queries);
  Tensor found = empty_like_device(queries, {count, candidate_count}, ScalarType::Float);
  auto* const all_scores = mutable_pointer<float>(found);
  constexpr int64_t kRowsABlock = kThreads / kWarp * kRowsAWarp;
  const Rows rows = {pointer<uint8_t>(queries),
                     queries.scalar_type(),
                     queries.stride(0),
                     queries.size(1),
                     pointer_or_null<float>(factors),
                     pointer<int64_t>(candidates),
                     candidate_count,
                     pointer<uint8_t>(vectors),
                     vectors.size(0),
                     vectors.stride(0),
                     (candidate_count + kRowsABlock - 1) / kRowsABlock};
  if (candidate_count > 0 && rows.vector_count > 0) launch_scores(vectors, rows, count, all_scores, stream);
  const int64_t blocks = std::max<int64_t>((candidate_count + kThreads - 1) / kThreads, 1);
  launch("rescore_topk", rank_kernel, dim3(static_cast<unsigned>(count * blocks)), dim3(kThreads), sizeof(Compared),
         stream, all_scores, rows.candidates, candidate_count, rows.vector_count, blocks, k,
         mutable_pointer<float>(scores), mutable_pointer<int64_t>(indices));
  return {scores, indices};
}

}  // namespace embedding_kernels::cuda

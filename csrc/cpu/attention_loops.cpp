// Forward of one head of one sequence. Compiled once for each level of instruction set. No torch, no STL, no threads.
#include "attention.h"
#include "attention_rows.h"
#include "attention_scores.h"
#include "attention_softmax.h"

namespace embedding_kernels {
namespace {

// Keys of a block: as many as keep its scores, operands and output in the first cache.
template <Math math>
constexpr int64_t kKeyBlock = math == Math::pairs ? 256 : 128;

// ---- keys and values ----

#if defined(EK_ISA_AVX512)

// Values transposed: a row for each dimension, a unit for two keys; zeros to whole tiles.
inline void transpose_values(const HeadRows& values, int64_t stride, float* out) {
  const auto block = [&]<bool partial>(int64_t column, int64_t part) {
    for (int64_t u = 0; u < stride; u += kWidth) {
      Words units[kWidth];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kWidth; ++i) units[i] = pair_values<partial>(values, 2 * (u + i), column, part);
      transpose(units);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kWidth; ++i) store_floats(float_of_bits(units[i]), out + (column + i) * stride + u);
    }
  };
  for_vectors(values.dim, block);
}

inline void prepare_pairs(const HeadRows& keys, const HeadRows& values, const Rotation& rotation, void* buffer,
                          PreparedKeys* prepared) {
  float* const to = static_cast<float*>(buffer);
  float* const values_to = to + round_up(keys.count, 32) * round_up(keys.dim, 32);
  const int64_t key_stride = round_up(keys.dim / 2, kDepthStep), value_stride = round_up((keys.count + 1) / 2, kWidth);
  load_rows<kBFloat16, Math::pairs>(keys, rotation, key_stride, kRowStep, to);
  transpose_values(values, value_stride, values_to);
  *prepared = {keys, to, values_to, key_stride, value_stride, values.dim};
}

#endif

template <Dtype dtype>
void prepare(const HeadRows& keys, const HeadRows& values, const Rotation& rotation, void* buffer,
             PreparedKeys* prepared) {
#if defined(EK_ISA_AVX512)
  if constexpr (kMath<dtype> == Math::pairs) return prepare_pairs(keys, values, rotation, buffer, prepared);
#endif
  prepare_floats<dtype, false>(keys, values, rotation, buffer, prepared);
}

// ---- output: [queries, dimensions] in floats, transposed from pairs ----

template <Math math>
inline int64_t out_stride(int64_t value_dim) {
  return math == Math::pairs ? kQueryTile : round_up(value_dim, kWidth);
}

template <Math math>
inline void rescale_output(const Running& running, int64_t queries, int64_t value_dim, float* out) {
  const int64_t stride = out_stride<math>(value_dim);
  if constexpr (math == Math::floats) {
    for (int64_t i = 0; i < queries; ++i) {
      const Floats factor = broadcast(running.rescale[i]);
      for (int64_t c = 0; c < value_dim; c += kWidth) {
        store_floats(load_floats(out + i * stride + c) * factor, out + i * stride + c);
      }
    }
  } else {
    for (int64_t d = 0; d < value_dim; ++d) {
      for (int64_t i = 0; i < queries; i += kWidth) {
        store_floats(load_floats(out + d * stride + i) * load_floats(running.rescale + i), out + d * stride + i);
      }
    }
  }
}

// out (+)= weights times values of the block that begins at key `first`.
template <Math math>
inline void add_values(const PreparedKeys& keys, int64_t first, int64_t count, int64_t queries, bool accumulate,
                       AttentionScratch& scratch) {
  const auto* values = static_cast<const float*>(keys.values);
  const int64_t stride = out_stride<math>(keys.value_dim);
  Product product;
  if constexpr (math == Math::floats) {
    product = {scratch.scores, kQueryTile, values + first * keys.value_stride, keys.value_stride, scratch.out, stride,
               queries,        count,      round_up(keys.value_dim, kWidth),   &scratch.ahead};
  } else {
    product = {values + first / 2, keys.value_stride, scratch.weights,           kQueryTile,    scratch.out, stride,
               keys.value_dim,     (count + 1) / 2,   round_up(queries, kWidth), &scratch.ahead};
  }
  constexpr bool transposed = math == Math::floats;
  accumulate ? multiply<math, transposed, true>(product) : multiply<math, transposed, false>(product);
}

template <Dtype dtype>
inline void store_rows(const AttentionTile& tile, const float* inverse) {
  const int64_t dim = tile.keys->value_dim, stride = out_stride<Math::floats>(dim);
  for (int64_t i = 0; i < tile.queries.count; ++i) {
    const float* const row = tile.scratch->out + i * stride;
    void* const out = at<dtype>(tile.out, i * tile.out_stride);
    for_vectors(dim, [&]<bool partial>(int64_t c, int64_t part) {
      store_at<dtype, partial>(load_at<kFloat32, partial>(row, c, part) * broadcast(inverse[i]), out, c, part);
    });
  }
}

template <Dtype dtype>
inline void store_transposed(const AttentionTile& tile, const float* inverse) {
  const int64_t queries = tile.queries.count;
  for (int64_t lane = 0; lane < queries; lane += kWidth) {
    const Floats factor = load_floats(inverse + lane);
    for_vectors(tile.keys->value_dim, [&]<bool partial>(int64_t c, int64_t part) {
      Words block[kWidth];
#pragma GCC unroll 16
      for (int64_t d = 0; d < kWidth; ++d) {
        block[d] = bits_of_float(load_floats(tile.scratch->out + (c + d) * kQueryTile + lane) * factor);
      }
      transpose(block);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kWidth; ++i) {
        if (lane + i >= queries) continue;
        store_at<dtype, partial>(float_of_bits(block[i]), at<dtype>(tile.out, (lane + i) * tile.out_stride), c, part);
      }
    });
  }
}

template <Dtype dtype>
inline void finish(const AttentionTile& tile, const Running& running) {
  alignas(64) float inverse[kQueryTile], lse[kQueryTile];
  for (int64_t lane = 0; lane < tile.queries.count; lane += kWidth) {
    const Floats sums = load_floats(running.sums + lane), most = load_floats(running.most + lane);
    const Mask empty = equal(sums, Floats{});
    const Floats some = choose(empty, broadcast(1.0f), sums);
    store_floats(choose(empty, Floats{}, 1.0f / some), inverse + lane);
    const Floats logarithm = multiply_add(most, broadcast(kLn2), log_of(some));
    store_floats(choose(empty, broadcast(-kInfinity), logarithm), lse + lane);
  }
  __builtin_memcpy(tile.lse, lse, 4 * tile.queries.count);
  kMath<dtype> == Math::pairs ? store_transposed<dtype>(tile, inverse) : store_rows<dtype>(tile, inverse);
}

template <Dtype dtype>
void attend(const AttentionTile& tile) {
  constexpr Math math = kMath<dtype>;
  AttentionScratch& scratch = *tile.scratch;
  const PreparedKeys& keys = *tile.keys;
  const HeadRows& queries = tile.queries;
  const int64_t depth = units_of<math>(queries.dim), lanes = round_up(queries.count, kWidth);
  load_tile<dtype, math>(queries, tile.rotation, tile_stride<math>(queries.dim), scratch.query_rows,
                         scratch.query_columns);
  const Sight sight = sight_of(queries, *tile.rule, tile.bias, scratch);
  Running running;
  begin(running);
  bool begun = false;
  for (int64_t first = 0; first < keys.source.count; first += kKeyBlock<math>) {
    const int64_t left = keys.source.count - first, count = left < kKeyBlock<math> ? left : kKeyBlock<math>;
    const int32_t* positions = keys.source.positions + first;
    const Seen part = seen(sight, positions, count, keys.source.consecutive);
    if (part == Seen::none) continue;
    const auto* rows = static_cast<const float*>(keys.keys) + first * keys.key_stride;
    multiply<math, false, false>({rows, keys.key_stride, scratch.query_columns, kQueryTile, scratch.scores, kQueryTile,
                                  count, depth, lanes, &scratch.ahead});
    bring_near(&scratch.ahead, kLinesAtOnce);
    const bool moved = take_block<math>(
        queries.count, count, scratch.scores, scratch.weights, running, [&]<int vectors>(int64_t lane, Floats* best) {
          form_scores<vectors>(sight, part == Seen::some, positions, count, lane, scratch.scores, nullptr, best);
        });
    bring_near(&scratch.ahead, kLinesAtOnce);
    if (begun && moved) rescale_output<math>(running, queries.count, keys.value_dim, scratch.out);
    add_values<math>(keys, first, count, queries.count, begun, scratch);
    begun = true;
  }
  if (!begun) __builtin_memset(scratch.out, 0, sizeof(scratch.out));
  finish<dtype>(tile, running);
}

// ---- merging ----

template <Dtype dtype>
void blend(const void* a, float weight_a, const void* b, float weight_b, int64_t columns, void* out) {
  for_vectors(columns, [&]<bool partial>(int64_t c, int64_t part) {
    const Floats x = weight_a == 0 ? Floats{} : load_at<dtype, partial>(a, c, part) * weight_a;
    const Floats y = weight_b == 0 ? Floats{} : load_at<dtype, partial>(b, c, part) * weight_b;
    store_at<dtype, partial>(x + y, out, c, part);
  });
}

template <Dtype dtype>
float dot(const void* a, const void* b, int64_t columns) {
  Floats sum = {};
  for_vectors(columns, [&]<bool partial>(int64_t c, int64_t part) {
    sum = multiply_add(load_at<dtype, partial>(a, c, part), load_at<dtype, partial>(b, c, part), sum);
  });
  return sum_of(sum);
}

}  // namespace

#define EK_ALL_DTYPES(loop) {loop<kFloat32>, loop<kBFloat16>, loop<kFloat16>}

extern const AttentionLoops EK_LEVEL_NAME(attention_loops) = {
    enter_tiles, leave_tiles, EK_ALL_DTYPES(prepare), EK_ALL_DTYPES(attend), EK_ALL_DTYPES(blend), EK_ALL_DTYPES(dot),
};

}  // namespace embedding_kernels

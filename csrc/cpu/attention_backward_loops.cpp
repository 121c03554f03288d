// Backward of one head of one sequence, in floats for every dtype. Compiled once for each level of instruction set. No
// torch, no STL, no threads.
//
// With P the weights of a block of keys and a tile of queries: dV += P' dO, dS = P (dO V' - delta), dK += dS' Q,
// dQ += dS K; delta is dO . O - dlse. Everything lies transposed, as in the forward.
#include "attention.h"
#include "attention_rows.h"
#include "attention_scores.h"

namespace embedding_kernels {
namespace {

constexpr int64_t kKeyBlock = 128;

template <Dtype dtype>
void prepare(const HeadRows& keys, const HeadRows& values, const Rotation& rotation, void* buffer,
             PreparedKeys* prepared) {
  prepare_floats<dtype, true>(keys, values, rotation, buffer, prepared);
}

// delta and lse of each lane; a query that saw no key, and lanes past the last, get weights and gradients of 0.
template <Dtype dtype>
inline void load_sums(const AttentionGradientTile& tile, int64_t stride) {
  AttentionScratch& scratch = *tile.scratch;
  for (int64_t i = 0; i < kQueryTile; ++i) {
    scratch.lse[i] = kInfinity;
    scratch.delta[i] = 0.0f;
  }
  for (int64_t i = 0; i < tile.queries.count; ++i) {
    float* const grad = scratch.grad_rows + i * stride;
    if (tile.lse[i] == -kInfinity) {
      __builtin_memset(grad, 0, 4 * stride);
      continue;
    }
    const void* const out = row_of<dtype>(tile.out, i);
    Floats sum = {};
    for_vectors(tile.out.dim, [&]<bool partial>(int64_t c, int64_t part) {
      sum = multiply_add(load_at<dtype, partial>(out, c, part), load_at<kFloat32, partial>(grad, c, part), sum);
    });
    scratch.delta[i] = sum_of(sum) - (tile.grad_lse == nullptr ? 0.0f : tile.grad_lse[i]);
    scratch.lse[i] = tile.lse[i] * kLog2E;
  }
}

// Scores to weights, and gradients of weights to gradients of scores, both in place.
inline void weights_and_gradients(int64_t keys, int64_t lanes, AttentionScratch& scratch) {
  for (int64_t lane = 0; lane < lanes; lane += kWidth) {
    const Floats lse = load_floats(scratch.lse + lane), delta = load_floats(scratch.delta + lane);
    for (int64_t j = 0; j < keys; ++j) {
      const int64_t place = j * kQueryTile + lane;
      const Floats weight = exp2<6>(load_floats(scratch.scores + place) - lse);
      store_floats(weight, scratch.scores + place);
      store_floats(weight * (load_floats(scratch.weights + place) - delta), scratch.weights + place);
    }
  }
}

inline void multiply_slopes(int64_t keys, int64_t lanes, AttentionScratch& scratch) {
  for (int64_t j = 0; j < keys; ++j) {
    for (int64_t lane = 0; lane < lanes; lane += kWidth) {
      const int64_t place = j * kQueryTile + lane;
      store_floats(load_floats(scratch.weights + place) * load_floats(scratch.slopes + place), scratch.weights + place);
    }
  }
}

// Sums of a block's gradients over its diagonals, entry base - key + query, at the start of `diagonals`.
//
// Rows of neighbouring keys are shifted by one entry, and a vector that is read half from a store just made waits for
// it; so every kWidth-th key has an array of its own, in which stores and loads meet whole.
inline void sum_diagonals(const float* gradients, int64_t keys, int64_t lanes, int64_t base, float* diagonals) {
  const int64_t length = base + kQueryTile;
  __builtin_memset(diagonals, 0, 4 * kWidth * length);
  for (int64_t j = 0; j < keys; ++j) {
    float* const row = diagonals + j % kWidth * length + base - j;
    for (int64_t lane = 0; lane < lanes; lane += kWidth) {
      store_floats(load_floats(row + lane) + load_floats(gradients + j * kQueryTile + lane), row + lane);
    }
  }
  for (int64_t x = 0; x < length; x += kWidth) {
    Floats sum = load_floats(diagonals + x);
    for (int64_t a = 1; a < kWidth; ++a) sum += load_floats(diagonals + a * length + x);
    store_floats(sum, diagonals + x);
  }
}

inline void add_bias_gradient(const AttentionGradientTile& tile, const int32_t* positions, int64_t keys,
                              int64_t lanes) {
  AttentionScratch& scratch = *tile.scratch;
  const int64_t reach = tile.rule->reach;
  float* const middle = tile.grad_bias + reach;
  const auto add = [&](int64_t offset, float gradient) {
    middle[offset < -reach ? -reach : offset > reach ? reach : offset] += gradient;
  };
  const int32_t* queries = tile.queries.positions;
  if (tile.queries.consecutive && tile.keys->source.consecutive) {
    const int64_t base = round_up(keys, kWidth), apart = int64_t{positions[0]} - queries[0];
    sum_diagonals(scratch.weights, keys, lanes, base, scratch.diagonals);
    for (int64_t x = 0; x < base + kQueryTile; ++x) add(apart + base - x, scratch.diagonals[x]);
    return;
  }
  for (int64_t j = 0; j < keys; ++j) {
    for (int64_t i = 0; i < tile.queries.count; ++i) {
      add(int64_t{positions[j]} - queries[i], scratch.weights[j * kQueryTile + i]);
    }
  }
}

// One block of keys: everything but the loads of the tile.
inline void block_backward(const AttentionGradientTile& tile, const Sight& sight, bool mask, bool begun, int64_t first,
                           int64_t count) {
  AttentionScratch& scratch = *tile.scratch;
  const PreparedKeys& keys = *tile.keys;
  const int64_t queries = tile.queries.count, lanes = round_up(queries, kWidth);
  const int64_t dim = keys.source.dim, width = round_up(dim, kWidth), value_width = round_up(keys.value_dim, kWidth);
  const int32_t* positions = keys.source.positions + first;
  const float* key_rows = static_cast<const float*>(keys.keys) + first * keys.key_stride;
  const float* value_rows = static_cast<const float*>(keys.values) + first * keys.value_stride;
  multiply<Math::floats, false, false>({key_rows, keys.key_stride, scratch.query_columns, kQueryTile, scratch.scores,
                                        kQueryTile, count, dim, lanes, &scratch.ahead});
  for_lanes(queries, [&]<int vectors>(int64_t lane) {
    Floats best[vectors];
    form_scores<vectors>(sight, mask, positions, count, lane, scratch.scores, scratch.slopes, best);
  });
  multiply<Math::floats, false, false>({value_rows, keys.value_stride, scratch.grad_columns, kQueryTile,
                                        scratch.weights, kQueryTile, count, keys.value_dim, lanes, &scratch.ahead});
  weights_and_gradients(count, lanes, scratch);
  if (tile.grad_bias != nullptr) add_bias_gradient(tile, positions, count, lanes);
  if (tile.rule->softcap > 0) multiply_slopes(count, lanes, scratch);

  const int64_t value_stride = gradient_stride(keys.value_dim), stride = gradient_stride(dim);
  multiply<Math::floats, false, true>({scratch.scores, kQueryTile, scratch.grad_rows, value_width,
                                       tile.grad_values + first * value_stride, value_stride, count, queries,
                                       value_width, &scratch.ahead});
  multiply<Math::floats, false, true>({scratch.weights, kQueryTile, scratch.query_rows, width,
                                       tile.grad_keys + first * stride, stride, count, queries, width, &scratch.ahead});
  const Product to_queries = {scratch.weights, kQueryTile, key_rows, keys.key_stride, scratch.out,
                              width,           queries,    count,    width,           &scratch.ahead};
  begun ? multiply<Math::floats, true, true>(to_queries) : multiply<Math::floats, true, false>(to_queries);
}

template <Dtype dtype>
void store(const float* rows, int64_t stride, const HeadRows& like, float scale, const Rotation& rotation, void* out,
           int64_t out_stride) {
  float row[kMostHeadDim];
  for (int64_t r = 0; r < like.count; ++r) {
    for_vectors(like.dim, [&]<bool partial>(int64_t c, int64_t part) {
      store_at<kFloat32, partial>(load_at<kFloat32, partial>(rows + r * stride, c, part) * broadcast(scale), row, c,
                                  part);
    });
    if (rotation.cos != nullptr) rotate(row, rotation, like.positions[r], -1.0f);
    for_vectors(like.dim, [&]<bool partial>(int64_t c, int64_t part) {
      store_at<dtype, partial>(load_at<kFloat32, partial>(row, c, part), at<dtype>(out, r * out_stride), c, part);
    });
  }
}

template <Dtype dtype>
void attend(const AttentionGradientTile& tile) {
  AttentionScratch& scratch = *tile.scratch;
  const PreparedKeys& keys = *tile.keys;
  const int64_t width = round_up(tile.queries.dim, kWidth), value_width = round_up(keys.value_dim, kWidth);
  load_tile<dtype, Math::floats>(tile.queries, tile.rotation, width, scratch.query_rows, scratch.query_columns);
  load_rows<dtype, Math::floats>(tile.grad_out, Rotation{}, value_width, 1, scratch.grad_rows);
  load_sums<dtype>(tile, value_width);
  columns_of(scratch.grad_rows, value_width, tile.grad_out.count, keys.value_dim, scratch.grad_columns);
  const Sight sight = sight_of(tile.queries, *tile.rule, tile.bias, scratch);
  bool begun = false;
  for (int64_t first = 0; first < keys.source.count; first += kKeyBlock) {
    const int64_t left = keys.source.count - first, count = left < kKeyBlock ? left : kKeyBlock;
    const Seen part = seen(sight, keys.source.positions + first, count, keys.source.consecutive);
    if (part == Seen::none) continue;
    block_backward(tile, sight, part == Seen::some, begun, first, count);
    begun = true;
  }
  if (!begun) __builtin_memset(scratch.out, 0, sizeof(scratch.out));
  store<dtype>(scratch.out, width, tile.queries, tile.rule->scale, tile.rotation, tile.grad_queries, tile.grad_stride);
}

}  // namespace

#define EK_ALL_DTYPES(loop) {loop<kFloat32>, loop<kBFloat16>, loop<kFloat16>}

extern const AttentionBackwardLoops EK_LEVEL_NAME(attention_backward_loops) = {
    EK_ALL_DTYPES(prepare),
    EK_ALL_DTYPES(attend),
    EK_ALL_DTYPES(store),
};

}  // namespace embedding_kernels

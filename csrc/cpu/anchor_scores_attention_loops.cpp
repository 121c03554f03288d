// Attention of anchors: the heads of one query and view over its passages. Compiled once for each level of instruction
// set. No torch, no STL, no threads.
//
// Few heads meet long rows, each read twice, so rows are multiplied where they lie: scores are views times heads, and
// lie transposed as in attention; the output is weights times views, a row for each head.
#include "anchor_scores.h"
#include "attention_rows.h"
#include "attention_softmax.h"

namespace embedding_kernels {
namespace {

template <Dtype dtype>
inline HeadRows rows_of(const AnchorRows& rows, int64_t dim) {
  return {rows.data, rows.stride / dtype_bytes(dtype), rows.count, dim, nullptr, true};
}

// Rows as the left side of the scores reads them: 32-bit units.
struct AnchorUnits {
  const float* data;
  int64_t stride;
};

template <Dtype dtype, Math math>
inline AnchorUnits lay_out(const AnchorRows& views, int64_t dim, float* to) {
  const int64_t step = math == Math::pairs ? kDepthStep : kWidth, stride = round_up(units_of<math>(dim), step);
  load_rows<dtype, math>(rows_of<dtype>(views, dim), Rotation{}, stride, math == Math::pairs ? kRowStep : 1, to);
  return {to, stride};
}

// ---- floats ----

template <Dtype dtype>
inline AnchorUnits float_rows(const AnchorRows& views, int64_t dim, float* to) {
  if (dtype == kFloat32 && dim % kWidth == 0) return {reinterpret_cast<const float*>(views.data), views.stride / 4};
  return lay_out<dtype, Math::floats>(views, dim, to);
}

// ---- pairs of bfloat16 ----

#if defined(EK_ISA_AVX512)

inline bool readable_in_place(const AnchorRows& views, int64_t dim) {
  const auto address = reinterpret_cast<uintptr_t>(views.data);
  return dim % (2 * kDepthStep) == 0 && (address | static_cast<uintptr_t>(views.stride)) % 4 == 0;
}

inline void multiply_score_pairs(const AnchorRows& views, int64_t dim, int64_t lanes, AnchorScratch& scratch) {
  const auto multiply_rows_of = [&](const AnchorUnits& rows, int64_t first, int64_t count) {
    multiply<Math::pairs, false, false>({rows.data, rows.stride, scratch.head_columns, kQueryTile,
                                         scratch.scores + first * kQueryTile, kQueryTile, count,
                                         units_of<Math::pairs>(dim), lanes, nullptr});
  };
  // whole tiles only: a last part of one would read past the rows
  const int64_t whole = readable_in_place(views, dim) ? views.count / kRowStep * kRowStep : 0;
  if (whole > 0) multiply_rows_of({reinterpret_cast<const float*>(views.data), views.stride / 4}, 0, whole);
  if (whole == views.count) return;
  const AnchorRows rest = views.part(whole, views.count - whole);
  multiply_rows_of(lay_out<kBFloat16, Math::pairs>(rest, dim, scratch.views), whole, rest.count);
}

// A row of units for every two rows of views, and zeros to whole tiles.
inline void pair_rows(const AnchorRows& views, int64_t dim, float* pairs) {
  const HeadRows rows = rows_of<kBFloat16>(views, dim);
  const int64_t width = round_up(dim, kWidth);
  for (int64_t j = 0; j < round_up((views.count + 1) / 2, kDepthStep); ++j) {
    for_vectors(dim, [&]<bool partial>(int64_t column, int64_t part) {
      store_floats(float_of_bits(pair_values<partial>(rows, 2 * j, column, part)), pairs + j * width + column);
    });
  }
}

// From a lane to a row for each head.
inline void turn_weights(int64_t lanes, int64_t pairs, AnchorScratch& scratch) {
  for (int64_t first = 0; first < pairs; first += kWidth) {
    for (int64_t lane = 0; lane < lanes; lane += kWidth) {
      Words block[kWidth];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kWidth; ++i) {
        block[i] = bits_of_float(load_floats(scratch.weights + (first + i) * kQueryTile + lane));
      }
      transpose(block);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kWidth; ++i) {
        store_floats(float_of_bits(block[i]), scratch.weight_rows + (lane + i) * (kPassagesAtOnce / 2) + first);
      }
    }
  }
}

inline void add_pairs(const AnchorTile& tile, const AnchorRows& views, bool accumulate) {
  AnchorScratch& scratch = *tile.scratch;
  const int64_t pairs = (views.count + 1) / 2, width = round_up(tile.dim, kWidth);
  pair_rows(views, tile.dim, scratch.pairs);
  turn_weights(round_up(tile.heads.count, kWidth), pairs, scratch);
  const Product product = {scratch.weight_rows,
                           kPassagesAtOnce / 2,
                           scratch.pairs,
                           width,
                           scratch.out,
                           width,
                           tile.heads.count,
                           pairs,
                           width,
                           nullptr};
  accumulate ? multiply<Math::pairs, false, true>(product) : multiply<Math::pairs, false, false>(product);
}

#endif

// ---- both ----

// Products to scores in base 2, and the largest for each lane.
template <int vectors>
inline void scale_scores(float* products, int64_t count, Floats* best) {
  for (int v = 0; v < vectors; ++v) best[v] = broadcast(-kInfinity);
  for (int64_t j = 0; j < count; ++j) {
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      float* const place = products + j * kQueryTile + v * kWidth;
      const Floats score = load_floats(place) * kLog2E;
      store_floats(score, place);
      best[v] = maximum(score, best[v]);
    }
  }
}

// Multiplies each row of the output by a number of its own.
inline void scale_rows(const float* factors, int64_t rows, int64_t width, float* out) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = 0; c < width; c += kWidth) {
      store_floats(load_floats(out + i * width + c) * factors[i], out + i * width + c);
    }
  }
}

template <Dtype dtype>
inline void store_output(const AnchorTile& tile, const Running& running) {
  const int64_t width = round_up(tile.dim, kWidth);
  for (int64_t i = 0; i < tile.heads.count; ++i) {
    const Floats share = broadcast(tile.views.count == 0 ? 0.0f : 1.0f / running.sums[i]);
    for_vectors(tile.dim, [&]<bool partial>(int64_t c, int64_t part) {
      const Floats sum = tile.views.count == 0 ? Floats{} : load_floats(tile.scratch->out + i * width + c);
      store_at<dtype, partial>(sum * share, at<dtype>(tile.out, i * tile.dim), c, part);
    });
  }
}

// The views from `first` on: their scores, weights and share of the output.
template <Dtype dtype>
inline void attend_block(const AnchorTile& tile, const AnchorRows& views, bool begun, Running& running) {
  constexpr Math math = kMath<dtype>;
  AnchorScratch& scratch = *tile.scratch;
  const int64_t heads = tile.heads.count, lanes = round_up(heads, kWidth), width = round_up(tile.dim, kWidth);
  AnchorUnits rows;
  if constexpr (math == Math::floats) {
    rows = float_rows<dtype>(views, tile.dim, scratch.views);
    multiply<math, false, false, true>({rows.data, rows.stride, scratch.head_columns, kQueryTile, scratch.scores,
                                        kQueryTile, views.count, tile.dim, lanes, nullptr});
  } else {
#if defined(EK_ISA_AVX512)
    multiply_score_pairs(views, tile.dim, lanes, scratch);
#endif
  }
  const bool moved = take_block<math>(heads, views.count, scratch.scores, scratch.weights, running,
                                      [&]<int vectors>(int64_t lane, Floats* best) {
                                        scale_scores<vectors>(scratch.scores + lane, views.count, best);
                                      });
  if (begun && moved) scale_rows(running.rescale, heads, width, scratch.out);
  if constexpr (math == Math::floats) {
    const Product product = {scratch.scores, kQueryTile, rows.data,   rows.stride, scratch.out,
                             width,          heads,      views.count, width,       nullptr};
    begun ? multiply<math, true, true>(product) : multiply<math, true, false>(product);
  } else {
#if defined(EK_ISA_AVX512)
    add_pairs(tile, views, begun);
#endif
  }
}

template <Dtype dtype>
void attend(const AnchorTile& tile) {
  constexpr Math math = kMath<dtype>;
  AnchorScratch& scratch = *tile.scratch;
  load_tile<dtype, math>(rows_of<dtype>(tile.heads, tile.dim), Rotation{}, tile_stride<math>(tile.dim),
                         scratch.head_rows, scratch.head_columns);
  Running running;
  begin(running);
  for (int64_t first = 0; first < tile.views.count; first += kPassagesAtOnce) {
    const int64_t left = tile.views.count - first, count = left < kPassagesAtOnce ? left : kPassagesAtOnce;
    attend_block<dtype>(tile, tile.views.part(first, count), first > 0, running);
  }
  store_output<dtype>(tile, running);
}

}  // namespace

extern const AnchorAttentionLoops EK_LEVEL_NAME(anchor_attention_loops) = {
    enter_tiles, leave_tiles, {attend<kFloat32>, attend<kBFloat16>, attend<kFloat16>}};

}  // namespace embedding_kernels

// For *_loops.cpp only: from scores in base 2 to weights, block by block. Scores lie transposed: a row of kQueryTile
// lanes for each key.
#pragma once

#include "attention_scores.h"

namespace embedding_kernels {
namespace {

#if defined(EK_ISA_AVX512)
// The bfloat16 of `low` and `high`, side by side in each lane.
inline Floats pair_of(Floats low, Floats high) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512bh halves = _mm512_cvtne2ps_pbh(high, low);
  return _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(halves)));
}
#endif

// Scores to weights 2^(score - most), in place; `sums` takes their sums over the keys.
template <int vectors>
inline void exponentiate(float* scores, int64_t keys, const Floats* most, Floats* sums) {
  for (int64_t j = 0; j < keys; ++j) {
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      float* const place = scores + j * kQueryTile + v * kWidth;
      const Floats weight = exp2<6>(load_floats(place) - most[v]);
      store_floats(weight, place);
      sums[v] += weight;
    }
  }
}

#if defined(EK_ISA_AVX512)
// The same into pairs of keys, with zeros to whole tiles.
template <int vectors>
inline void exponentiate_pairs(const float* scores, int64_t keys, const Floats* most, float* weights, Floats* sums) {
  const int64_t pairs = (keys + 1) / 2;
  for (int64_t j = 0; j < pairs; ++j) {
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      const float* const place = scores + 2 * j * kQueryTile + v * kWidth;
      const Floats low = exp2<4>(load_floats(place) - most[v]);
      const Floats high = 2 * j + 1 < keys ? exp2<4>(load_floats(place + kQueryTile) - most[v]) : Floats{};
      store_floats(pair_of(low, high), weights + j * kQueryTile + v * kWidth);
      sums[v] += low + high;
    }
  }
  for (int64_t j = pairs; j < round_up(pairs, kDepthStep); ++j) {
    for (int v = 0; v < vectors; ++v) store_floats(Floats{}, weights + j * kQueryTile + v * kWidth);
  }
}
#endif

// The running softmax of a tile, a lane for each query.
struct alignas(64) Running {
  float most[kQueryTile];     // largest score so far, base 2
  float sums[kQueryTile];     // of 2^(score - most)
  float rescale[kQueryTile];  // of what was summed before this block
};

inline void begin(Running& running) {
  for (int64_t i = 0; i < kQueryTile; ++i) {
    running.most[i] = -kInfinity;
    running.sums[i] = 0.0f;
  }
}

// Takes a block's products in: form.template operator()<vectors>(lane, best) makes scores of them and finds the
// largest. They become weights, in place or (pairs) in `weights`; true where earlier output must be rescaled.
template <Math math, class Form>
inline bool take_block(int64_t queries, int64_t keys, float* scores, [[maybe_unused]] float* weights, Running& running,
                       const Form& form) {
  bool moved = false;
  for_lanes(queries, [&]<int vectors>(int64_t lane) {
    Floats best[vectors], most[vectors], sums[vectors];
    form.template operator()<vectors>(lane, best);
    for (int v = 0; v < vectors; ++v) {
      const int64_t place = lane + v * kWidth;
      const Floats before = load_floats(running.most + place), now = maximum(best[v], before);
      // where nothing has been seen yet, any finite number serves
      most[v] = choose(equal(now, broadcast(-kInfinity)), Floats{}, now);
      const Floats rescale = exp2<6>(before - most[v]);
      sums[v] = Floats{};
      store_floats(now, running.most + place);
      store_floats(rescale, running.rescale + place);
    }
    if constexpr (math == Math::floats) {
      exponentiate<vectors>(scores + lane, keys, most, sums);
    } else {
#if defined(EK_ISA_AVX512)
      exponentiate_pairs<vectors>(scores + lane, keys, most, weights + lane, sums);
#endif
    }
    for (int v = 0; v < vectors; ++v) {
      float* const place = running.sums + lane + v * kWidth;
      store_floats(multiply_add(load_floats(place), load_floats(running.rescale + lane + v * kWidth), sums[v]), place);
    }
  });
  for (int64_t i = 0; i < queries; ++i) moved |= running.rescale[i] != 1.0f;
  return moved;
}

}  // namespace
}  // namespace embedding_kernels

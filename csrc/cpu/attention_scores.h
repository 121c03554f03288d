// For *_loops.cpp of attention only: from products of queries and keys to scores in base 2 (softcap, bias,
// mask). Scores lie transposed: a row of kQueryTile lanes for each key.
#pragma once

#include "attention.h"
#include "floats_math.h"
#include "matmul.h"

namespace embedding_kernels {
namespace {

enum class Seen { none, some, all };

// Which positions the queries of a tile see, and where their biases lie.
struct Sight {
  const ScoreRule* rule;
  const HeadRows* queries;
  const float* bias;
  const int32_t *first_seen, *last_seen;  // for every lane
  int64_t lowest, highest;                // query positions of the tile
  bool restricted;
};

inline int64_t first_seen(const ScoreRule& rule, int64_t position) {
  return rule.left < 0 || position < rule.left ? 0 : position - rule.left;
}
inline int64_t last_seen(const ScoreRule& rule, int64_t position) {
  const int64_t most = 0x7fffffff;
  const int64_t right = rule.right < 0 || rule.right > most - position ? most : position + rule.right;
  return rule.causal && right > position ? position : right;
}

struct Span {
  int64_t lowest, highest;
};
inline Span span_of(const int32_t* positions, int64_t count, bool consecutive) {
  if (consecutive) return {positions[0], positions[count - 1]};
  Span span{positions[0], positions[0]};
  for (int64_t i = 1; i < count; ++i) {
    if (positions[i] < span.lowest) span.lowest = positions[i];
    if (positions[i] > span.highest) span.highest = positions[i];
  }
  return span;
}

inline Sight sight_of(const HeadRows& queries, const ScoreRule& rule, const float* bias, AttentionScratch& scratch) {
  Sight sight{&rule, &queries, bias, scratch.first_seen, scratch.last_seen, 0, 0, false};
  sight.restricted = rule.causal || rule.left >= 0 || rule.right >= 0;
  if (!sight.restricted) return sight;
  const Span span = span_of(queries.positions, queries.count, queries.consecutive);
  sight.lowest = span.lowest;
  sight.highest = span.highest;
  for (int64_t i = 0; i < kQueryTile; ++i) {
    const int32_t position = queries.positions[i < queries.count ? i : queries.count - 1];
    scratch.first_seen[i] = static_cast<int32_t>(first_seen(rule, position));
    scratch.last_seen[i] = static_cast<int32_t>(last_seen(rule, position));
  }
  return sight;
}

// How much of a block of keys the queries of a tile see.
inline Seen seen(const Sight& sight, const int32_t* positions, int64_t count, bool consecutive) {
  if (!sight.restricted) return Seen::all;
  const ScoreRule& rule = *sight.rule;
  const Span keys = span_of(positions, count, consecutive);
  if (keys.highest < first_seen(rule, sight.lowest) || keys.lowest > last_seen(rule, sight.highest)) return Seen::none;
  if (keys.lowest >= first_seen(rule, sight.highest) && keys.highest <= last_seen(rule, sight.lowest)) return Seen::all;
  return Seen::some;
}

// Biases of all lanes for the key at `position`: a slice of the spread table, or looked up one by one into `buffer`.
inline const float* bias_row(const Sight& sight, int32_t position, float* buffer) {
  const int64_t reach = sight.rule->reach, count = sight.queries->count;
  const int32_t* queries = sight.queries->positions;
  const float* const zero = sight.bias + reach + kBiasMargin;
  if (sight.queries->consecutive) {
    const int64_t first = int64_t{queries[0]} - position, low = -(reach + kBiasMargin);
    return zero + (first < low ? low : first > reach ? reach : first);
  }
  for (int64_t i = 0; i < kQueryTile; ++i) {
    const int64_t offset = int64_t{queries[i < count ? i : count - 1]} - position;
    buffer[i] = zero[offset < -reach ? -reach : offset > reach ? reach : offset];
  }
  return buffer;
}

// Turns products into scores in base 2, `vectors` lanes wide from `lane` on; their largest for each lane into `best`.
// `slopes` takes the derivative of the softcap, where it is asked for.
template <int vectors, bool softcap, bool bias, bool mask>
inline void form_scores(const Sight& sight, const int32_t* positions, int64_t keys, int64_t lane, float* scores,
                        float* slopes, Floats* best) {
  const ScoreRule& rule = *sight.rule;
  const Floats factor = broadcast(softcap ? rule.scale / rule.softcap : rule.scale * kLog2E);
  const Floats cap = broadcast(rule.softcap * kLog2E);
  Ints first[vectors], last[vectors];
  Floats most[2][vectors];  // even and odd keys apart: a maximum waits for the one before it
  for (int v = 0; v < vectors; ++v) {
    __builtin_memcpy(&first[v], sight.first_seen + lane + v * kWidth, sizeof(Ints));
    __builtin_memcpy(&last[v], sight.last_seen + lane + v * kWidth, sizeof(Ints));
    most[0][v] = most[1][v] = broadcast(-kInfinity);
  }
  float buffer[kQueryTile];
  // left to itself the compiler calls it for every key where nothing is masked
  const auto form = [&](int64_t j, Floats* greatest) __attribute__((always_inline)) {
    float* const row = scores + j * kQueryTile + lane;
    const float* const biases = bias ? bias_row(sight, positions[j], buffer) + lane : nullptr;
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      Floats x = load_floats(row + v * kWidth);
      if constexpr (softcap) {
        x = tanh_of(x * factor);
        if (slopes != nullptr) store_floats(1.0f - x * x, slopes + j * kQueryTile + lane + v * kWidth);
        x = bias ? multiply_add(x, cap, load_floats(biases + v * kWidth)) : x * cap;
      } else {
        x = bias ? multiply_add(x, factor, load_floats(biases + v * kWidth)) : x * factor;
      }
      if constexpr (mask) x = choose(between(Ints{} + positions[j], first[v], last[v]), x, broadcast(-kInfinity));
      store_floats(x, row + v * kWidth);
      greatest[v] = maximum(x, greatest[v]);
    }
  };
  int64_t j = 0;
  for (; j + 2 <= keys; j += 2) {
    form(j, most[0]);
    form(j + 1, most[1]);
  }
  if (j < keys) form(j, most[0]);
  for (int v = 0; v < vectors; ++v) best[v] = maximum(most[0][v], most[1][v]);
}

template <int vectors>
inline void form_scores(const Sight& sight, bool mask, const int32_t* positions, int64_t keys, int64_t lane,
                        float* scores, float* slopes, Floats* best) {
  const auto form = [&]<bool softcap, bool bias>() {
    if (mask) {
      form_scores<vectors, softcap, bias, true>(sight, positions, keys, lane, scores, slopes, best);
    } else {
      form_scores<vectors, softcap, bias, false>(sight, positions, keys, lane, scores, slopes, best);
    }
  };
  const bool biased = sight.bias != nullptr;
  if (sight.rule->softcap > 0) {
    biased ? form.template operator()<true, true>() : form.template operator()<true, false>();
  } else {
    biased ? form.template operator()<false, true>() : form.template operator()<false, false>();
  }
}

// Calls body.template operator()<vectors>(lane) for pairs of vectors of lanes, then for a single one.
template <class Body>
inline void for_lanes(int64_t queries, const Body& body) {
  int64_t lane = 0;
  for (; lane + kWidth < queries; lane += 2 * kWidth) body.template operator()<2>(lane);
  if (lane < queries) body.template operator()<1>(lane);
}

}  // namespace
}  // namespace embedding_kernels

// Inner loops of the attention family: two tables a level of instruction set, filled by attention_loops.cpp and
// attention_backward_loops.cpp. Everything here concerns one head of one sequence.
//
// Scores lie transposed: a row for each key, a lane for each query of a tile. Maxima, sums and masks are then plain
// vector operations, and a short sequence pays for its own keys, not for a square.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace embedding_kernels {

constexpr int64_t kQueryTile = 32;           // queries of a tile
constexpr int64_t kMostKeys = 256;           // keys of a block
constexpr int64_t kMostHeadDim = 256;        // dimensions of a head
constexpr int64_t kBiasMargin = kQueryTile;  // entries of a spread bias table before the first and after the last

// Rows of one head in one sequence.
struct HeadRows {
  const void* data;
  int64_t stride;  // elements from row to row
  int64_t count;
  int64_t dim;
  const int32_t* positions;  // one a row
  bool consecutive;          // positions follow each other
};

// Rotary embedding of the first 2 * half dimensions; a row of the tables a position. cos null: none.
struct Rotation {
  const float* cos;
  const float* sin;
  int64_t half;
};

// How scores are formed and who sees whom.
struct ScoreRule {
  float scale;
  float softcap;  // 0: none
  bool causal;
  int64_t left, right;  // -1: no limit
  int64_t reach;        // of the bias table
};

// Memory that will be read soon: rows to bring near while there is work to do on others.
struct Ahead {
  struct Rows {
    const char* data;
    int64_t stride, bytes, count;
  };
  Rows rows[5];
  int64_t lists, list, row, byte;
};

// What a thread works in; contents last for one tile.
struct alignas(64) AttentionScratch {
  float scores[kMostKeys * kQueryTile];
  float weights[kMostKeys * kQueryTile];  // pairs of bfloat16 in the forward, gradients of scores in the backward
  float slopes[kMostKeys * kQueryTile];   // backward of the softcap
  float query_rows[kQueryTile * kMostHeadDim];
  float query_columns[kQueryTile * kMostHeadDim];
  float grad_rows[kQueryTile * kMostHeadDim];
  float grad_columns[kQueryTile * kMostHeadDim];
  float out[kQueryTile * kMostHeadDim];
  float diagonals[16 * (kMostKeys + 2 * kQueryTile)];
  int32_t first_seen[kQueryTile], last_seen[kQueryTile];  // positions that a query sees
  float lse[kQueryTile], delta[kQueryTile];
  Ahead ahead;
};

// Keys and values as `prepare` lays them out.
struct PreparedKeys {
  HeadRows source;  // of the keys
  const void* keys;
  const void* values;
  int64_t key_stride, value_stride;  // 32-bit units from row to row
  int64_t value_dim;
};

struct AttentionTile {
  HeadRows queries;  // at most kQueryTile
  const PreparedKeys* keys;
  Rotation rotation;
  const ScoreRule* rule;
  const float* bias;  // spread table of the head, or null: entry e + reach + kBiasMargin is for query - key = e
  void* out;
  int64_t out_stride;
  float* lse;
  AttentionScratch* scratch;
};

struct AttentionGradientTile {
  HeadRows queries;
  const PreparedKeys* keys;  // prepared for the backward
  Rotation rotation;
  const ScoreRule* rule;
  const float* bias;
  HeadRows out, grad_out;
  const float* lse;
  const float* grad_lse;  // or null
  void* grad_queries;
  int64_t grad_stride;
  float* grad_keys;    // [keys, gradient_stride], added to, before scale and rotation
  float* grad_values;  // [keys, gradient_stride], added to
  float* grad_bias;    // [2 reach + 1] by key - query, added to, or null
  AttentionScratch* scratch;
};

struct AttentionLoops {
  // Before and after a thread's work: the state of the processor's tile unit, where there is one.
  void (*enter)();
  void (*leave)();

  // Lays out the keys (rotated) and values of a head for `attend`. `buffer` has prepared_bytes, aligned to 64; sources
  // may be used in place.
  void (*prepare[kDtypes])(const HeadRows& keys, const HeadRows& values, const Rotation& rotation, void* buffer,
                           PreparedKeys* prepared);

  // Output and lse of a tile of queries over all keys.
  void (*attend[kDtypes])(const AttentionTile& tile);

  // out = weight_a * a + weight_b * b over `columns`; a side of weight 0 is not read.
  void (*blend[kDtypes])(const void* a, float weight_a, const void* b, float weight_b, int64_t columns, void* out);

  // Sum of a[c] * b[c].
  float (*dot[kDtypes])(const void* a, const void* b, int64_t columns);
};

struct AttentionBackwardLoops {
  // As AttentionLoops::prepare, for `attend`.
  void (*prepare[kDtypes])(const HeadRows& keys, const HeadRows& values, const Rotation& rotation, void* buffer,
                           PreparedKeys* prepared);

  // Gradients of a tile of queries, and what they add to those of keys, values and bias.
  void (*attend[kDtypes])(const AttentionGradientTile& tile);

  // out[r, :] = rows[r, :] * scale, rotated backwards to `positions`, rounded once.
  void (*store[kDtypes])(const float* rows, int64_t stride, const HeadRows& like, float scale, const Rotation& rotation,
                         void* out, int64_t out_stride);
};

// From row to row of the gradients of keys and values, in floats.
inline int64_t gradient_stride(int64_t dim) { return (dim + 15) / 16 * 16; }

// Room that `prepare` needs, in bytes.
inline int64_t prepared_bytes(int64_t keys, int64_t dim, int64_t value_dim) {
  const auto padded = [](int64_t size) { return (size + 31) / 32 * 32; };
  return 4 * padded(keys) * (padded(dim) + padded(value_dim));
}

extern const AttentionLoops attention_loops_portable;
extern const AttentionLoops attention_loops_avx2;
extern const AttentionLoops attention_loops_avx512;
extern const AttentionLoops attention_loops_amx;

extern const AttentionBackwardLoops attention_backward_loops_portable;
extern const AttentionBackwardLoops attention_backward_loops_avx2;
extern const AttentionBackwardLoops attention_backward_loops_avx512;
extern const AttentionBackwardLoops attention_backward_loops_amx;

const AttentionLoops& attention_loops();
const AttentionBackwardLoops& attention_backward_loops();

}  // namespace embedding_kernels

// What the passes of varlen_attention_backward share. Each walks all pairs, forms their scores again and sums what is
// its own: the gradient of queries by rows of queries, those of keys and values by rows of keys, that of the bias table
// by rows of queries. So every sum has one owner and a fixed order.
#pragma once

#include "attention_host.cuh"

namespace embedding_kernels::cuda {

enum class Pass { queries, keys, table };

template <int columns, Pass pass>
struct GradientShape {
  static constexpr int D = columns;
  static constexpr Pass kPass = pass;
  static constexpr bool kOwnKeys = pass == Pass::keys;
  static constexpr int kOwn = 16;                    // rows of a warp
  static constexpr int kOthers = D == 64 ? 64 : 32;  // rows of a tile of the other side
  static constexpr int kChunk = 16;                  // of a step
  // columns of a gradient that a block sums: two of 256 would not fit into the registers
  static constexpr int kSums = kOwnKeys && D == 256 ? 128 : D;
  static constexpr bool kHoldsOwn = D == 64;  // in registers
};

// What the passes know of a row of queries, [heads of queries, total], the heads `stride` apart: lse in base 2, and
// what the row's weights share of their gradient, grad_out · out − grad_lse.
struct GradientLevels {
  const float *levels, *shares;
  int64_t stride;
};

// The own side's rows and their partners in the two products: q · k and grad_out · v, from either side.
template <class T>
struct GradientArguments {
  AttentionRule rule;
  bool last_first;  // the last rows have the most pairs
  HeadRows<T> own[2], others[2];
  int32_t members;  // heads of the other side for a head of the own
  GradientLevels of_rows;
  float scale;
  // of own[0], as float32 where it has to be turned back, and of own[1], for keys
  void* first_gradient;
  bool first_is_wide;
  T* second_gradient;
};

template <class T, class Shape>
struct GradientShared {
  static constexpr int D = Shape::D;
  alignas(128) T own[2][kAttentionWarps][Shape::kOwn * D];
  T others[2][2][Shape::kOthers * D];  // of a stage, of a factor
  float levels[2][Shape::kOthers];
  float shares[2][Shape::kOthers];
  int32_t positions[2][Shape::kOthers];
  float table[kStagedBiases];
  Walk walk;
};

// What a warp knows of its rows.
template <class Shape>
struct GradientRows {
  OwnRows own;
  int32_t segment;
  Window window;
  int32_t at[2];             // positions of the lane's rows
  float level[2], share[2];  // of queries
  uint32_t held[2][Shape::kHoldsOwn ? Shape::D / 16 : 1][4];
  uint32_t tiles[2];  // of the warp, in shared memory
};

// The head of queries that a member stands for.
template <class Shape, class T>
__device__ inline int64_t query_head(const GradientArguments<T>& a, int32_t member) {
  return Shape::kOwnKeys ? static_cast<int64_t>(blockIdx.y) * a.members + member : blockIdx.y;
}

// Starts the copies of the tile at the cursor, and moves on past it.
template <class T, class Shape>
__device__ inline void copy_others(const GradientArguments<T>& a, GradientShared<T, Shape>& shared, int stage,
                                   Cursor& ahead) {
  constexpr int D = Shape::D, kChunk = Shape::kChunk;
  const int thread = static_cast<int>(threadIdx.x);
  const AttentionSide& side = Shape::kOwnKeys ? a.rule.queries : a.rule.keys;
#pragma unroll 1
  for (int chunk = 0; chunk < Shape::kOthers / kChunk && ahead.member < a.members; ++chunk) {
    const int32_t valid = shared.walk.segments[ahead.segment].end - ahead.row;
    const int64_t of_queries = query_head<Shape>(a, ahead.member);
    const int64_t head = Shape::kOwnKeys ? of_queries : of_queries / a.rule.group;
#pragma unroll
    for (int factor = 0; factor < 2; ++factor) {
      copy_rows<T, D, kChunk, kAttentionThreads>(
          ptx::shared_address(shared.others[stage][factor]) + chunk * kChunk * D * 2, a.others[factor], head, ahead.row,
          valid, thread);
    }
    if (thread < kChunk) {
      const bool there = thread < valid;
      const int place = chunk * kChunk + thread;
      const uint32_t bytes = there ? 4 : 0;
      if constexpr (Shape::kOwnKeys) {
        const int64_t row = of_queries * a.of_rows.stride + (there ? ahead.row + thread : 0);
        ptx::copy4_async(ptx::shared_address(&shared.levels[stage][place]), a.of_rows.levels + row, bytes);
        ptx::copy4_async(ptx::shared_address(&shared.shares[stage][place]), a.of_rows.shares + row, bytes);
      }
      if (side.positions != nullptr) {
        ptx::copy4_async(ptx::shared_address(&shared.positions[stage][place]),
                         side.positions + (there ? ahead.row + thread : 0), bytes);
      }
    }
    advance<kChunk>(shared.walk, ahead);
  }
}

// Finds the warp's rows, starts their copies and waits for them; plans the block's walk and starts its first tile.
template <class T, class Shape>
__device__ inline void begin_rows(const GradientArguments<T>& a, GradientShared<T, Shape>& shared, int32_t block,
                                  GradientRows<Shape>& rows, Cursor& now, Cursor& ahead) {
  constexpr int D = Shape::D;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const int64_t head = blockIdx.y;
  const AttentionSide& side = Shape::kOwnKeys ? a.rule.keys : a.rule.queries;
  OwnRows& own = rows.own;
  own = own_rows<Shape::kOwn, Shape::kOwnKeys>(a.rule, block * kAttentionWarps + warp, lane);
  rows.window = window_of<Shape::kOwnKeys>(a.rule);
#pragma unroll
  for (int factor = 0; factor < 2; ++factor) {
    rows.tiles[factor] = ptx::shared_address(shared.own[factor][warp]);
    copy_rows<T, D, Shape::kOwn, kWarp>(rows.tiles[factor], a.own[factor], head, own.first, own.count, lane);
  }
  ptx::commit_copies();
  plan_walk(shared.walk, own, warp, lane);
  rows.segment = shared.walk.segment_of[warp];
  now = ahead = walk_start(shared.walk, a.members);
  copy_others(a, shared, 0, ahead);
  ptx::commit_copies();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = 8 * r + lane / 4;
    const bool there = row < own.count;
    const int64_t place = head * a.of_rows.stride + own.first + row;
    rows.at[r] = there ? position_of(side, own.start, own.first + row) : 0;
    rows.level[r] = !Shape::kOwnKeys && there ? a.of_rows.levels[place] : 0;
    rows.share[r] = !Shape::kOwnKeys && there ? a.of_rows.shares[place] : 0;
  }
  ptx::wait_copies<1>();
  ptx::sync_warp();
  if constexpr (Shape::kHoldsOwn) {
#pragma unroll
    for (int factor = 0; factor < 2; ++factor) {
#pragma unroll
      for (int step = 0; step < D / 16; ++step) {
        if (has_columns(step / 2, a.own[factor].dim)) {
          load_left<D>(rows.tiles[factor], step, lane, rows.held[factor][step]);
        }
      }
    }
  }
}

// One of the two products of the warp's rows and a step of the other side's.
template <int factor, class T, class Shape>
__device__ inline void multiply_rows(const GradientArguments<T>& a, GradientRows<Shape>& rows, uint32_t others,
                                     int lane, float (&products)[2][4]) {
  constexpr int D = Shape::D;
  // 256 columns at once would ask for more registers than there are
  constexpr int kAtOnce = D == 256 ? 4 : D / 16;
#pragma unroll kAtOnce
  for (int step = 0; step < D / 16; ++step) {
    if (!has_columns(step / 2, a.own[factor].dim)) continue;
    uint32_t left[4], right[4];
    if constexpr (!Shape::kHoldsOwn) load_left<D>(rows.tiles[factor], step, lane, left);
    load_right_turned<D>(others, step, lane, right);
    const uint32_t (&own)[4] = Shape::kHoldsOwn ? rows.held[factor][Shape::kHoldsOwn ? step : 0] : left;
    multiply<T>(products[0], own, right[0], right[1]);
    multiply<T>(products[1], own, right[2], right[3]);
  }
}

// Weights of the pairs of the warp's rows and a step of the other side's, and the gradients of their scores; before the
// soft cap, but of the final scores for the table. The step is rows `row` on, at `chunk` of the tile.
template <class T, class Shape>
__device__ inline void pair_gradients(const GradientArguments<T>& a, const GradientShared<T, Shape>& shared, int stage,
                                      int chunk, int32_t row, GradientRows<Shape>& rows, const float* table,
                                      float (&weights)[2][4], float (&changes)[2][4]) {
  constexpr int D = Shape::D, kChunk = Shape::kChunk;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  float scores[1][2][4] = {}, slopes[1][2][4] = {}, gains[2][4] = {};
  multiply_rows<0>(a, rows, ptx::shared_address(shared.others[stage][0]) + chunk * kChunk * D * 2, lane, scores[0]);
  multiply_rows<1>(a, rows, ptx::shared_address(shared.others[stage][1]) + chunk * kChunk * D * 2, lane, gains);
  const AttentionSide& side = Shape::kOwnKeys ? a.rule.queries : a.rule.keys;
  const bool positions = side.positions != nullptr;
  const int32_t coordinate = row - rows.own.other_start, valid = rows.own.other_end - row;
  const Columns columns =
      columns_of(positions ? shared.positions[stage] + chunk * kChunk : nullptr, coordinate, valid, lane);
  if (a.rule.formed) form_scores<Shape::kOwnKeys, true>(a.rule, table, columns, rows.at, scores, slopes);
  const float factor = a.rule.formed ? 1.0f : a.rule.factor;
  const bool sloped = Shape::kPass != Pass::table && a.rule.cap != 0;
  const bool all = all_pair<kChunk>(rows.own, rows.window, positions, coordinate, valid);
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int place = chunk * kChunk + 8 * n + lane % 4 * 2 + i % 2;
      const float level = Shape::kOwnKeys ? shared.levels[stage][place] : rows.level[i / 2];
      const float share = Shape::kOwnKeys ? shared.shares[stage][place] : rows.share[i / 2];
      const float weight = ptx::exp2_near(ptx::fused_multiply_add(scores[0][n][i], factor, -level));
      float change = weight * (gains[n][i] - share);
      if (sloped) change *= slopes[0][n][i];
      // what does not pair may be anything, not a number even
      const bool paired = all || pairs(columns, n, i % 2, rows.at[i / 2], rows.window);
      weights[n][i] = paired ? weight : 0.0f;
      changes[n][i] = paired ? change : 0.0f;
    }
  }
}

// The gradient of the bias table [heads of queries, entries]; in attention_bias.cu.
Tensor bias_gradient(const char* op, const AttentionCall& call, const Tensor& q, const Tensor& k, const Tensor& v,
                     const Tensor& grad_out, const GradientLevels& of_rows);

}  // namespace embedding_kernels::cuda

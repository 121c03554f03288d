// varlen_attention on CUDA.
//
// bfloat16 and float16, heads of 16 to 256 dimensions in steps of 8, padded to 64, 128 or 256 columns in shared memory
// and to a multiple of 32 in the products. float32 is left to the Triton kernel.
//
//   columns  rows of a warp  keys of a tile, of a step  blocks of a processor of sm_80, of sm_90; serves
//   64       32              64, 32                     2, 2   long sequences: half the reads of keys for a product
//   128      32              32, 32                     2, 2
//   64       16              64, 16                     3, 4   short ones: a text wastes 15 rows at most
//   128      16              32, 16                     3, 3
//   256      16              32, 16                     1, 2
//
// A block is four warps; tiles of keys and values arrive by asynchronous copies, one tile ahead. The work of a pair of
// a query and a key is 4 · columns operations and an exponential; a block of 128 queries reads 4 · columns bytes for
// each key, 128 operations a byte. Of short texts only the bytes count: q, k, v and out once.
#include "../kernels.h"
#include "attention_hopper.cuh"
#include "attention_softmax.cuh"

namespace embedding_kernels::cuda {
namespace {

template <int columns, int tiles>
struct ForwardShape {
  static constexpr int D = columns, kTiles = tiles;
  static constexpr int kOwn = 16 * kTiles;              // queries of a warp
  static constexpr int kKeys = D == 64 ? 64 : 32;       // of a tile
  static constexpr int kChunk = kTiles == 1 ? 16 : 32;  // of a step
  // in registers, where that leaves enough; short texts rather have more blocks on a processor
  static constexpr bool kHoldsQueries = kTiles == 2 && D == 64;
  static constexpr int kBlocks = kTiles == 2 || D == 256 ? 1 : D == 64 ? 4 : 3;
};

template <class T, class Shape>
struct ForwardShared {
  static constexpr int D = Shape::D;
  alignas(128) T queries[kAttentionWarps][Shape::kOwn * D];
  T keys[2][Shape::kKeys * D];
  T values[2][Shape::kKeys * D];
  float table[kStagedBiases];
  int32_t positions[2][Shape::kKeys];
  Walk walk;
};

template <class T>
struct ForwardArguments {
  AttentionRule rule;
  Rotation rotation;
  bool rotate_keys;  // else they come rotated
  bool last_first;   // the last queries have the most keys
  HeadRows<T> queries, keys, values;
  T* out;      // [total, heads, values.dim]
  float* lse;  // [heads, total]
};

// Starts the copies of the tile at the cursor, and moves on past it.
template <class T, class Shape>
__device__ inline void copy_keys(const ForwardArguments<T>& a, ForwardShared<T, Shape>& shared, int stage,
                                 Cursor& ahead, int32_t head) {
  constexpr int D = Shape::D;
  const int thread = static_cast<int>(threadIdx.x);
  const uint32_t keys = ptx::shared_address(shared.keys[stage]), values = ptx::shared_address(shared.values[stage]);
#pragma unroll 1
  for (int chunk = 0; chunk < Shape::kKeys / Shape::kChunk && ahead.member == 0; ++chunk) {
    const int32_t valid = shared.walk.segments[ahead.segment].end - ahead.row;
    const uint32_t offset = chunk * Shape::kChunk * D * 2;
    copy_rows<T, D, Shape::kChunk, kAttentionThreads>(keys + offset, a.keys, head, ahead.row, valid, thread);
    copy_rows<T, D, Shape::kChunk, kAttentionThreads>(values + offset, a.values, head, ahead.row, valid, thread);
    if (a.rule.keys.positions != nullptr && thread < Shape::kChunk) {
      const bool there = thread < valid;
      ptx::copy4_async(ptx::shared_address(&shared.positions[stage][chunk * Shape::kChunk + thread]),
                       a.rule.keys.positions + (there ? ahead.row + thread : 0), there ? 4 : 0);
    }
    advance<Shape::kChunk>(shared.walk, ahead);
  }
}

// Turns the keys of a tile that has arrived.
template <class T, class Shape>
__device__ inline void rotate_keys(const ForwardArguments<T>& a, ForwardShared<T, Shape>& shared, int stage,
                                   Cursor cursor) {
  constexpr int D = Shape::D;
#pragma unroll 1
  for (int chunk = 0; chunk < Shape::kKeys / Shape::kChunk && cursor.member == 0; ++chunk) {
    const Segment& segment = shared.walk.segments[cursor.segment];
    const int32_t* const positions = shared.positions[stage] + chunk * Shape::kChunk;
    const int32_t first = cursor.row - segment.start;
    rotate_tile<T, D>(shared.keys[stage] + chunk * Shape::kChunk * D, smaller(segment.end - cursor.row, Shape::kChunk),
                      a.rotation, static_cast<int>(threadIdx.x), kAttentionThreads,
                      [&](int row) { return a.rule.keys.positions == nullptr ? first + row : positions[row]; });
    advance<Shape::kChunk>(shared.walk, cursor);
  }
}

// A warp's queries.
template <class Shape>
struct QueryRows {
  OwnRows own;
  int32_t segment;
  Window window;
  uint32_t tile;                  // in shared memory
  int32_t at[2 * Shape::kTiles];  // positions of the lane's rows
  uint32_t held[Shape::kTiles][Shape::kHoldsQueries ? Shape::D / 16 : 1][4];
};

// Turns the queries, which have arrived, and takes what of them stays in registers.
template <class T, class Shape>
__device__ inline void take_queries(const ForwardArguments<T>& a, T* tile, QueryRows<Shape>& rows, int lane) {
  constexpr int D = Shape::D;
  const OwnRows& own = rows.own;
  if (a.rotation.half > 0) {
    rotate_tile<T, D>(tile, own.count, a.rotation, lane, kWarp,
                      [&](int row) { return position_of(a.rule.queries, own.start, own.first + row); });
    ptx::sync_warp();
  }
  if constexpr (Shape::kHoldsQueries) {
#pragma unroll
    for (int m = 0; m < Shape::kTiles; ++m) {
#pragma unroll
      for (int step = 0; step < D / 16; ++step) {
        if (has_columns(step / 2, a.queries.dim)) {
          load_left<D>(rows.tile + m * 16 * D * 2, step, lane, rows.held[m][step]);
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < 2 * Shape::kTiles; ++r) {
    const int row = r * 8 + lane / 4;
    rows.at[r] = row < own.count ? position_of(a.rule.queries, own.start, own.first + row) : 0;
  }
}

// Products of the queries and a step of keys.
template <class T, class Shape, int kColumns>
__device__ inline void multiply_queries(const ForwardArguments<T>& a, QueryRows<Shape>& rows, uint32_t keys, int lane,
                                        float (&scores)[Shape::kTiles][kColumns][4]) {
  constexpr int D = Shape::D, kTiles = Shape::kTiles;
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {
    if (!has_columns(step / 2, a.queries.dim)) continue;
    uint32_t left[kTiles][4];
    if constexpr (!Shape::kHoldsQueries) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m) load_left<D>(rows.tile + m * 16 * D * 2, step, lane, left[m]);
    }
#pragma unroll
    for (int n = 0; n < kColumns; n += 2) {
      uint32_t right[4];
      load_right_turned<D>(keys + n * 8 * D * 2, step, lane, right);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        const uint32_t (&queries)[4] = Shape::kHoldsQueries ? rows.held[m][Shape::kHoldsQueries ? step : 0] : left[m];
        multiply<T>(scores[m][n], queries, right[0], right[1]);
        multiply<T>(scores[m][n + 1], queries, right[2], right[3]);
      }
    }
  }
}

// Weights of one step of keys: replaces the scores, and scales what was gathered to their level.
template <int D, int kTiles, int kColumns>
__device__ inline void weigh(float factor, float (&scores)[kTiles][kColumns][4], Gathered<D, kTiles>& gathered) {
  float level[2 * kTiles];
  const bool higher = raise_levels<kTiles, kColumns>(factor, scores, gathered.level, level);
  // mostly the highest is among the first keys
  if (ptx::vote_ballot(higher) != 0) {
#pragma unroll
    for (int r = 0; r < 2 * kTiles; ++r) {
      const float decay = decay_of(gathered.level[r], level[r]);
      gathered.level[r] = level[r];
      gathered.sums[r] *= decay;
      scale_row<kTiles, D / 8>(r, decay, gathered.mixed);
    }
  }
  form_weights<kTiles, kColumns>(factor, level, scores, gathered.sums);
}

// Adds the values of a step of keys by their weights.
template <class T, int D, int kTiles, int kColumns>
__device__ inline void add_values(uint32_t values, int32_t dim, int lane, const float (&scores)[kTiles][kColumns][4],
                                  Gathered<D, kTiles>& gathered) {
  uint32_t weights[kTiles][kColumns / 2][4];
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kColumns; n += 2) left_of<T>(scores[m][n], scores[m][n + 1], weights[m][n / 2]);
  }
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {
    if (!has_columns(step / 2, dim)) continue;
#pragma unroll
    for (int n = 0; n < kColumns / 2; ++n) {
      uint32_t right[4];
      load_right<D>(values + n * 16 * D * 2, step, lane, right);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        multiply<T>(gathered.mixed[m][2 * step], weights[m][n], right[0], right[1]);
        multiply<T>(gathered.mixed[m][2 * step + 1], weights[m][n], right[2], right[3]);
      }
    }
  }
}

// Output and lse of the warp's rows. They go out by way of the queries' place, which only this warp reads.
template <class T, int D, int kTiles>
__device__ inline void write_rows(const ForwardArguments<T>& a, T* tile, const OwnRows& own, int64_t head, int lane,
                                  const Gathered<D, kTiles>& gathered) {
  ptx::sync_warp();
#pragma unroll
  for (int r = 0; r < 2 * kTiles; ++r) {
    const int row = r * 8 + lane / 4;
    float sum = gathered.sums[r];
    sum += ptx::shuffle_xor(sum, 1);
    sum += ptx::shuffle_xor(sum, 2);
    const float share = sum == 0 ? 0.0f : 1 / sum;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      if (!has_columns(n / 4, a.values.dim)) continue;
      const float low = gathered.mixed[r / 2][n][r % 2 * 2], high = gathered.mixed[r / 2][n][r % 2 * 2 + 1];
      auto* const to = reinterpret_cast<uint32_t*>(tile + element_index<D>(row, 8 * n + lane % 4 * 2));
      *to = sum == 0 ? 0u : pack_pair<T>(low * share, high * share);
    }
    if (lane % 4 == 0 && row < own.count) {
      a.lse[head * a.rule.queries.total + own.first + row] = lse_of(gathered.level[r], sum);
    }
  }
  ptx::sync_warp();
  const int pieces = a.values.dim / 8;
  const int64_t width = static_cast<int64_t>(gridDim.y) * a.values.dim;
  T* const out = a.out + own.first * width + head * a.values.dim;
  for (int item = lane; item < own.count * pieces; item += kWarp) {
    const int row = item / pieces, piece = item % pieces;
    const uint32_t from = ptx::shared_address(tile) + piece_offset<D>(row, piece);
    ptx::store_words4(out + row * width + 8 * piece, ptx::load_shared_words4(from));
  }
}

template <class T, class Shape>
__global__ void __launch_bounds__(kAttentionThreads, Shape::kBlocks) attention_kernel(const ForwardArguments<T> a) {
  constexpr int D = Shape::D, kTiles = Shape::kTiles, kChunk = Shape::kChunk, kColumns = kChunk / 8;
  auto& shared = shared_memory<ForwardShared<T, Shape>>();
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const auto head = static_cast<int32_t>(blockIdx.y), head_of_keys = head / a.rule.group;
  const int32_t block = static_cast<int32_t>(a.last_first ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
  QueryRows<Shape> rows;
  const OwnRows& own = rows.own;
  rows.own = own_rows<Shape::kOwn, false>(a.rule, block * kAttentionWarps + warp, lane);
  rows.window = window_of<false>(a.rule);
  rows.tile = ptx::shared_address(shared.queries[warp]);
  copy_rows<T, D, Shape::kOwn, kWarp>(rows.tile, a.queries, head, own.first, own.count, lane);
  ptx::commit_copies();
  const float* const table = stage_table(a.rule, head, shared.table);
  plan_walk(shared.walk, own, warp, lane);
  rows.segment = shared.walk.segment_of[warp];
  Cursor now = walk_start(shared.walk, 1), ahead = now;
  copy_keys(a, shared, 0, ahead, head_of_keys);
  ptx::commit_copies();
  ptx::wait_copies<1>();
  ptx::sync_warp();
  take_queries(a, shared.queries[warp], rows, lane);

  Gathered<D, kTiles> gathered = {};
#pragma unroll
  for (int r = 0; r < 2 * kTiles; ++r) gathered.level[r] = -INFINITY;
  const bool positions = a.rule.keys.positions != nullptr;
  const bool formed = a.rule.formed;
  for (int stage = 0; now.member == 0; stage ^= 1) {
    ptx::wait_copies<0>();
    ptx::sync_block();  // the tile is here, and nobody reads the other one any more
    copy_keys(a, shared, stage ^ 1, ahead, head_of_keys);
    ptx::commit_copies();
    ptx::sync_warp();  // products want its lanes together
    if constexpr (kTiles == 1) {
      if (a.rotate_keys) {
        rotate_keys(a, shared, stage, now);
        ptx::sync_block();
      }
    }
#pragma unroll 1
    for (int chunk = 0; chunk < Shape::kKeys / kChunk && now.member == 0; ++chunk) {
      const int32_t row = now.row;
      const bool mine = now.segment == rows.segment && row < own.walk_last && row + kChunk > own.walk_first;
      advance<kChunk>(shared.walk, now);
      if (!mine) continue;  // the whole warp
      const uint32_t offset = chunk * kChunk * D * 2;
      float scores[kTiles][kColumns][4] = {};
      multiply_queries<T, Shape, kColumns>(a, rows, ptx::shared_address(shared.keys[stage]) + offset, lane, scores);
      const int32_t coordinate = row - own.other_start, valid = own.other_end - row;
      const Columns columns =
          columns_of(positions ? shared.positions[stage] + chunk * kChunk : nullptr, coordinate, valid, lane);
      if (formed) form_scores<false, false, kTiles, kColumns>(a.rule, table, columns, rows.at, scores, scores);
      if (!all_pair<kChunk>(own, rows.window, positions, coordinate, valid))
        hide(rows.at, rows.window, columns, scores);
      weigh<D, kTiles, kColumns>(formed ? 1.0f : a.rule.factor, scores, gathered);
      add_values<T, D, kTiles, kColumns>(ptx::shared_address(shared.values[stage]) + offset, a.values.dim, lane, scores,
                                         gathered);
    }
  }
  write_rows(a, shared.queries[warp], own, head, lane, gathered);
}

template <class T, int D, int kTiles>
void launch_attention(const ForwardArguments<T>& a, int64_t heads, const Tensor& like) {
  using Shape = ForwardShape<D, kTiles>;
  const int64_t slots = a.rule.queries.total / Shape::kOwn + a.rule.sequences;
  const dim3 grid(static_cast<unsigned>((slots + kAttentionWarps - 1) / kAttentionWarps), static_cast<unsigned>(heads));
  launch("varlen_attention", attention_kernel<T, Shape>, grid, dim3(kAttentionThreads), sizeof(ForwardShared<T, Shape>),
         current_stream(like), a);
}

// Texts of more than a few slots: the wide shape. A mean and a longest length are all that the host knows.
bool are_long(const AttentionCall& call) {
  const AttentionTensors& t = call.tensors;
  return t.max_seqlen_q > 128 && t.q.size(0) >= 64 * int64_t{call.rule.sequences};
}

template <class T>
void attend(const AttentionCall& call, Tensor& out, Tensor& lse) {
  const char* const op = "varlen_attention";
  const AttentionTensors& t = call.tensors;
  const int64_t heads = t.q.size(1), columns = std::max(t.q.size(2), t.v.size(2));
  const bool is_long = are_long(call) && columns <= 128;
  // keys that many slots of queries read are turned once, before
  const bool beforehand = is_long || t.max_seqlen_q > 256 / call.rule.group;
  const Tensor keys = beforehand ? rotated(op, call, t.k, call.rule.keys) : t.k;
  const ForwardArguments<T> a = {call.rule,
                                 call.rotation,
                                 call.rotation.half > 0 && !beforehand,
                                 call.rule.after < call.rule.before,
                                 head_rows<T>(t.q),
                                 head_rows<T>(keys),
                                 head_rows<T>(t.v),
                                 mutable_pointer<T>(out),
                                 mutable_pointer<float>(lse)};
  if (columns <= 64) {
    is_long ? launch_attention<T, 64, 2>(a, heads, t.q) : launch_attention<T, 64, 1>(a, heads, t.q);
  } else if (columns <= 128) {
    is_long ? launch_attention<T, 128, 2>(a, heads, t.q) : launch_attention<T, 128, 1>(a, heads, t.q);
  } else {
    launch_attention<T, 256, 1>(a, heads, t.q);
  }
}

}  // namespace

std::tuple<Tensor, Tensor> varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k,
                                            int64_t max_seqlen_q, int64_t max_seqlen_k, EK_ATTENTION_OPTIONS) {
  const AttentionCall call("varlen_attention",
                           {q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, bias_table, rope_cos,
                            rope_sin, positions_q, positions_k, seqused_k},
                           scale, causal, window_left, window_right, softcap);
  Tensor out = empty_like_device(q, {q.size(0), q.size(1), v.size(2)}, q.scalar_type());
  Tensor lse = empty_like_device(q, {q.size(1), q.size(0)}, ScalarType::Float);
  if (q.size(0) == 0 || call.rule.sequences < 1) return {out, lse};
  if constexpr (kForHopper) {
    if (goes_to_hopper(call)) {
      attend_on_hopper(call, out, lse);
      return {out, lse};
    }
  }
  with_half_type(q.scalar_type(), [&]<class T>(T) { attend<T>(call, out, lse); });
  return {out, lse};
}

}  // namespace embedding_kernels::cuda

// The gradient of the bias table: sums over the pairs of equal (clamped) distance, in a pass of its own. Each warp adds
// the diagonals of its steps to a table of its own, each block those of its four warps, and a second launch those of
// the blocks; all in fixed order. Memory does not grow with the tokens.
#include "attention_backward.cuh"

namespace embedding_kernels::cuda {
namespace {

constexpr int kBins = 512;  // of the table that a block sums; larger ones are taken in parts
constexpr int kThreads = 128;
constexpr int kBlocksAProcessor = 4;

template <class T, class Shape>
struct TableShared {
  GradientShared<T, Shape> gradient;
  float changes[kAttentionWarps][Shape::kOwn][Shape::kChunk + 1];  // a column more keeps diagonals in different banks
  int32_t at[kAttentionWarps][Shape::kOwn];
  float sums[kAttentionWarps][kBins];
};

// The part of a head's table that a block sums.
struct TablePart {
  int32_t reach, first, bins;
};

// Adds a warp's step to its sums where distances grow by one from column to column and fall from row to row: lane l
// owns the diagonal l − 15, whose distance is `corner` for l = 15.
template <class T, class Shape>
__device__ inline void add_diagonals(TableShared<T, Shape>& shared, int32_t corner, const TablePart& part, int warp,
                                     int lane) {
  const auto [reach, first, bins] = part;
  static_assert(Shape::kOwn == 16 && Shape::kChunk == 16);
  const int slant = lane - 15;
  float sum = 0;
#pragma unroll
  for (int r = 0; r < 16; ++r) {
    const int column = r + slant;
    if (column >= 0 && column < 16) sum += shared.changes[warp][r][column];
  }
  const int32_t distance = corner + slant;
  // the ends of the table take all that is further, and are one where reach is 0
  const bool low = distance <= -reach, high = !low && distance >= reach;
  const float lowest = ptx::vote_ballot(low) != 0 ? warp_sum(low ? sum : 0) : 0;
  const float highest = ptx::vote_ballot(high) != 0 ? warp_sum(high ? sum : 0) : 0;
  float* const sums = shared.sums[warp];
  const int32_t place = distance + reach - first;
  if (!low && !high && place >= 0 && place < bins) sums[place] += sum;
  if (lane == 0) {
    const int32_t last = 2 * reach - first;
    if (first == 0) sums[0] += lowest;
    if (last < bins) sums[last] += highest;
  }
}

// The same for any distances: lane l owns every 32nd entry from l on, and looks at all pairs.
template <class T, class Shape>
__device__ inline void add_places(TableShared<T, Shape>& shared, const int32_t* positions, int32_t coordinate,
                                  const TablePart& part, int warp, int lane) {
  const auto [reach, first, bins] = part;
  for (int r = 0; r < Shape::kOwn; ++r) {
    for (int c = 0; c < Shape::kChunk; ++c) {
      const int32_t apart = difference(positions == nullptr ? coordinate + c : positions[c], shared.at[warp][r]);
      const int32_t place = smaller(larger(apart, -reach), reach) + reach - first;
      if (place >= 0 && place < bins && place % kWarp == lane) shared.sums[warp][place] += shared.changes[warp][r][c];
    }
  }
}

// Adds the pairs of the warp's rows and a step of the keys, rows `row` on, at `chunk` of the tile.
template <class T, class Shape>
__device__ inline void add_step(const GradientArguments<T>& a, TableShared<T, Shape>& all, int stage, int chunk,
                                int32_t row, GradientRows<Shape>& rows, bool own_count, const float* table,
                                const TablePart& part, int warp, int lane) {
  constexpr int kChunk = Shape::kChunk;
  float weights[2][4], changes[2][4];
  pair_gradients(a, all.gradient, stage, chunk, row, rows, table, weights, changes);
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int own = lane / 4 + i / 2 * 8;
      // rows past the sequence's would pair like others
      all.changes[warp][own][8 * n + lane % 4 * 2 + i % 2] = own < rows.own.count ? changes[n][i] : 0;
    }
  }
  ptx::sync_warp();
  const int32_t coordinate = row - rows.own.other_start, valid = rows.own.other_end - row;
  const int32_t* const positions =
      a.rule.keys.positions == nullptr ? nullptr : all.gradient.positions[stage] + chunk * kChunk;
  const bool counts = positions == nullptr || lane >= smaller(valid, kChunk) || positions[lane] == positions[0] + lane;
  if (own_count && ptx::vote_ballot(!counts) == 0) {
    const int32_t corner = difference(positions == nullptr ? coordinate : positions[0], all.at[warp][0]);
    add_diagonals(all, corner, part, warp, lane);
  } else {
    add_places(all, positions, coordinate, part, warp, lane);
  }
  ptx::sync_warp();
}

// Whether the positions of the warp's rows count up by one; notes them.
template <class T, class Shape>
__device__ inline bool note_positions(const GradientArguments<T>& a, TableShared<T, Shape>& all, const OwnRows& own,
                                      int warp, int lane) {
  if (lane < Shape::kOwn) {
    all.at[warp][lane] = lane < own.count ? position_of(a.rule.queries, own.start, own.first + lane) : 0;
  }
  ptx::sync_warp();
  const bool counts = lane >= own.count || all.at[warp][lane] == all.at[warp][0] + lane;
  return ptx::vote_ballot(!counts) == 0;
}

// partial [gridDim.x, heads, gridDim.z kBins]: part blockIdx.z of a head's table, over every gridDim.x-th block of
// rows.
template <class T, class Shape>
__global__ void __launch_bounds__(kAttentionThreads)
    attention_bias_kernel(GradientArguments<T> a, int32_t blocks, float* __restrict__ partial) {
  constexpr int kChunk = Shape::kChunk;
  auto& all = shared_memory<TableShared<T, Shape>>();
  GradientShared<T, Shape>& shared = all.gradient;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const int32_t reach = a.rule.reach, first = static_cast<int32_t>(blockIdx.z) * kBins;
  const TablePart part = {reach, first, smaller(2 * reach + 1 - first, kBins)};
  // only pairs of this part are visited
  if (first > 0) a.rule.before = smaller(a.rule.before, reach - first);
  if (first + part.bins <= 2 * reach) a.rule.after = smaller(a.rule.after, first + part.bins - 1 - reach);
  const float* const table = stage_table(a.rule, blockIdx.y, shared.table);
  for (int bin = lane; bin < kBins; bin += kWarp) all.sums[warp][bin] = 0;

  for (int32_t block = static_cast<int32_t>(blockIdx.x); block < blocks; block += static_cast<int32_t>(gridDim.x)) {
    ptx::sync_block();  // the rows and the walk of the block before are not read any more
    GradientRows<Shape> rows;
    Cursor now, ahead;
    begin_rows(a, shared, block, rows, now, ahead);
    const bool own_count = note_positions(a, all, rows.own, warp, lane);
    for (int stage = 0; now.member < a.members; stage ^= 1) {
      ptx::wait_copies<0>();
      ptx::sync_block();  // the tile is here, and nobody reads the other one any more
      copy_others(a, shared, stage ^ 1, ahead);
      ptx::commit_copies();
      ptx::sync_warp();  // products want its lanes together
#pragma unroll 1
      for (int chunk = 0; chunk < Shape::kOthers / kChunk && now.member < a.members; ++chunk) {
        const int32_t row = now.row;
        const bool mine = now.segment == rows.segment && row < rows.own.walk_last && row + kChunk > rows.own.walk_first;
        advance<kChunk>(shared.walk, now);
        if (mine) add_step(a, all, stage, chunk, row, rows, own_count, table, part, warp, lane);  // the whole warp
      }
    }
  }
  ptx::sync_block();
  const int64_t place = (static_cast<int64_t>(blockIdx.x) * gridDim.y + blockIdx.y) * gridDim.z + blockIdx.z;
  for (int bin = thread; bin < kBins; bin += kAttentionThreads) {
    float sum = 0;
    for (int w = 0; w < kAttentionWarps; ++w) sum += all.sums[w][bin];
    partial[place * kBins + bin] = sum;
  }
}

// table [heads, entries]: the sum of `splits` partial tables, `padded` apart.
__global__ void attention_sum_tables_kernel(const float* __restrict__ partial, int32_t splits, int64_t heads,
                                            int64_t padded, int64_t entries, float* __restrict__ table) {
  const int64_t place = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (place >= heads * entries) return;
  const int64_t head = place / entries, entry = place % entries;
  float sum = 0;
  for (int32_t split = 0; split < splits; ++split) sum += partial[(split * heads + head) * padded + entry];
  table[place] = sum;
}

template <class T, int D>
void launch_bias(const char* op, const GradientArguments<T>& a, dim3 grid, int32_t blocks, Tensor& partial) {
  using Shape = GradientShape<D, Pass::table>;
  launch(op, attention_bias_kernel<T, Shape>, grid, dim3(kAttentionThreads), sizeof(TableShared<T, Shape>),
         current_stream(partial), a, blocks, mutable_pointer<float>(partial));
}

}  // namespace

Tensor bias_gradient(const char* op, const AttentionCall& call, const Tensor& q, const Tensor& k, const Tensor& v,
                     const Tensor& grad_out, const GradientLevels& of_rows) {
  const int64_t heads = q.size(1), entries = 2 * int64_t{call.rule.reach} + 1, parts = (entries + kBins - 1) / kBins;
  const int64_t slots = call.rule.queries.total / 16 + call.rule.sequences;
  const int64_t blocks = (slots + kAttentionWarps - 1) / kAttentionWarps;
  const int64_t wanted = (kBlocksAProcessor * int64_t{multiprocessors(q)} + heads * parts - 1) / (heads * parts);
  const int64_t splits = std::min(blocks, wanted);
  Tensor partial = empty_like_device(q, {splits, heads, parts * kBins}, ScalarType::Float);
  Tensor table = empty_like_device(q, {heads, entries}, ScalarType::Float);
  with_half_type(q.scalar_type(), [&]<class T>(T) {
    const GradientArguments<T> a = {call.rule,
                                    false,
                                    {head_rows<T>(q), head_rows<T>(grad_out)},
                                    {head_rows<T>(k), head_rows<T>(v)},
                                    1,
                                    of_rows,
                                    0,
                                    nullptr,
                                    false,
                                    nullptr};
    const dim3 grid(static_cast<unsigned>(splits), static_cast<unsigned>(heads), static_cast<unsigned>(parts));
    if (std::max(q.size(2), v.size(2)) <= 64) {
      launch_bias<T, 64>(op, a, grid, static_cast<int32_t>(blocks), partial);
    } else {
      launch_bias<T, 256>(op, a, grid, static_cast<int32_t>(blocks), partial);
    }
  });
  launch(op, attention_sum_tables_kernel, dim3(static_cast<unsigned>((heads * entries + kThreads - 1) / kThreads)),
         dim3(kThreads), 0, current_stream(q), pointer<float>(partial), static_cast<int32_t>(splits), heads,
         parts * kBins, entries, mutable_pointer<float>(table));
  return table;
}

}  // namespace embedding_kernels::cuda

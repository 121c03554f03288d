// Sums of views over the passages of a query, weighted head by head: by the softmax of products that are formed on the
// way (anchor_attention), or by weights that are given (gradients). Multiplications in float32, for every dtype and
// width.
#include "anchor_mix.cuh"

namespace embedding_kernels::cuda {
namespace {

// Passages at once: a warp has kRowsAtOnce of them, and then one of the kHeadsAtOnce heads of all.
constexpr int kMixTile = kSegmentThreads / kWarp * kRowsAtOnce;
static_assert(kMixTile == kWarp && kSegmentThreads / kWarp == kHeadsAtOnce);

// What a block of mix_kernel does: of the views and heads of a query as many blocks side by side.
struct MixItem {
  int64_t turn;
  int tile, first_head, view;

  __device__ MixItem(int64_t item, int64_t tiles, int heads, int views) {
    const int groups = (heads + kHeadsAtOnce - 1) / kHeadsAtOnce;
    tile = static_cast<int>(item % tiles);
    item /= tiles;
    first_head = static_cast<int>(item % groups) * kHeadsAtOnce;
    item /= groups;
    view = static_cast<int>(item % views);
    turn = item / views;
  }
  static int64_t of_turn(int64_t tiles, int heads, int views) {
    return tiles * ((heads + kHeadsAtOnce - 1) / kHeadsAtOnce) * views;
  }
};

struct MixShared {
  alignas(16) float weights[kMixTile][kHeadsAtOnce];
  float scores[kMixTile][kHeadsAtOnce + 1];  // a bank apart
  float correction[kHeadsAtOnce], most[kHeadsAtOnce], total[kHeadsAtOnce];
  float room[kSegmentThreads * 8];
};

// The softmax of one head so far, which a warp keeps: the largest score, and the sum of powers relative to it.
struct OnlineSoftmax {
  float most = -INFINITY, total = 0;

  // Takes one score a lane, and gives its power; `correction` is what earlier powers are now worth.
  __device__ float add(float score, float& correction) {
    const float next = fmaxf(most, warp_max(score));
    // before any score above -inf nothing has a power; NaN and inf find their way by the differences
    const float base = next == -INFINITY ? 0.0f : next;
    correction = expf(most - base);
    const float power = expf(score - base);
    total = total * correction + warp_sum(power);
    most = next;
    return power;
  }
};

// Weights of a tile's passages, from the products of its rows with the heads.
template <class T, bool kAligned>
__device__ inline void form_weights(const Anchoring<T>& a, const MixItem& item, int64_t query, int64_t start, int count,
                                    OnlineSoftmax& softmax, MixShared& shared) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int row = warp * kRowsAtOnce, heads = a.heads - item.first_head;
  float score = -INFINITY;
  if (row < count) {
    const float one = products<kAligned>(a.views.row(start + row, item.view), a.views.strides[0], count - row,
                                         a.queries.row(query, item.view, item.first_head), a.queries.strides[2],
                                         heads < kHeadsAtOnce ? heads : kHeadsAtOnce, a.dim);
    if (row + lane / kHeadsAtOnce < count) score = one;
  }
  shared.scores[row + lane / kHeadsAtOnce][lane % kHeadsAtOnce] = score;
  ptx::sync_block();
  float correction;
  shared.weights[lane][warp] = softmax.add(shared.scores[lane][warp], correction);
  if (lane == 0) shared.correction[warp] = correction;
  ptx::sync_block();
}

__device__ inline void take_weights(const GivenWeights& given, const MixItem& item, int heads, int64_t start, int count,
                                    MixShared& shared) {
  const int row = threadIdx.x / kHeadsAtOnce, head = item.first_head + threadIdx.x % kHeadsAtOnce;
  const bool exists = row < count && head < heads;
  const int64_t at = (start + row) * given.passage_stride + item.view * given.view_stride + head;
  // the tile before has been read
  ptx::sync_block();
  shared.weights[row][threadIdx.x % kHeadsAtOnce] = exists ? given.data[at] * given.share : 0.0f;
  ptx::sync_block();
}

// sums[h] of a thread's columns, over the passages of a tile that are its.
template <class T, bool kAligned, int kHeads>
__device__ inline void add_rows(const Anchoring<T>& a, const MixItem& item, const Tile& tile, int column, int64_t start,
                                int count, const MixShared& shared, float (&sums)[kHeads][kWide<T>]) {
  constexpr int N = kWide<T>;
  const int heads = a.heads - item.first_head;
  for (int first = threadIdx.x / tile.across; first < count; first += kRowsAtOnce * tile.down) {
    Part<T> parts[kRowsAtOnce] = {};
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      const int row = first + r * tile.down;
      if (row < count) parts[r] = load_part<kAligned>(a.views.row(start + row, item.view), column, a.dim);
    }
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      const int row = first + r * tile.down;
      if (row >= count) break;
      float values[N];
      widen(parts[r], values);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        if (h >= heads) break;
        const float weight = shared.weights[row][h];
#pragma unroll
        for (int i = 0; i < N; ++i) sums[h][i] = ptx::fused_multiply_add(weight, values[i], sums[h][i]);
      }
    }
  }
}

template <bool kAligned, int N>
__device__ inline void store_sums(float* row, int column, int dim, const float (&values)[N]) {
  if constexpr (kAligned) {
    store_floats(row + column, values);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (column + i < dim) row[column + i] = values[i];
    }
  }
}

// kHeads is 1 where there is but one head, else kHeadsAtOnce.
template <class T, bool kAligned, bool kSoftmax, int kHeads>
__global__ void __launch_bounds__(kSegmentThreads, sizeof(T) == 4 || kHeads == 1 ? 2 : 1)
    mix_kernel(Anchoring<T> a, GivenWeights given, Tile tile, Mixed<T> mixed) {
  constexpr int N = kWide<T>;
  auto& shared = shared_memory<MixShared>();
  const MixItem item(blockIdx.x, tile.count, a.heads, a.view_count);
  const MixSpan span(a.segments, item.turn);
  if (!span.exists()) return;
  const int column = item.tile * tile.width + threadIdx.x % tile.across * N;
  const bool inside = column < a.dim;
  float sums[kHeads][N] = {};
  OnlineSoftmax softmax;
  for (int64_t start = span.start; start < span.end; start += kMixTile) {
    const int count = static_cast<int>(span.end - start < kMixTile ? span.end - start : kMixTile);
    if constexpr (kSoftmax) {
      form_weights<T, kAligned>(a, item, span.segment, start, count, softmax, shared);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        const float correction = shared.correction[h];
#pragma unroll
        for (int i = 0; i < N; ++i) sums[h][i] *= correction;
      }
    } else {
      take_weights(given, item, a.heads, start, count, shared);
    }
    if (inside) add_rows<T, kAligned>(a, item, tile, column, start, count, shared, sums);
  }
  if (kSoftmax && threadIdx.x % kWarp == 0) {
    shared.most[threadIdx.x / kWarp] = softmax.most;
    shared.total[threadIdx.x / kWarp] = softmax.total;
  }
  if (kSoftmax) ptx::sync_block();
  const bool first = inside && static_cast<int>(threadIdx.x) < tile.across;
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    const int head = item.first_head + h;
    if (head >= a.heads) break;
    if (tile.down > 1) sum_down(tile, sums[h], shared.room);
    if (!first) continue;
    const int64_t within = static_cast<int64_t>(item.view) * a.heads + head;
    const int64_t of_query = static_cast<int64_t>(a.view_count) * a.heads;
    if (span.is_whole()) {
      // a query without passages has nothing to weigh
      const float scale = kSoftmax && span.last > span.first ? 1.0f / shared.total[h] : 1.0f;
#pragma unroll
      for (int i = 0; i < N; ++i) sums[h][i] *= scale;
      store_part<kAligned>(mixed.out + (span.segment * of_query + within) * a.dim, column, a.dim, sums[h]);
      continue;
    }
    const int64_t at = span.part() * of_query + within;
    store_sums<kAligned>(mixed.parts + at * a.dim, column, a.dim, sums[h]);
    if (kSoftmax && item.tile == 0 && threadIdx.x == 0) {
      mixed.softmax[2 * at] = shared.most[h];
      mixed.softmax[2 * at + 1] = shared.total[h];
    }
  }
}

template <class T>
void start_mix(const char* op, const AnchorTensors& tensors, const GivenWeights* given, Tensor& out) {
  const Anchoring<T> a = tensors.anchoring<T>();
  const cudaStream_t stream = current_stream(out);
  const int64_t rows = int64_t{a.view_count} * a.heads;
  MixParts buffers(out, a.segments, rows, a.dim, given == nullptr);
  const Mixed<T> mixed = buffers.mixed<T>(out);
  with_alignment(tensors.are_aligned<T>(), [&]<bool kAligned>(std::bool_constant<kAligned>) {
    const Tile tile = tile_over<kWide<T>>(a.dim, kSegmentThreads);
    const int64_t blocks = MixSpan::turns(a.segments) * MixItem::of_turn(tile.count, a.heads, a.view_count);
    const dim3 grid(static_cast<unsigned>(blocks)), block(kSegmentThreads);
    const auto start = [&](auto kernel, const GivenWeights& weights) {
      launch(op, kernel, grid, block, sizeof(MixShared), stream, a, weights, tile, mixed);
    };
    if (given == nullptr) {
      start(mix_kernel<T, kAligned, true, kHeadsAtOnce>, {});
    } else if (a.heads == 1) {
      start(mix_kernel<T, kAligned, false, 1>, *given);
    } else {
      start(mix_kernel<T, kAligned, false, kHeadsAtOnce>, *given);
    }
  });
  launch_join(op, a.segments, rows, a.dim, mixed, stream);
}

}  // namespace

void launch_mix(const char* op, const AnchorTensors& tensors, const GivenWeights* given, Tensor& out) {
  with_float_type(out.scalar_type(), [&]<class T>(T) { start_mix<T>(op, tensors, given, out); });
}

}  // namespace embedding_kernels::cuda

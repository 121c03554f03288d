// Scores of passages and the best of them on CUDA.
//
// Bytes alone count: every view is read once. 32 queries of 100 passages of 4 views of 1,024 values in bfloat16 are
// 26 MB, 5.5 us of 4.8 TB/s.
#include "../kernels.h"
#include "anchor_scores.cuh"

namespace embedding_kernels::cuda {
namespace {

constexpr int kThreads = kSegmentThreads;
constexpr int kWarps = kThreads / kWarp;
// Loads of a row, and of its anchor, that a lane has under way.
constexpr int kUnderWay = 4;

// The product of two rows, for every lane of the warp.
template <bool kAligned, class T>
__device__ inline float product(const T* a, const T* b, int dim) {
  constexpr int N = kWide<T>;
  float sum = 0;
  for (int first = threadIdx.x % kWarp * N; first < dim; first += kUnderWay * kWarp * N) {
    Part<T> of_a[kUnderWay] = {}, of_b[kUnderWay] = {};
#pragma unroll
    for (int u = 0; u < kUnderWay; ++u) {
      const int column = first + u * kWarp * N;
      if (column >= dim) continue;
      of_a[u] = load_part<kAligned>(a, column, dim);
      of_b[u] = load_part<kAligned>(b, column, dim);
    }
#pragma unroll
    for (int u = 0; u < kUnderWay; ++u) {
      float left[N], right[N];
      widen(of_a[u], left);
      widen(of_b[u], right);
#pragma unroll
      for (int i = 0; i < N; ++i) sum = ptx::fused_multiply_add(left[i], right[i], sum);
    }
  }
  return warp_sum(sum);
}

// A warp a passage; the views in order. out: [P], or [P, m] with per_view.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    scores_kernel(Anchoring<T> anchoring, bool per_view, float* __restrict__ out) {
  const Segments& segments = anchoring.segments;
  const int views = anchoring.view_count;
  const bool writes = threadIdx.x % kWarp == 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t passage = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp; passage < segments.total;
       passage += step) {
    const int64_t query = segment_of(segments, passage);
    const bool found = query >= 0 && query < segments.count;
    float sum = 0;
    for (int view = 0; view < views; ++view) {
      const T* const anchor = anchoring.queries.row(found ? query : 0, view);
      const float one = product<kAligned>(anchoring.views.row(passage, view), anchor, anchoring.dim);
      if (per_view && writes) out[passage * views + view] = found ? one : 0.0f;
      sum += one;
    }
    if (!per_view && writes) out[passage] = found ? sum / static_cast<float>(views) : 0.0f;
  }
}

// ---- the best k ----

// A score that is not a number stands where -inf would.
__device__ inline float key_of(float score) { return score == score ? score : -INFINITY; }

struct TopShared {
  float keys[kThreads];
};

// Each thread counts the scores that come before its own: that is its place in the order, whatever the others find.
// n * n comparisons of some 4 instructions: for 1,000 passages of a query a few microseconds, by their count.
__global__ void __launch_bounds__(kThreads) top_kernel(Segments segments, const float* __restrict__ scores, int64_t k,
                                                       float* __restrict__ best, int64_t* __restrict__ places) {
  auto& shared = shared_memory<TopShared>();
  const Span<kThreads> span(segments, blockIdx.x);
  if (!span.exists()) return;
  const int64_t mine = span.start + threadIdx.x;
  const float score = mine < span.end ? scores[mine] : 0.0f, key = key_of(score);
  int64_t before = 0;
  for (int64_t tile = span.first; tile < span.last; tile += kThreads) {
    const int count = static_cast<int>(span.last - tile < kThreads ? span.last - tile : kThreads);
    const int64_t place = tile + threadIdx.x;
    shared.keys[threadIdx.x] = place < span.last ? key_of(scores[place]) : 0.0f;
    ptx::sync_block();
    // of equal scores the lower place comes first
    const int64_t lower = mine - tile;
    const int own = static_cast<int>(lower < 0 ? 0 : lower < count ? lower : count);
    int higher = 0, level = 0;
    for (int i = 0; i < count; ++i) {
      higher += shared.keys[i] > key;
      level += shared.keys[i] == key && i < own;
    }
    before += higher + level;
    ptx::sync_block();
  }
  if (mine < span.end && before < k) {
    best[span.segment * k + before] = score;
    places[span.segment * k + before] = mine - span.first;
  }
  if (span.start != span.first) return;
  for (int64_t i = span.last - span.first + threadIdx.x; i < k; i += kThreads) {
    best[span.segment * k + i] = -INFINITY;
    places[span.segment * k + i] = -1;
  }
}

void launch_scores(const char* op, const AnchorTensors& tensors, bool per_view, Tensor& scores) {
  const Segments segments = tensors.segments();
  if (scores.numel() == 0 || segments.count == 0) return;
  const dim3 grid(blocks_for(segments.total, kWarps));
  with_float_type(tensors.views.scalar_type(), [&]<class T>(T) {
    with_alignment(tensors.are_aligned<T>(), [&]<bool kAligned>(std::bool_constant<kAligned>) {
      launch(op, scores_kernel<T, kAligned>, grid, dim3(kThreads), 0, current_stream(tensors.views),
             tensors.anchoring<T>(), per_view, mutable_pointer<float>(scores));
    });
  });
}

}  // namespace

Tensor anchor_scores(Tensor views, Tensor anchors, Tensor cu_passages, bool per_view) {
  const char* const op = "anchor_scores";
  anchor::check_views(op, views, "anchors", anchors, cu_passages);
  const DeviceGuard guard(views.get_device_index());
  const AnchorTensors tensors(op, views, anchors, cu_passages);
  Tensor scores = per_view ? empty_like_device(views, {views.size(0), views.size(1)}, ScalarType::Float)
                           : empty_like_device(views, {views.size(0)}, ScalarType::Float);
  launch_scores(op, tensors, per_view, scores);
  return scores;
}

std::tuple<Tensor, Tensor> anchor_topk(Tensor views, Tensor anchors, Tensor cu_passages, int64_t k) {
  const char* const op = "anchor_topk";
  anchor::check_views(op, views, "anchors", anchors, cu_passages);
  check_at_least(op, "k", k, 1);
  const DeviceGuard guard(views.get_device_index());
  const AnchorTensors tensors(op, views, anchors, cu_passages);
  const Segments segments = tensors.segments();
  Tensor scores = empty_like_device(views, {views.size(0)}, ScalarType::Float);
  Tensor best = empty_like_device(views, {segments.count, k}, ScalarType::Float);
  Tensor places = empty_like_device(views, {segments.count, k}, ScalarType::Long);
  if (segments.count == 0) return {best, places};
  launch_scores(op, tensors, false, scores);
  launch(op, top_kernel, dim3(static_cast<unsigned>(Span<kThreads>::turns(segments))), dim3(kThreads),
         sizeof(TopShared), current_stream(views), segments, pointer<float>(scores), k, mutable_pointer<float>(best),
         mutable_pointer<int64_t>(places));
  return {best, places};
}

}  // namespace embedding_kernels::cuda

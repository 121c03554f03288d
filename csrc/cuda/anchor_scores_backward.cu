// Gradients of anchor_attention and anchor_scores on CUDA: products, their softmax, and two weighted sums.
//
// Views are read twice (products; gradient of the queries) and their gradient is written once: 3 * 2 bytes a value in
// bfloat16. 32 queries of 100 passages of 4 views of 1,024 values are 79 MB, 16 us of 4.8 TB/s; 32 heads are 10 * 32
// multiplications and additions a value, 4.2 GFLOP or 63 us of 67 TFLOP/s: in float32, so that weights are not rounded.
#include "../kernels.h"
#include "anchor_scores.cuh"

namespace embedding_kernels::cuda {
namespace {

constexpr int kThreads = kSegmentThreads;
constexpr int kWarps = kThreads / kWarp;
// Passages of a block: four a warp.
constexpr int kTile = kWarps * kRowsAtOnce;

// ---- products of views with queries and gradients ----

// Of each passage, view and head the product of the view with the query, and with the gradient of the mix.
struct Slopes {
  float* scores;  // [passages, views, heads]; then the weights
  float* slopes;  // then the gradients of the scores
};

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads) products_kernel(Anchoring<T> a, StridedRows<T> grad, Slopes out) {
  const int groups = (a.heads + kHeadsAtOnce - 1) / kHeadsAtOnce, lane = threadIdx.x % kWarp;
  const int first_head = static_cast<int>(blockIdx.x % groups) * kHeadsAtOnce;
  const int view = static_cast<int>(blockIdx.x / groups % a.view_count);
  const Span<kTile> span(a.segments, blockIdx.x / groups / a.view_count);
  const int64_t start = span.start + threadIdx.x / kWarp * kRowsAtOnce;
  if (!span.exists() || start >= span.end) return;
  const int rows = static_cast<int>(span.end - start < kRowsAtOnce ? span.end - start : kRowsAtOnce);
  const int heads = a.heads - first_head < kHeadsAtOnce ? a.heads - first_head : kHeadsAtOnce;
  const auto with = [&](const StridedRows<T>& other) {
    return products<kAligned>(a.views.row(start, view), a.views.strides[0], rows,
                              other.row(span.segment, view, first_head), other.strides[2], heads, a.dim);
  };
  const float score = with(a.queries), slope = with(grad);
  const int row = lane / kHeadsAtOnce, head = lane % kHeadsAtOnce;
  if (row >= rows || head >= heads) return;
  const int64_t at = ((start + row) * a.view_count + view) * a.heads + first_head + head;
  out.scores[at] = score;
  out.slopes[at] = slope;
}

// In place: weights p, the softmax of the scores over the passages of a query, and the gradients of the scores,
// p (slope - sum of p slope). A warp takes a head.
__global__ void __launch_bounds__(kThreads) weights_kernel(Segments segments, int views, int heads, Slopes out) {
  const int64_t query = blockIdx.x / views, view = blockIdx.x % views;
  const int64_t first = segments.start(query), last = segments.end(query);
  const int lane = threadIdx.x % kWarp;
  for (int head = threadIdx.x / kWarp; head < heads; head += kWarps) {
    const auto at = [&](int64_t passage) { return (passage * views + view) * heads + head; };
    float most = -INFINITY, total = 0, sum = 0;
    for (int64_t i = first + lane; i < last; i += kWarp) most = fmaxf(most, out.scores[at(i)]);
    most = warp_max(most);
    for (int64_t i = first + lane; i < last; i += kWarp) {
      const float power = expf(out.scores[at(i)] - most);
      total += power;
      sum += power * out.slopes[at(i)];
    }
    const float scale = 1.0f / warp_sum(total), mean = warp_sum(sum) * scale;
    for (int64_t i = first + lane; i < last; i += kWarp) {
      const float weight = expf(out.scores[at(i)] - most) * scale;
      out.scores[at(i)] = weight;
      out.slopes[at(i)] = weight * (out.slopes[at(i)] - mean);
    }
  }
}

// ---- the gradient of the views: sum over the heads of weight times gradient and slope times query ----

constexpr int kRowsOfThread = 8;

struct ViewShared {
  alignas(16) float weights[kHeadsAtOnce][kTile], slopes[kHeadsAtOnce][kTile];
};

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads, 1)
    view_gradient_kernel(Anchoring<T> a, StridedRows<T> grad, Slopes given, Tile tile, T* __restrict__ out) {
  constexpr int N = kWide<T>;
  auto& shared = shared_memory<ViewShared>();
  const int column = static_cast<int>(blockIdx.x % tile.count) * tile.width + threadIdx.x % tile.across * N;
  const int view = static_cast<int>(blockIdx.x / tile.count % a.view_count);
  const Span<kTile> span(a.segments, blockIdx.x / tile.count / a.view_count);
  if (!span.exists()) return;
  const int count = static_cast<int>(span.end - span.start), group = threadIdx.x / tile.across;
  // rows of a thread: group, group + down, ..., kRowsOfThread of them at a time
  for (int base = 0; base < count; base += kRowsOfThread * tile.down) {
    float sums[kRowsOfThread][N] = {};
    for (int first = 0; first < a.heads; first += kHeadsAtOnce) {
      // the heads before have been read
      ptx::sync_block();
      const int row = threadIdx.x / kHeadsAtOnce, own = first + threadIdx.x % kHeadsAtOnce;
      const bool exists = row < count && own < a.heads;
      const int64_t at = ((span.start + row) * a.view_count + view) * a.heads + own;
      shared.weights[own - first][row] = exists ? given.scores[at] : 0.0f;
      shared.slopes[own - first][row] = exists ? given.slopes[at] : 0.0f;
      ptx::sync_block();
      for (int h = 0; h < kHeadsAtOnce && first + h < a.heads && column < a.dim; ++h) {
        float query[N], slope[N];
        widen(load_part<kAligned>(a.queries.row(span.segment, view, first + h), column, a.dim), query);
        widen(load_part<kAligned>(grad.row(span.segment, view, first + h), column, a.dim), slope);
#pragma unroll
        for (int r = 0; r < kRowsOfThread; ++r) {
          const int place = base + group + r * tile.down;
          if (place >= count) break;
          const float weight = shared.weights[h][place], of_score = shared.slopes[h][place];
#pragma unroll
          for (int i = 0; i < N; ++i) {
            sums[r][i] = ptx::fused_multiply_add(weight, slope[i], sums[r][i]);
            sums[r][i] = ptx::fused_multiply_add(of_score, query[i], sums[r][i]);
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRowsOfThread; ++r) {
      const int place = base + group + r * tile.down;
      if (column >= a.dim || place >= count) break;
      store_part<kAligned>(out + ((span.start + place) * a.view_count + view) * a.dim, column, a.dim, sums[r]);
    }
  }
}

// ---- the gradient of the views by their scores: a multiple of the anchor ----

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    score_gradient_kernel(Anchoring<T> a, GivenWeights given, T* __restrict__ out) {
  constexpr int N = kWide<T>;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t passage = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp; passage < a.segments.total;
       passage += step) {
    const int64_t query = segment_of(a.segments, passage);
    const bool found = query >= 0 && query < a.segments.count;
    for (int view = 0; view < a.view_count; ++view) {
      const T* const anchor = a.queries.row(found ? query : 0, view);
      const float weight = given.data[passage * given.passage_stride + view * given.view_stride] * given.share;
      for (int column = threadIdx.x % kWarp * N; column < a.dim; column += kWarp * N) {
        float values[N];
        widen(load_part<kAligned>(anchor, column, a.dim), values);
#pragma unroll
        for (int i = 0; i < N; ++i) values[i] = found ? values[i] * weight : 0.0f;
        store_part<kAligned>(out + (passage * a.view_count + view) * a.dim, column, a.dim, values);
      }
    }
  }
}

template <class T>
void attention_gradients(const char* op, const AnchorTensors& tensors, const Tensor& grad, const Slopes& slopes,
                         Tensor& grad_views) {
  const Anchoring<T> a = tensors.anchoring<T>();
  const cudaStream_t stream = current_stream(grad);
  const int64_t items = Span<kTile>::turns(a.segments) * a.view_count;
  const StridedRows<T> of_grad = strided<T>(grad);
  with_alignment(tensors.are_aligned<T>() && is_aligned<T>(grad), [&]<bool kAligned>(std::bool_constant<kAligned>) {
    const int groups = (a.heads + kHeadsAtOnce - 1) / kHeadsAtOnce;
    launch(op, products_kernel<T, kAligned>, dim3(static_cast<unsigned>(items * groups)), dim3(kThreads), 0, stream, a,
           of_grad, slopes);
    launch(op, weights_kernel, dim3(static_cast<unsigned>(a.segments.count * a.view_count)), dim3(kThreads), 0, stream,
           a.segments, a.view_count, a.heads, slopes);
    const Tile tile = tile_over<kWide<T>>(a.dim, kThreads);
    launch(op, view_gradient_kernel<T, kAligned>, dim3(static_cast<unsigned>(items * tile.count)), dim3(kThreads),
           sizeof(ViewShared), stream, a, of_grad, slopes, tile, mutable_pointer<T>(grad_views));
  });
}

}  // namespace

std::tuple<Tensor, Tensor> anchor_attention_backward(Tensor grad, Tensor views, Tensor queries, Tensor cu_passages) {
  const char* const op = "anchor_attention_backward";
  anchor::check_views(op, views, "queries", queries, cu_passages);
  anchor::check_attention_grad(op, grad, views, queries);
  const DeviceGuard guard(views.get_device_index());
  const AnchorTensors tensors(op, views, queries, cu_passages);
  grad = dense_rows(grad);
  Tensor grad_views = empty_as(views), grad_queries = empty_as(queries);
  if (grad_views.numel() == 0 || grad_queries.numel() == 0) {
    for (Tensor* each : {&grad_views, &grad_queries}) {
      fill_zero(op, mutable_pointer<uint8_t>(*each), each->numel() * each->element_size(), current_stream(views));
    }
    return {grad_views, grad_queries};
  }
  const int64_t heads = queries.size(2);
  Tensor scores = empty_like_device(views, {views.size(0), views.size(1), heads}, ScalarType::Float);
  Tensor slopes = empty_like_device(views, {views.size(0), views.size(1), heads}, ScalarType::Float);
  const Slopes both = {mutable_pointer<float>(scores), mutable_pointer<float>(slopes)};
  with_float_type(views.scalar_type(),
                  [&]<class T>(T) { attention_gradients<T>(op, tensors, grad, both, grad_views); });
  const GivenWeights given = {pointer<float>(slopes), views.size(1) * heads, heads, 1.0f};
  launch_mix(op, tensors, &given, grad_queries);
  return {grad_views, grad_queries};
}

std::tuple<Tensor, Tensor> anchor_scores_backward(Tensor grad, Tensor views, Tensor anchors, Tensor cu_passages,
                                                  bool per_view) {
  const char* const op = "anchor_scores_backward";
  anchor::check_views(op, views, "anchors", anchors, cu_passages);
  anchor::check_scores_grad(op, grad, views, per_view);
  const DeviceGuard guard(views.get_device_index());
  const AnchorTensors tensors(op, views, anchors, cu_passages);
  grad = torch::stable::contiguous(grad);
  Tensor grad_views = empty_as(views), grad_anchors = empty_as(anchors);
  if (grad_views.numel() == 0 || grad_anchors.numel() == 0) {
    for (Tensor* each : {&grad_views, &grad_anchors}) {
      fill_zero(op, mutable_pointer<uint8_t>(*each), each->numel() * each->element_size(), current_stream(views));
    }
    return {grad_views, grad_anchors};
  }
  const int64_t count = views.size(1);
  const float share = per_view ? 1.0f : 1.0f / static_cast<float>(count);
  const GivenWeights given = {pointer<float>(grad), per_view ? count : 1, per_view ? 1 : 0, share};
  with_float_type(views.scalar_type(), [&]<class T>(T) {
    with_alignment(tensors.are_aligned<T>(), [&]<bool kAligned>(std::bool_constant<kAligned>) {
      launch(op, score_gradient_kernel<T, kAligned>, dim3(blocks_for(views.size(0), kWarps)), dim3(kThreads), 0,
             current_stream(views), tensors.anchoring<T>(), given, mutable_pointer<T>(grad_views));
    });
  });
  launch_mix(op, tensors, &given, grad_anchors);
  return {grad_views, grad_anchors};
}

}  // namespace embedding_kernels::cuda

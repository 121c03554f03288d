// Checks and dispatch of the anchor scores family on torch tensors.
#include "anchor_scores.h"

#include "../anchor_scores_checks.h"
#include "../kernels.h"
#include "anchor_scores_driver.h"
#include "torch_support.h"

namespace embedding_kernels::cpu {
namespace {

AnchorTensor strided(const Tensor& tensor) {
  AnchorTensor strides = {static_cast<const uint8_t*>(tensor.const_data_ptr()), {}};
  for (int64_t d = 0; d + 1 < tensor.dim(); ++d) {
    strides.strides[d] = tensor.stride(d) * static_cast<int64_t>(tensor.element_size());
  }
  return strides;
}

// The arguments that all operators share, checked, and made dense where they were not. `queries` is called `name`.
struct AnchorTensors {
  Tensor views, queries, offsets;
  const char* name;

  Anchoring checked(const char* op) {
    anchor::check_views(op, views, name, queries, offsets);
    views = dense_rows(views);
    queries = dense_rows(queries);
    offsets = torch::stable::contiguous(offsets);
    const auto* starts = static_cast<const int32_t*>(offsets.const_data_ptr());
    check_offsets(op, "cu_passages", starts, offsets.size(0), views.size(0));
    return {dtype_of(views),
            strided(views),
            strided(queries),
            starts,
            queries.size(0),
            views.size(1),
            queries.dim() == 4 ? queries.size(2) : 1,
            views.size(2)};
  }
};

Tensor empty_of(const Tensor& tensor) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < tensor.dim(); ++d) sizes.push_back(tensor.size(d));
  return torch::stable::empty(sizes, tensor.scalar_type());
}

uint8_t* bytes_of(Tensor& tensor) { return static_cast<uint8_t*>(tensor.mutable_data_ptr()); }

}  // namespace

Tensor anchor_attention(Tensor views, Tensor queries, Tensor cu_passages) {
  AnchorTensors tensors{views, queries, cu_passages, "queries"};
  const Anchoring anchoring = tensors.checked("anchor_attention");
  Tensor out = empty_of(queries);
  embedding_kernels::anchor_attention(anchor_attention_loops(), anchoring, bytes_of(out), torch_threads(),
                                      TorchParallelFor());
  return out;
}

std::tuple<Tensor, Tensor> anchor_attention_backward(Tensor grad, Tensor views, Tensor queries, Tensor cu_passages) {
  const char* const op = "anchor_attention_backward";
  AnchorTensors tensors{views, queries, cu_passages, "queries"};
  const Anchoring anchoring = tensors.checked(op);
  anchor::check_attention_grad(op, grad, views, queries);
  grad = dense_rows(grad);
  Tensor grad_views = empty_of(views), grad_queries = empty_of(queries);
  const AnchorGradients out = {strided(grad), bytes_of(grad_views), bytes_of(grad_queries)};
  embedding_kernels::anchor_attention_backward(anchor_scores_loops(), anchoring, out, TorchParallelFor());
  return {grad_views, grad_queries};
}

Tensor anchor_scores(Tensor views, Tensor anchors, Tensor cu_passages, bool per_view) {
  AnchorTensors tensors{views, anchors, cu_passages, "anchors"};
  const Anchoring anchoring = tensors.checked("anchor_scores");
  std::vector<int64_t> sizes = {views.size(0)};
  if (per_view) sizes.push_back(views.size(1));
  Tensor scores = torch::stable::empty(sizes, ScalarType::Float);
  embedding_kernels::anchor_scores(anchor_scores_loops(), anchoring, per_view,
                                   static_cast<float*>(scores.mutable_data_ptr()), TorchParallelFor());
  return scores;
}

std::tuple<Tensor, Tensor> anchor_scores_backward(Tensor grad, Tensor views, Tensor anchors, Tensor cu_passages,
                                                  bool per_view) {
  const char* const op = "anchor_scores_backward";
  AnchorTensors tensors{views, anchors, cu_passages, "anchors"};
  const Anchoring anchoring = tensors.checked(op);
  anchor::check_scores_grad(op, grad, views, per_view);
  grad = torch::stable::contiguous(grad);
  Tensor grad_views = empty_of(views), grad_anchors = empty_of(anchors);
  const AnchorScoreGradients out = {static_cast<const float*>(grad.const_data_ptr()), per_view, bytes_of(grad_views),
                                    bytes_of(grad_anchors)};
  embedding_kernels::anchor_scores_backward(anchor_scores_loops(), anchoring, out, TorchParallelFor());
  return {grad_views, grad_anchors};
}

std::tuple<Tensor, Tensor> anchor_topk(Tensor views, Tensor anchors, Tensor cu_passages, int64_t k) {
  AnchorTensors tensors{views, anchors, cu_passages, "anchors"};
  const Anchoring anchoring = tensors.checked("anchor_topk");
  check_at_least("anchor_topk", "k", k, 1);
  Tensor scores = torch::stable::empty({anchors.size(0), k}, ScalarType::Float);
  Tensor places = torch::stable::empty({anchors.size(0), k}, ScalarType::Long);
  embedding_kernels::anchor_topk(anchor_scores_loops(), anchoring, k, static_cast<float*>(scores.mutable_data_ptr()),
                                 static_cast<int64_t*>(places.mutable_data_ptr()), TorchParallelFor());
  return {scores, places};
}

}  // namespace embedding_kernels::cpu

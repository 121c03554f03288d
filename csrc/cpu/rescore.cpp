// Checks and dispatch of rescoring on torch tensors.
#include "rescore.h"

#include "../hamming_checks.h"
#include "../kernels.h"
#include "rescore_driver.h"
#include "torch_support.h"

namespace embedding_kernels::cpu {
namespace {

int row_kind(const Tensor& vectors) {
  if (vectors.scalar_type() == ScalarType::Char) return kInt8Rows;
  return vectors.scalar_type() == ScalarType::Byte ? static_cast<int>(kBitRows) : static_cast<int>(dtype_of(vectors));
}

}  // namespace

std::tuple<Tensor, Tensor> rescore_topk(Tensor queries, Tensor candidates, Tensor vectors, int64_t k,
                                        std::optional<Tensor> scale) {
  check_rescore_topk(queries, candidates, vectors, k, scale);
  queries = dense_rows(queries);
  candidates = torch::stable::contiguous(candidates);
  vectors = dense_rows(vectors);
  check_candidates(static_cast<const int64_t*>(candidates.const_data_ptr()), candidates.size(0) * candidates.size(1),
                   vectors.size(0));
  const std::optional<Tensor> factors = scale ? std::optional(torch::stable::contiguous(*scale)) : std::nullopt;
  Tensor scores = torch::stable::empty({queries.size(0), k}, ScalarType::Float);
  Tensor indices = torch::stable::empty({queries.size(0), k}, ScalarType::Long);
  const Rescoring work = {static_cast<const uint8_t*>(queries.const_data_ptr()),
                          queries.size(0),
                          queries.stride(0),
                          queries.size(1),
                          dtype_of(queries),
                          static_cast<const int64_t*>(candidates.const_data_ptr()),
                          candidates.size(1),
                          candidates.stride(0),
                          static_cast<const uint8_t*>(vectors.const_data_ptr()),
                          vectors.stride(0) * static_cast<int64_t>(vectors.element_size()),
                          row_kind(vectors),
                          factors ? static_cast<const float*>(factors->const_data_ptr()) : nullptr,
                          k,
                          static_cast<float*>(scores.mutable_data_ptr()),
                          static_cast<int64_t*>(indices.mutable_data_ptr())};
  embedding_kernels::rescore_topk(rescore_loops(), work, torch_threads(), TorchParallelFor());
  return {scores, indices};
}

}  // namespace embedding_kernels::cpu

// Checks and dispatch of rescoring on torch tensors.
#include "rescore.h"

#include "../checks.h"
#include "../kernels.h"
#include "rescore_driver.h"
#include "torch_support.h"

namespace embedding_kernels::cpu {
namespace {

const char* const kOp = "rescore_topk";

void check_scale(const Tensor& queries, const Tensor& vectors, const std::optional<Tensor>& scale) {
  if (vectors.scalar_type() == ScalarType::Char) {
    if (!scale) refuse(kOp, "scale", "given for int8 vectors", "None");
    check_tensor(kOp, "scale", *scale, "a float32 tensor [D]", {ScalarType::Float}, 1);
    check_size(kOp, "scale", *scale, 0, queries.size(1), "the width of queries");
  } else if (scale) {
    refuse(kOp, "scale", "None for vectors that are not int8", describe(*scale));
  }
}

void check_candidates(const Tensor& candidates, int64_t vectors) {
  const auto* values = static_cast<const int64_t*>(candidates.const_data_ptr());
  const int64_t count = candidates.size(0) * candidates.size(1);
  const int64_t last = count == 0 ? -1 : *std::max_element(values, values + count);
  if (last >= vectors) {
    refuse(kOp, "candidates", "below " + std::to_string(vectors) + " (the number of vectors)", std::to_string(last));
  }
}

void check(const Tensor& queries, const Tensor& candidates, const Tensor& vectors, int64_t k,
           const std::optional<Tensor>& scale) {
  check_tensor(kOp, "queries", queries,
               "a float32, bfloat16 or float16 tensor [Q, D] (float64 runs with backend=\"reference\")", kFloats, 2);
  check_tensor(kOp, "candidates", candidates, "an int64 tensor [Q, C]", {ScalarType::Long}, 2);
  check_size(kOp, "candidates", candidates, 0, queries.size(0), "one row a query");
  check_tensor(kOp, "vectors", vectors,
               "a float32, bfloat16, float16 or int8 tensor [N, D] or a uint8 tensor [N, ceil(D / 8)]",
               {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Char, ScalarType::Byte}, 2);
  if (vectors.scalar_type() == ScalarType::Byte) {
    check_size(kOp, "vectors", vectors, 1, (queries.size(1) + 7) / 8, "the bits of queries");
  } else {
    check_size(kOp, "vectors", vectors, 1, queries.size(1), "the width of queries");
  }
  check_at_least(kOp, "k", k, 1);
  check_scale(queries, vectors, scale);
  check_same_device(kOp, "queries", queries, "candidates", candidates);
  check_same_device(kOp, "queries", queries, "vectors", vectors);
  if (scale) check_same_device(kOp, "queries", queries, "scale", *scale);
}

int row_kind(const Tensor& vectors) {
  if (vectors.scalar_type() == ScalarType::Char) return kInt8Rows;
  return vectors.scalar_type() == ScalarType::Byte ? static_cast<int>(kBitRows) : static_cast<int>(dtype_of(vectors));
}

}  // namespace

std::tuple<Tensor, Tensor> rescore_topk(Tensor queries, Tensor candidates, Tensor vectors, int64_t k,
                                        std::optional<Tensor> scale) {
  check(queries, candidates, vectors, k, scale);
  queries = dense_rows(queries);
  candidates = torch::stable::contiguous(candidates);
  vectors = dense_rows(vectors);
  check_candidates(candidates, vectors.size(0));
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

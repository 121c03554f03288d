// What the Hamming family refuses, in the same words on every device.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>

#include "checks.h"

namespace embedding_kernels {

inline void check_pack_bits(const Tensor& x) {
  check_tensor("pack_bits", "x", x,
               "a float32, bfloat16 or float16 tensor [N, D] (float64 runs with backend=\"reference\")", kFloats, 2);
}

inline void check_codes(const char* op, const Tensor& queries, const Tensor& codes) {
  check_tensor(op, "queries", queries, "a uint8 tensor [Q, B]", {ScalarType::Byte}, 2);
  check_tensor(op, "codes", codes, "a uint8 tensor [N, B]", {ScalarType::Byte}, 2);
  check_size(op, "codes", codes, 1, queries.size(1), "the width of queries");
  check_same_device(op, "queries", queries, "codes", codes);
}

inline void check_allowed(const char* op, const Tensor& queries, const Tensor& codes,
                          const std::optional<Tensor>& allowed) {
  if (!allowed) return;
  check_tensor(op, "allowed", *allowed, "a uint8 tensor [ceil(N / 8)]", {ScalarType::Byte}, 1);
  check_size(op, "allowed", *allowed, 0, (codes.size(0) + 7) / 8, "one bit a code");
  check_same_device(op, "queries", queries, "allowed", *allowed);
}

inline void check_hamming_topk(const Tensor& queries, const Tensor& codes, int64_t k,
                               const std::optional<Tensor>& allowed, const std::optional<Tensor>& code_norms) {
  const char* const op = "hamming_topk";
  check_codes(op, queries, codes);
  check_at_least(op, "k", k, 1);
  check_allowed(op, queries, codes, allowed);
  if (code_norms) {
    check_tensor(op, "code_norms", *code_norms, "an int32 tensor [N]", {ScalarType::Int}, 1);
    check_size(op, "code_norms", *code_norms, 0, codes.size(0), "one for each code");
    check_same_device(op, "queries", queries, "code_norms", *code_norms);
  }
}

inline void check_hamming_range(const Tensor& queries, const Tensor& codes, int64_t radius,
                                const std::optional<Tensor>& allowed) {
  const char* const op = "hamming_range";
  check_codes(op, queries, codes);
  check_at_least(op, "radius", radius, 0);
  check_allowed(op, queries, codes, allowed);
}

// All of rescore_topk but the values of the candidates.
inline void check_rescore_topk(const Tensor& queries, const Tensor& candidates, const Tensor& vectors, int64_t k,
                               const std::optional<Tensor>& scale) {
  const char* const op = "rescore_topk";
  check_tensor(op, "queries", queries,
               "a float32, bfloat16 or float16 tensor [Q, D] (float64 runs with backend=\"reference\")", kFloats, 2);
  check_tensor(op, "candidates", candidates, "an int64 tensor [Q, C]", {ScalarType::Long}, 2);
  check_size(op, "candidates", candidates, 0, queries.size(0), "one row a query");
  check_tensor(op, "vectors", vectors,
               "a float32, bfloat16, float16 or int8 tensor [N, D] or a uint8 tensor [N, ceil(D / 8)]",
               {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Char, ScalarType::Byte}, 2);
  if (vectors.scalar_type() == ScalarType::Byte) {
    check_size(op, "vectors", vectors, 1, (queries.size(1) + 7) / 8, "the bits of queries");
  } else {
    check_size(op, "vectors", vectors, 1, queries.size(1), "the width of queries");
  }
  check_at_least(op, "k", k, 1);
  if (vectors.scalar_type() == ScalarType::Char) {
    if (!scale) refuse(op, "scale", "given for int8 vectors", "None");
    check_tensor(op, "scale", *scale, "a float32 tensor [D]", {ScalarType::Float}, 1);
    check_size(op, "scale", *scale, 0, queries.size(1), "the width of queries");
  } else if (scale) {
    refuse(op, "scale", "None for vectors that are not int8", describe(*scale));
  }
  check_same_device(op, "queries", queries, "candidates", candidates);
  check_same_device(op, "queries", queries, "vectors", vectors);
  if (scale) check_same_device(op, "queries", queries, "scale", *scale);
}

inline void check_candidates(const int64_t* candidates, int64_t count, int64_t vectors) {
  const int64_t last = count == 0 ? -1 : *std::max_element(candidates, candidates + count);
  if (last >= vectors) {
    refuse("rescore_topk", "candidates", "below " + std::to_string(vectors) + " (the number of vectors)",
           std::to_string(last));
  }
}

}  // namespace embedding_kernels

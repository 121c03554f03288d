// Checks and dispatch of the Hamming family on torch tensors.
#include "hamming.h"

#include "../hamming_checks.h"
#include "../kernels.h"
#include "hamming_driver.h"
#include "torch_support.h"

namespace embedding_kernels::cpu {
namespace {

Codes rows_of(const Tensor& codes) {
  return {static_cast<const uint8_t*>(codes.const_data_ptr()), codes.size(0), codes.stride(0), codes.size(1)};
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional(torch::stable::contiguous(*tensor)) : std::nullopt;
}
const uint8_t* bytes_of(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const uint8_t*>(tensor->const_data_ptr()) : nullptr;
}

}  // namespace

Tensor pack_bits(Tensor x) {
  check_pack_bits(x);
  x = dense_rows(x);
  const int64_t rows = x.size(0), dim = x.size(1), bytes = (dim + 7) / 8;
  Tensor out = torch::stable::empty({rows, bytes}, ScalarType::Byte);
  const auto pack = hamming_loops().pack_bits[dtype_of(x)];
  const auto* from = static_cast<const uint8_t*>(x.const_data_ptr());
  auto* to = static_cast<uint8_t*>(out.mutable_data_ptr());
  const int64_t row_bytes = x.stride(0) * static_cast<int64_t>(x.element_size());
  const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 15) / std::max<int64_t>(dim, 1));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) pack(from + n * row_bytes, dim, to + n * bytes);
  });
  return out;
}

Tensor hamming_distance(Tensor queries, Tensor codes) {
  check_codes("hamming_distance", queries, codes);
  queries = dense_rows(queries);
  codes = dense_rows(codes);
  Tensor out = torch::stable::empty({queries.size(0), codes.size(0)}, ScalarType::Int);
  embedding_kernels::hamming_distance(hamming_loops(), rows_of(queries), rows_of(codes),
                                      static_cast<int32_t*>(out.mutable_data_ptr()), torch_threads(),
                                      TorchParallelFor());
  return out;
}

std::tuple<Tensor, Tensor, Tensor> hamming_range(Tensor queries, Tensor codes, int64_t radius,
                                                 std::optional<Tensor> allowed) {
  check_hamming_range(queries, codes, radius, allowed);
  queries = dense_rows(queries);
  codes = dense_rows(codes);
  const std::optional<Tensor> mask = contiguous(allowed);
  const RangeAnswers answers = embedding_kernels::hamming_range(
      hamming_loops(), rows_of(queries), rows_of(codes), bytes_of(mask), radius, torch_threads(), TorchParallelFor());
  Tensor offsets = torch::stable::empty({queries.size(0) + 1}, ScalarType::Long);
  Tensor distances = torch::stable::empty({answers.offsets.back()}, ScalarType::Int);
  Tensor indices = torch::stable::empty({answers.offsets.back()}, ScalarType::Long);
  std::copy(answers.offsets.begin(), answers.offsets.end(), static_cast<int64_t*>(offsets.mutable_data_ptr()));
  write_range(answers, static_cast<int32_t*>(distances.mutable_data_ptr()),
              static_cast<int64_t*>(indices.mutable_data_ptr()), TorchParallelFor());
  return {offsets, distances, indices};
}

std::tuple<Tensor, Tensor> hamming_topk(Tensor queries, Tensor codes, int64_t k, std::optional<Tensor> allowed,
                                        std::optional<Tensor> code_norms) {
  check_hamming_topk(queries, codes, k, allowed, code_norms);
  queries = dense_rows(queries);
  codes = dense_rows(codes);
  const std::optional<Tensor> mask = contiguous(allowed);
  Tensor distances = torch::stable::empty({queries.size(0), k}, ScalarType::Int);
  Tensor indices = torch::stable::empty({queries.size(0), k}, ScalarType::Long);
  const TopK out = {k, static_cast<int32_t*>(distances.mutable_data_ptr()),
                    static_cast<int64_t*>(indices.mutable_data_ptr())};
  embedding_kernels::hamming_topk(hamming_loops(), rows_of(queries), rows_of(codes), bytes_of(mask), out,
                                  torch_threads(), TorchParallelFor());
  return {distances, indices};
}

}  // namespace embedding_kernels::cpu

// Token prepending, of the norm family: rows copied over others; norm.cpp has it between a residual addition and its
// norm.
#include "token_prepend.h"

#include <algorithm>
#include <cstring>

#include "../kernels.h"
#include "pooling.h"
#include "torch_support.h"

namespace embedding_kernels::cpu {
namespace {

int64_t row_bytes(const Tensor& rows) { return rows.size(1) * static_cast<int64_t>(rows.element_size()); }

const uint8_t* row_at(const Tensor& rows, int64_t row) {
  return static_cast<const uint8_t*>(rows.const_data_ptr()) +
         row * rows.stride(0) * static_cast<int64_t>(rows.element_size());
}

}  // namespace

RowCopies copies_of(const char* op, const Tensor& sources, const Tensor& targets, const Tensor& rows,
                    const char* name) {
  return checked_copies(op, sources, targets, rows, name, [](const Tensor& places) -> RowValues {
    const Tensor dense = torch::stable::contiguous(places);
    const auto* values = static_cast<const int64_t*>(dense.const_data_ptr());
    return std::vector<int64_t>(values, values + dense.size(0));
  });
}

std::vector<int64_t> places_of(const RowCopies& copies, int64_t rows) {
  std::vector<int64_t> places(rows);
  for (int64_t r = 0; r < rows; ++r) places[r] = r;
  for (const auto& [source, target] : copies) places[target] = source;
  return places;
}

Tensor take_rows(Tensor rows, const std::vector<int64_t>& places) {
  rows = dense_rows(rows);
  Tensor out = torch::stable::empty({rows.size(0), rows.size(1)}, rows.scalar_type());
  auto* const to = static_cast<uint8_t*>(out.mutable_data_ptr());
  const int64_t bytes = row_bytes(rows);
  if (bytes == 0) return out;  // memcpy takes no null pointer, even for nothing
  const int64_t block = std::max<int64_t>(1, (int64_t{1} << 16) / bytes);
  TorchParallelFor()((rows.size(0) + block - 1) / block, [&](int64_t task) {
    for (int64_t r = task * block; r < std::min(rows.size(0), (task + 1) * block); ++r) {
      std::memcpy(to + r * bytes, row_at(rows, places[r]), bytes);
    }
  });
  return out;
}

void return_gradients(RowCopies copies, Tensor& grad) {
  auto* const rows = static_cast<uint8_t*>(grad.mutable_data_ptr());
  const int64_t columns = grad.size(1), bytes = row_bytes(grad);
  if (columns == 0) return;
  const PoolingLoops& loops = pooling_loops();
  const Dtype dtype = dtype_of(grad);
  std::vector<bool> overwritten(grad.size(0));
  for (const auto& copy : copies) overwritten[copy.second] = true;
  std::sort(copies.begin(), copies.end());
  std::vector<int64_t> sources;
  std::vector<float> sums, row(columns);
  for (const auto& [source, target] : copies) {
    if (sources.empty() || sources.back() != source) {
      sources.push_back(source);
      sums.resize(sources.size() * columns);
      if (!overwritten[source]) loops.load[dtype](rows + source * bytes, columns, sums.data() + sums.size() - columns);
    }
    loops.load[dtype](rows + target * bytes, columns, row.data());
    float* const sum = sums.data() + sums.size() - columns;
    for (int64_t c = 0; c < columns; ++c) sum[c] += row[c];
  }
  for (const auto& copy : copies) std::memset(rows + copy.second * bytes, 0, bytes);
  for (size_t s = 0; s < sources.size(); ++s) {
    loops.store_scaled[dtype](sums.data() + s * columns, 1.0f, columns, rows + sources[s] * bytes);
  }
}

Tensor token_prepend(Tensor hidden, Tensor source_rows, Tensor target_rows) {
  const char* const op = "token_prepend";
  check_tensor(op, "hidden", hidden, kNormRows, kFloats, 2);
  return take_rows(hidden, places_of(copies_of(op, source_rows, target_rows, hidden, "hidden"), hidden.size(0)));
}

Tensor token_prepend_backward(Tensor grad, Tensor source_rows, Tensor target_rows) {
  const char* const op = "token_prepend_backward";
  check_tensor(op, "grad", grad, kNormRows, kFloats, 2);
  const auto copies = copies_of(op, source_rows, target_rows, grad, "grad");
  Tensor out = take_rows(grad, places_of({}, grad.size(0)));
  return_gradients(copies, out);
  return out;
}

}  // namespace embedding_kernels::cpu

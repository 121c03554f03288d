// Token prepending on CUDA, of the norm family: rows copied over others, and the way of their gradients back.
#include <array>

#include "../kernels.h"
#include "chunks.cuh"
#include "row_copies.cuh"
#include "token_prepend.cuh"

namespace embedding_kernels::cuda {
namespace {

constexpr int kThreads = 256, kBlocksAProcessor = 16;

__device__ inline bool is_row(int64_t row, int64_t rows) { return row >= 0 && row < rows; }

__global__ void shifts_kernel(const int64_t* __restrict__ sources, const int64_t* __restrict__ targets, int64_t copies,
                              int64_t rows, int64_t* __restrict__ shifts) {
  const int64_t copy = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (copy >= copies) return;
  const int64_t source = sources[copy], target = targets[copy];
  if (is_row(source, rows) && is_row(target, rows)) shifts[target] = source - target;
}

// `sorted` are the sources in the order of `order`. The tables hold zeros.
__global__ void tables_kernel(const int64_t* __restrict__ sorted, const int64_t* __restrict__ order,
                              const int64_t* __restrict__ targets, int64_t copies, int64_t rows,
                              int64_t* __restrict__ begin, int64_t* __restrict__ end, int64_t* __restrict__ over) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= copies) return;
  const int64_t source = sorted[i], copy = order[i], target = targets[copy];
  if (!is_row(source, rows)) return;
  if (i == 0 || sorted[i - 1] != source) begin[source] = i;
  if (i + 1 == copies || sorted[i + 1] != source) end[source] = i + 1;
  if (is_row(target, rows)) over[target] = copy + 1;
}

struct CopyRoute {
  const uint8_t* rows;
  int64_t stride;
  const int64_t* shifts;
  uint8_t* out;
  int64_t row_bytes;

  __device__ RowCopy operator()(int64_t row) const {
    const int64_t from = shifts == nullptr ? row : row + shifts[row];
    return {rows + from * stride, out + row * row_bytes};
  }
};

// A warp a row. Without `copied`, the targets' gradients are in `grad`.
template <class T, bool kAligned>
__global__ void return_gradients_kernel(const T* grad, int64_t grad_stride, const float* copied, CopiesOfRows copies,
                                        T* out, int64_t rows, int columns) {
  constexpr int N = kWide<T>;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (blockDim.x / kWarp);
  for (int64_t row = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp; row < rows; row += warps) {
    const int64_t begin = copies.begin[row], end = copies.end[row];
    const bool overwritten = copies.over[row] != 0;
    if (copied != nullptr && !overwritten && begin == end) continue;
    for (int column = static_cast<int>(threadIdx.x) % kWarp * N; column < columns; column += kWarp * N) {
      float sum[N];
      load_chunk<kAligned>(grad + row * grad_stride, column, overwritten ? 0 : columns, sum);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t copy = copies.order[i], target = copies.targets[copy];
        if (!is_row(target, rows)) continue;
        float part[N];
        if (copied != nullptr) {
          load_chunk<kAligned>(copied + copy * static_cast<int64_t>(columns), column, columns, part);
        } else {
          load_chunk<kAligned>(grad + target * grad_stride, column, columns, part);
        }
#pragma unroll
        for (int n = 0; n < N; ++n) sum[n] += part[n];
      }
      store_chunk<kAligned>(out + row * columns, column, columns, sum);
    }
  }
}

// The places of rows that are sorted, smallest first, equal ones as they stood; and the rows in that order.
std::array<Tensor, 2> sorted_by_row(const Tensor& rows) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 4> stack = {from(rows), from(std::optional<bool>(true)), from(int64_t{0}), from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

}  // namespace

void check_copies(const char* op, const Tensor& sources, const Tensor& targets, const Tensor& rows, const char* name) {
  checked_copies(op, sources, targets, rows, name, [&](const Tensor& places) -> RowValues {
    if (!values_are_checked()) return std::nullopt;
    const Tensor dense = torch::stable::contiguous(places);
    std::vector<int64_t> values(static_cast<size_t>(dense.size(0)));
    copy_to_host(op, values.data(), pointer<int64_t>(dense), values.size() * sizeof(int64_t), current_stream(dense));
    return values;
  });
}

std::optional<Tensor> shifts_of(const char* op, const Tensor& sources, const Tensor& targets, int64_t rows) {
  const int64_t copies = sources.size(0);
  if (copies == 0 || rows == 0) return std::nullopt;
  const Tensor from = torch::stable::contiguous(sources), to = torch::stable::contiguous(targets);
  Tensor shifts = empty_like_device(sources, {rows}, ScalarType::Long);
  const cudaStream_t stream = current_stream(sources);
  fill_zero(op, mutable_pointer<int64_t>(shifts), static_cast<size_t>(rows) * sizeof(int64_t), stream);
  launch(op, shifts_kernel, dim3(blocks_for(copies, kThreads, INT32_MAX)), dim3(kThreads), 0, stream,
         pointer<int64_t>(from), pointer<int64_t>(to), copies, rows, mutable_pointer<int64_t>(shifts));
  return shifts;
}

CopyTables::CopyTables(const char* op, const Tensor& sources, const Tensor& targets, int64_t rows)
    : targets_(torch::stable::contiguous(targets)), tables_(empty_like_device(sources, {3, rows}, ScalarType::Long)) {
  const auto [sorted, order] = sorted_by_row(sources);
  order_ = order;
  if (rows == 0) return;
  const cudaStream_t stream = current_stream(sources);
  auto* const begin = mutable_pointer<int64_t>(tables_);
  fill_zero(op, begin, static_cast<size_t>(3 * rows) * sizeof(int64_t), stream);
  if (copies() == 0) return;
  launch(op, tables_kernel, dim3(blocks_for(copies(), kThreads, INT32_MAX)), dim3(kThreads), 0, stream,
         pointer<int64_t>(sorted), pointer<int64_t>(order_), pointer<int64_t>(targets_), copies(), rows, begin,
         begin + rows, begin + 2 * rows);
}

CopiesOfRows CopyTables::of_rows() const {
  const int64_t rows = tables_.size(1);
  const auto* begin = pointer<int64_t>(tables_);
  return {pointer<int64_t>(targets_), pointer<int64_t>(order_), begin, begin + rows, begin + 2 * rows};
}

void return_gradients(const char* op, const CopyTables& tables, const Tensor& grad, const std::optional<Tensor>& copied,
                      Tensor& out) {
  const int64_t rows = out.size(0), columns = out.size(1);
  if (rows == 0 || columns == 0) return;
  with_float_type(out.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const bool aligned = rows_are_wide(pointer<T>(grad), grad.stride(0), columns);
    launch(op, aligned ? return_gradients_kernel<T, true> : return_gradients_kernel<T, false>,
           dim3(blocks_for(rows, kThreads / kWarp, int64_t{kBlocksAProcessor} * multiprocessors(out))), dim3(kThreads),
           0, current_stream(out), pointer<T>(grad), grad.stride(0), pointer_or_null<float>(copied), tables.of_rows(),
           mutable_pointer<T>(out), rows, static_cast<int>(columns));
  });
}

Tensor token_prepend(Tensor hidden, Tensor source_rows, Tensor target_rows) {
  const char* const op = "token_prepend";
  check_tensor(op, "hidden", hidden, kNormRows, kFloats, 2);
  const DeviceGuard guard(hidden.get_device_index());
  check_copies(op, source_rows, target_rows, hidden, "hidden");
  hidden = dense_rows(hidden);
  const int64_t rows = hidden.size(0), item = static_cast<int64_t>(hidden.element_size());
  Tensor out = empty_like_device(hidden, {rows, hidden.size(1)}, hidden.scalar_type());
  const std::optional<Tensor> shifts = shifts_of(op, source_rows, target_rows, rows);
  const CopyRoute route{pointer<uint8_t>(hidden), hidden.stride(0) * item, pointer_or_null<int64_t>(shifts),
                        mutable_pointer<uint8_t>(out), hidden.size(1) * item};
  launch_row_copies(op, route, rows, route.row_bytes,
                    reinterpret_cast<uintptr_t>(route.rows) | static_cast<uint64_t>(route.stride), hidden);
  return out;
}

Tensor token_prepend_backward(Tensor grad, Tensor source_rows, Tensor target_rows) {
  const char* const op = "token_prepend_backward";
  check_tensor(op, "grad", grad, kNormRows, kFloats, 2);
  const DeviceGuard guard(grad.get_device_index());
  check_copies(op, source_rows, target_rows, grad, "grad");
  grad = dense_rows(grad);
  Tensor out = empty_like_device(grad, {grad.size(0), grad.size(1)}, grad.scalar_type());
  return_gradients(op, CopyTables(op, source_rows, target_rows, grad.size(0)), grad, std::nullopt, out);
  return out;
}

}  // namespace embedding_kernels::cuda

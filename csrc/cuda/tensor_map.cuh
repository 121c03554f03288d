// What the copy engine of Hopper must know of a tensor: made on the host, given to kernels by value as
// `const __grid_constant__ TensorMap`.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>
#else
#include "emulation.h"
#endif

namespace embedding_kernels {

// As the driver's CUtensorMap.
struct alignas(64) TensorMap {
  uint64_t words[16];
};

// A tensor and the box that one copy takes of it, the innermost dimension first, whose elements are dense.
struct TensorShape {
  enum Element { kByte, kHalf, kFloat } element;  // kHalf: any 16 bits
  int rank;
  uint64_t sizes[5];
  uint64_t strides[5];  // in bytes; multiples of 16; the first is not looked at
  uint32_t box[5];
  // In shared memory the 16-byte pieces of a row of 128 bytes are permuted by the row's number: piece p of row r lies
  // at p ^ (r % 8), counted from a multiple of 1024 bytes.
  bool swizzled;
};

#if defined(__CUDACC__)

// The driver's function, without a link to the driver: the library must load where there is none.
using TensorMapEncoder = decltype(&cuTensorMapEncodeTiled);
inline TensorMapEncoder tensor_map_encoder(const char* op) {
  static const auto found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
    return result == cudaDriverEntryPointSuccess ? reinterpret_cast<TensorMapEncoder>(function) : nullptr;
  }();
  if (found == nullptr) throw std::runtime_error(std::string(op) + ": the CUDA driver has no cuTensorMapEncodeTiled");
  return found;
}

// By a thread that has had the runtime work on the device, a launch or a filling: only then does the driver have a
// context for it. A thread of autograd may come without.
inline TensorMap tensor_map(const char* op, const void* data, const TensorShape& shape) {
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap));
  constexpr CUtensorMapDataType kTypes[] = {CU_TENSOR_MAP_DATA_TYPE_UINT8, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                                            CU_TENSOR_MAP_DATA_TYPE_FLOAT32};
  // of elements that are neighbours in each dimension of a box
  const uint32_t steps[5] = {1, 1, 1, 1, 1};
  TensorMap map;
  const CUresult result = tensor_map_encoder(op)(
      reinterpret_cast<CUtensorMap*>(&map), kTypes[shape.element], static_cast<uint32_t>(shape.rank),
      const_cast<void*>(data), reinterpret_cast<const cuuint64_t*>(shape.sizes),
      reinterpret_cast<const cuuint64_t*>(shape.strides + 1), shape.box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      shape.swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error(std::string(op) + ": the CUDA driver refuses a tensor map (CUresult " +
                             std::to_string(static_cast<int>(result)) + ")");
  }
  return map;
}

#else

inline TensorMap tensor_map(const char* op, const void* data, const TensorShape& shape) {
  TensorMap map;
  emulation::encode_tensor_map(op, map.words, data, shape.element == TensorShape::kByte ? 1 : 2 * shape.element,
                               shape.rank, shape.sizes, shape.strides, shape.box, shape.swizzled);
  return map;
}

#endif

// ---- rows of ragged sequences ----
//
// Two dimensions more before the rows put a sequence's end where the tensor ends, so that a box reads zeros past it and
// writes nothing there: rows are counted up to 2^30, and the sum of the coordinates' distances comes round at 2^64
// bytes. (Known from Triton's tools/ragged_tma.py, which relies on the same.) The other way would be to clear the rows
// of each last tile by hand.
constexpr int32_t kRaggedRows = 1 << 30;

// [heads, rows, dim], 16-bit values, boxes of one head's `box_rows` rows and 64 columns, swizzled.
inline TensorMap ragged_map(const char* op, const void* data, int64_t dim, int64_t heads, int64_t head_stride,
                            int64_t row_stride, uint32_t box_rows) {
  // what counts for nothing, and drivers need not like: the stride of one head or of one row, and (before CUDA 12.6) no
  // address where there are no rows
  if (heads == 1) head_stride = (dim + 7) / 8 * 8;
  if (row_stride % 8 != 0 || row_stride == 0) row_stride = row_stride / 8 * 8 + 8;
  const void* const first = data != nullptr ? data : reinterpret_cast<const void*>(uintptr_t{1} << 20);
  const auto d = static_cast<uint64_t>(dim), h = static_cast<uint64_t>(heads);
  const uint64_t head_bytes = 2 * static_cast<uint64_t>(head_stride), row_bytes = 2 * static_cast<uint64_t>(row_stride);
  constexpr uint64_t kMost = 0x7fff0000;
  return tensor_map(op, first,
                    {TensorShape::kHalf,
                     5,
                     {d, h, kRaggedRows, kMost, kMost},
                     {2, head_bytes, row_bytes, row_bytes, (uint64_t{1} << 35) - row_bytes},
                     {64, 1, box_rows, 1, 1},
                     true});
}

// Coordinates of column `column` of row `row` of the rows [first, first + count).
__device__ inline void ragged_place(int32_t column, int32_t head, int32_t first, int32_t count, int32_t row,
                                    int32_t (&x)[5]) {
  x[0] = column;
  x[1] = head;
  x[2] = kRaggedRows - count + row;
  x[3] = first + count;
  x[4] = kRaggedRows;
}

}  // namespace embedding_kernels

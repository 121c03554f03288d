// Whole rows of any type from one place to another, a warp a row.
#pragma once

#include "launch.cuh"
#include "ptx.cuh"

namespace embedding_kernels::cuda {

// What is to be done with one item: nothing where `to` is null, zeros where `from` is.
struct RowCopy {
  const uint8_t* from;
  uint8_t* to;
};

template <class Unit>
__device__ inline Unit load_unit(const Unit* from) {
  return *from;
}
template <>
__device__ inline ptx::Words4 load_unit(const ptx::Words4* from) {
  return ptx::load_words4(from);
}
template <class Unit>
__device__ inline void store_unit(Unit* to, const Unit& unit) {
  *to = unit;
}
template <>
__device__ inline void store_unit(ptx::Words4* to, const ptx::Words4& unit) {
  ptx::store_words4(to, unit);
}

template <class Unit>
__device__ inline void copy_row(const RowCopy& copy, int64_t units) {
  constexpr int kInFlight = 4;
  const auto* from = reinterpret_cast<const Unit*>(copy.from);
  auto* to = reinterpret_cast<Unit*>(copy.to);
  for (int64_t first = threadIdx.x % kWarp; first < units; first += kInFlight * kWarp) {
    Unit held[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t unit = first + i * kWarp;
      held[i] = from != nullptr && unit < units ? load_unit(from + unit) : Unit{};
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t unit = first + i * kWarp;
      if (unit < units) store_unit(to + unit, held[i]);
    }
  }
}

// `route(item)` gives the RowCopy of each item.
template <class Unit, class Route>
__global__ void copy_rows_kernel(Route route, int64_t items, int64_t units) {
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (blockDim.x / kWarp);
  for (int64_t item = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp; item < items;
       item += warps) {
    const RowCopy copy = route(item);
    if (copy.to != nullptr) copy_row<Unit>(copy, units);
  }
}

// `multiples`: what the alignment of all rows is to be seen from, a bitwise or of addresses and strides in bytes. `on`
// is a tensor of the device.
template <class Route>
void launch_row_copies(const char* op, const Route& route, int64_t items, int64_t row_bytes, uint64_t multiples,
                       const Tensor& on) {
  if (items == 0 || row_bytes == 0) return;
  constexpr int kThreads = 256, kBlocksAProcessor = 16;
  const auto start = [&](auto unit) {
    using Unit = decltype(unit);
    launch(op, copy_rows_kernel<Unit, Route>,
           dim3(blocks_for(items, kThreads / kWarp, int64_t{kBlocksAProcessor} * multiprocessors(on))), dim3(kThreads),
           0, current_stream(on), route, items, row_bytes / static_cast<int64_t>(sizeof(Unit)));
  };
  multiples |= static_cast<uint64_t>(row_bytes);
  if (multiples % 16 == 0) {
    start(ptx::Words4{});
  } else if (multiples % 4 == 0) {
    start(uint32_t{});
  } else if (multiples % 2 == 0) {
    start(uint16_t{});
  } else {
    start(uint8_t{});
  }
}

}  // namespace embedding_kernels::cuda

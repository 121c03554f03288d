// pack_padded and unpack_padded on CUDA, of the pooling family: copies of whole rows, of any type.
//
// A row is read and written once: 16,384 rows of 1024 bfloat16 values are 64 MiB, 14 us at an H200's 4.8 TB/s.
#include "../kernels.h"
#include "../padded_rows.h"
#include "../pooling_checks.h"
#include "row_copies.cuh"

namespace embedding_kernels::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;

// A mask of 1, 4 or 8 bytes an entry.
struct Mask {
  const uint8_t* data;
  int64_t batch, length, item;

  __device__ bool keeps(int64_t entry) const {
    if (item == 1) return data[entry] != 0;
    if (item == 4) return reinterpret_cast<const uint32_t*>(data)[entry] != 0;
    return reinterpret_cast<const uint64_t*>(data)[entry] != 0;
  }
};

struct PlacesShared {
  uint32_t of_warps[2][kWarps];
};

// places[entry]: how many entries of the same sequence are kept before it, -1 where it is not kept itself; counts: of
// each sequence. A block takes a sequence.
__global__ void __launch_bounds__(kThreads)
    places_kernel(Mask mask, int32_t* __restrict__ places, int32_t* __restrict__ counts) {
  auto& shared = shared_memory<PlacesShared>();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int32_t base = 0;
  int turn = 0;
  for (int64_t first = 0; first < mask.length; first += kThreads) {
    const int64_t s = first + threadIdx.x, entry = blockIdx.x * mask.length + s;
    const bool kept = s < mask.length && mask.keeps(entry);
    const uint32_t ballot = ptx::vote_ballot(kept);
    // two buffers, so that one barrier is enough
    auto& of_warps = shared.of_warps[turn++ % 2];
    if (lane == 0) of_warps[warp] = ptx::count_bits(ballot);
    ptx::sync_block();
    int32_t before = base + static_cast<int32_t>(ptx::count_bits(ballot & ((1u << lane) - 1)));
    for (int w = 0; w < kWarps; ++w) {
      before += w < warp ? static_cast<int32_t>(of_warps[w]) : 0;
      base += static_cast<int32_t>(of_warps[w]);
    }
    if (s < mask.length) places[entry] = kept ? before : -1;
  }
  if (threadIdx.x == 0) counts[blockIdx.x] = base;
}

struct StartsShared {
  int64_t sums[2][kThreads];
};

// starts [batch + 1]: kept entries of all sequences before; in the last place, of all. One block.
__global__ void __launch_bounds__(kThreads)
    starts_kernel(const int32_t* __restrict__ counts, int64_t batch, int64_t* __restrict__ starts) {
  auto& shared = shared_memory<StartsShared>();
  int64_t base = 0;
  for (int64_t first = 0; first < batch; first += kThreads) {
    const int64_t b = first + threadIdx.x;
    const int64_t count = b < batch ? counts[b] : 0;
    int64_t sum = count;
    int buffer = 0;
    // each thread's sum reaches back twice as far every time
    for (int reach = 1; reach < kThreads; reach *= 2, buffer ^= 1) {
      shared.sums[buffer][threadIdx.x] = sum;
      ptx::sync_block();
      if (static_cast<int>(threadIdx.x) >= reach) sum += shared.sums[buffer][threadIdx.x - reach];
    }
    shared.sums[buffer][threadIdx.x] = sum;
    ptx::sync_block();
    if (b < batch) starts[b] = base + sum - count;
    base += shared.sums[buffer][kThreads - 1];
    ptx::sync_block();
  }
  if (threadIdx.x == 0) starts[batch] = base;
}

// Where kept rows stand in the packed layout.
struct PackedPlaces {
  const int32_t* places;
  const int64_t* starts;
  int64_t batch, length;

  // -1 where the entry is not kept
  __device__ int64_t row(int64_t entry) const {
    const int32_t place = places[entry];
    return place < 0 ? -1 : starts[entry / length] + place;
  }
};

// Items are the entries of the mask and then the packed rows, which are zeros past the last that is kept.
struct PackRoute {
  PackedPlaces packed;
  const uint8_t* padded;
  int64_t batch_stride, row_stride, row_bytes, rows;
  uint8_t* out;

  __device__ RowCopy operator()(int64_t item) const {
    const int64_t entries = packed.batch * packed.length;
    if (item >= entries) {
      const int64_t row = packed.starts[packed.batch] + (item - entries);
      return {nullptr, row < rows ? out + row * row_bytes : nullptr};
    }
    const int64_t row = packed.row(item);
    if (row < 0 || row >= rows) return {nullptr, nullptr};
    return {padded + item / packed.length * batch_stride + item % packed.length * row_stride, out + row * row_bytes};
  }
};

struct UnpackRoute {
  PackedPlaces packed;
  const uint8_t* rows;
  int64_t row_stride, row_bytes, count;
  uint8_t* out;

  __device__ RowCopy operator()(int64_t entry) const {
    const int64_t row = packed.row(entry);
    return {row < 0 || row >= count ? nullptr : rows + row * row_stride, out + entry * row_bytes};
  }
};

// PackedPlaces and the memory behind it.
class CountedMask {
 public:
  // Refuses a `value` that is not the number of kept entries, where values are looked at.
  CountedMask(const char* op, const Tensor& given, const char* argument, int64_t value)
      : mask_(torch::stable::contiguous(given)),
        places_(empty_like_device(given, {given.size(0), given.size(1)}, ScalarType::Int)),
        counts_(empty_like_device(given, {given.size(0)}, ScalarType::Int)),
        starts_(empty_like_device(given, {given.size(0) + 1}, ScalarType::Long)) {
    const Mask mask{pointer<uint8_t>(mask_), mask_.size(0), mask_.size(1), static_cast<int64_t>(mask_.element_size())};
    const cudaStream_t stream = current_stream(mask_);
    if (mask.batch > 0) {
      launch(op, places_kernel, dim3(static_cast<unsigned>(mask.batch)), dim3(kThreads), sizeof(PlacesShared), stream,
             mask, mutable_pointer<int32_t>(places_), mutable_pointer<int32_t>(counts_));
    }
    launch(op, starts_kernel, dim3(1), dim3(kThreads), sizeof(StartsShared), stream, pointer<int32_t>(counts_),
           mask.batch, mutable_pointer<int64_t>(starts_));
    if (!values_are_checked()) return;
    int64_t kept = 0;
    copy_to_host(op, &kept, pointer<int64_t>(starts_) + mask.batch, sizeof(kept), stream);
    check_kept(op, argument, value, kept);
  }

  PackedPlaces packed() const {
    return {pointer<int32_t>(places_), pointer<int64_t>(starts_), mask_.size(0), mask_.size(1)};
  }

 private:
  Tensor mask_, places_, counts_, starts_;
};

Tensor empty_rows(const Tensor& like, const std::vector<int64_t>& sizes) {
  return torch::stable::empty(sizes, like.scalar_type(), std::nullopt, like.device());
}

}  // namespace

Tensor pack_padded(Tensor padded, Tensor mask, int64_t total_tokens) {
  const char* const op = "pack_padded";
  check_pack_padded(op, padded, mask, total_tokens);
  const DeviceGuard guard(padded.get_device_index());
  const CountedMask counted(op, mask, "total_tokens", total_tokens);
  padded = with_dense_rows(padded, 2);
  Tensor out = empty_rows(padded, sizes_of_rows({total_tokens}, padded, 2));
  if (out.numel() == 0) return out;
  const int64_t item = static_cast<int64_t>(padded.element_size());
  const PackRoute route{counted.packed(),
                        pointer<uint8_t>(padded),
                        padded.stride(0) * item,
                        padded.stride(1) * item,
                        row_bytes(padded, 2),
                        total_tokens,
                        mutable_pointer<uint8_t>(out)};
  launch_row_copies(op, route, mask.numel() + total_tokens, route.row_bytes,
                    reinterpret_cast<uintptr_t>(route.padded) | static_cast<uint64_t>(route.batch_stride) |
                        static_cast<uint64_t>(route.row_stride),
                    padded);
  return out;
}

Tensor unpack_padded(Tensor packed, Tensor mask) {
  const char* const op = "unpack_padded";
  check_unpack_padded(op, packed, mask);
  const DeviceGuard guard(packed.get_device_index());
  const CountedMask counted(op, mask, "packed.shape[0]", packed.size(0));
  packed = with_dense_rows(packed, 1);
  Tensor out = empty_rows(packed, sizes_of_rows({mask.size(0), mask.size(1)}, packed, 1));
  if (out.numel() == 0) return out;
  const UnpackRoute route{
      counted.packed(),     pointer<uint8_t>(packed), packed.stride(0) * static_cast<int64_t>(packed.element_size()),
      row_bytes(packed, 1), packed.size(0),           mutable_pointer<uint8_t>(out)};
  launch_row_copies(op, route, mask.numel(), route.row_bytes,
                    reinterpret_cast<uintptr_t>(route.rows) | static_cast<uint64_t>(route.row_stride), packed);
  return out;
}

}  // namespace embedding_kernels::cuda

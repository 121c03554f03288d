// How the pooling kernels share out packed rows.
//
// A sequence is cut into parts of at most 2^shift rows, and the columns into strips; a block takes a strip of a part,
// so that one long text is spread like many short ones. Parts are numbered without reading the offsets on the host:
// sequence s has the slots from offsets[s] >> shift, plus s, on, which are enough for it wherever it begins.
#pragma once

#include "../pooling_checks.h"
#include "chunks.cuh"
#include "launch.cuh"
#include "ptx.cuh"

namespace embedding_kernels::cuda {

constexpr int kPoolThreads = 256;
constexpr int kStripChunks = 16;                         // chunks of 16 bytes of a row in a strip
constexpr int kPoolLanes = kPoolThreads / kStripChunks;  // rows that a block takes at a time
constexpr int kLeastShift = 7, kMostParts = 256;         // rows of a part; parts of a sequence that has all rows

struct Part {
  int64_t sequence, place, count;  // the sequence; which of its `count` parts
  int64_t start, length;           // rows of the sequence
  int64_t first, last;             // rows of the part
};

struct Parts {
  const int32_t* offsets;
  int64_t sequences, total;
  int shift;

  __device__ int64_t start(int64_t sequence) const {
    const int64_t row = offsets[sequence];
    return row < 0 ? 0 : row > total ? total : row;
  }
  __device__ int64_t first_slot(int64_t sequence) const { return (start(sequence) >> shift) + sequence; }

  // Whatever the offsets are, the rows are inside [0, total] and no part comes twice.
  __device__ Part part(int64_t sequence, int64_t place) const {
    Part part{sequence, place, 1, start(sequence), 0, 0, 0};
    const int64_t end = start(sequence + 1);
    part.length = end > part.start ? end - part.start : 0;
    if (part.length > 0) part.count = ((part.length - 1) >> shift) + 1;
    part.first = part.start + (place << shift);
    part.last = part.first + (int64_t{1} << shift);
    if (part.last > part.start + part.length) part.last = part.start + part.length;
    return part;
  }

  // The last sequence whose first slot is not past `slot`; a warp looks at 32 at once. All its lanes take part.
  __device__ int64_t sequence_of(int64_t slot) const {
    int64_t low = 0, count = sequences;
    while (count > 1) {
      const int64_t step = (count + kWarp - 1) / kWarp, ahead = static_cast<int64_t>(threadIdx.x % kWarp) * step;
      const uint32_t reached = ptx::vote_ballot(ahead < count && first_slot(low + ahead) <= slot);
      const int64_t taken = ptx::highest_bit(reached | 1u) * step;
      low += taken;
      count = count - taken < step ? count - taken : step;
    }
    return low;
  }

  // Slots past those of the sequence, and before, have no part: `place` is then not below `count`, or negative.
  __device__ Part at_slot(int64_t slot) const {
    const int64_t sequence = sequence_of(slot);
    return part(sequence, slot - first_slot(sequence));
  }
};

inline Parts parts_of(const Tensor& offsets, int64_t total) {
  int shift = kLeastShift;
  while (total > (int64_t{kMostParts} << shift)) ++shift;
  return {pointer<int32_t>(offsets), offsets.size(0) - 1, total, shift};
}
inline int64_t slots_of(const Parts& parts) { return (parts.total >> parts.shift) + parts.sequences; }
// Whether there may be a sequence of several parts.
inline bool may_split(const Parts& parts) { return parts.total > int64_t{1} << parts.shift; }

template <class T>
inline unsigned strips_of(int64_t columns) {
  return blocks_for(columns, kStripChunks * kWide<T>, INT32_MAX);
}
inline dim3 blocks_of(int64_t items, unsigned strips) { return dim3(static_cast<unsigned>(items * strips)); }

// ---- weights of rows ----

struct RowWeights {
  const float* given;  // [total], or null
  bool by_position;    // 1, 2, 3, ... where none are given, else 1
  bool root;           // divide by the root of their sum
  bool sums;           // of rows; other modes have no weights

  __device__ float weight(int64_t row, int64_t start) const {
    return given != nullptr ? given[row] : by_position ? static_cast<float>(row - start + 1) : 1.0f;
  }
  // What the pooled rows are multiplied by: 0 without rows or weight. `sum` is that of given weights.
  __device__ float scale(double sum, int64_t length) const {
    if (!sums) return length > 0 ? 1.0f : 0.0f;
    const auto rows = static_cast<double>(length);
    const double total = given != nullptr ? sum : by_position ? rows * (rows + 1) / 2 : rows;
    if (total == 0) return 0;
    return static_cast<float>(1 / (root ? sqrt(total) : total));
  }
};

inline RowWeights weights_of(PoolingMode mode, const std::optional<Tensor>& weights) {
  return {pointer_or_null<float>(weights), mode == PoolingMode::weighted_mean, mode == PoolingMode::mean_sqrt_len,
          sums_rows(mode)};
}

// Larger of two values; NaN wins.
__device__ inline float larger(float a, float b) { return b > a || b != b ? b : a; }

// Type of a tensor that the kernel is not compiled for: a branch a value is cheap where there are few.
enum class Element : int { kFloat32, kBFloat16, kFloat16, kBits };

__device__ inline float load_element(const void* data, Element element, int64_t at) {
  if (element == Element::kFloat32) return static_cast<const float*>(data)[at];
  if (element == Element::kBFloat16) return widen(static_cast<const BFloat16*>(data)[at]);
  return widen(static_cast<const Float16*>(data)[at]);
}
__device__ inline void store_element(void* data, Element element, int64_t at, float value) {
  if (element == Element::kFloat32) {
    static_cast<float*>(data)[at] = value;
  } else if (element == Element::kBFloat16) {
    static_cast<BFloat16*>(data)[at] = round_to<BFloat16>(value);
  } else {
    static_cast<Float16*>(data)[at] = round_to<Float16>(value);
  }
}

inline Element element_of(ScalarType dtype) {
  return dtype == ScalarType::Float      ? Element::kFloat32
         : dtype == ScalarType::BFloat16 ? Element::kBFloat16
         : dtype == ScalarType::Half     ? Element::kFloat16
                                         : Element::kBits;
}

// ---- host: pooling.cu ----

// Checked arguments of a call, dense.
struct PoolingCall {
  const char* op;
  Tensor hidden, offsets;
  PoolingMode mode;
  int64_t m;
  std::optional<Tensor> weights;
  int64_t columns;  // leading ones
};

// Pools into `out`, contiguous vectors of floats, or of bits where it is uint8.
void pool(const PoolingCall& call, bool normalize, Tensor& out);

}  // namespace embedding_kernels::cuda

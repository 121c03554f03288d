// Splitting for the pooling family. Knows no torch and no threads: `parallel_for(count, task)` is given, and runs
// task(0)
// ... task(count - 1), each once. Each value is computed in the order of its rows, so results do not depend on threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../pooling_mode.h"
#include "pooling.h"

namespace embedding_kernels {

// Packed rows and how to pool them: sequence s holds rows offsets[s] to offsets[s + 1].
struct Pooling {
  const void* rows;
  int64_t stride;  // elements from row to row
  Dtype dtype;
  const int32_t* offsets;
  int64_t sequences;
  int64_t columns;  // leading columns that count (truncation)
  PoolingMode mode;
  int64_t m;             // vectors a sequence
  const float* weights;  // a row each, or null

  int64_t length(int64_t sequence) const { return offsets[sequence + 1] - offsets[sequence]; }
  const void* row(int64_t index) const {
    return static_cast<const uint8_t*>(rows) + index * stride * dtype_bytes(dtype);
  }
  bool sums() const { return sums_rows(mode); }
  bool position_weighted() const { return mode == PoolingMode::weighted_mean && weights == nullptr; }
};

constexpr int64_t kSerialElements = int64_t{1} << 15;  // less work than this is not worth a second thread
constexpr int64_t kRowOverhead = 4;                    // cost of an item beside its rows, in rows
constexpr int64_t kChunkColumns = 64;                  // columns of a long sequence are split in multiples of this

// 1, 2, 3, ... as far as the longest sequence, where the mode weights positions.
inline std::vector<float> position_weights(const Pooling& pooling) {
  int64_t longest = 0;
  if (pooling.position_weighted()) {
    for (int64_t s = 0; s < pooling.sequences; ++s) longest = std::max(longest, pooling.length(s));
  }
  std::vector<float> weights(longest);
  for (int64_t i = 0; i < longest; ++i) weights[i] = static_cast<float>(i + 1);
  return weights;
}

inline double weight_sum(const Pooling& pooling, int64_t sequence) {
  const double length = static_cast<double>(pooling.length(sequence));
  if (pooling.position_weighted()) return length * (length + 1) / 2;
  if (pooling.weights == nullptr) return length;
  double sum = 0;
  for (int64_t r = pooling.offsets[sequence]; r < pooling.offsets[sequence + 1]; ++r) sum += pooling.weights[r];
  return sum;
}

// What the sum over a sequence is multiplied by: 1 / sum(w), or 1 / sqrt(sum(w)); 0 where that is undefined.
inline float sum_scale(const Pooling& pooling, int64_t sequence) {
  if (!pooling.sums()) return 1.0f;
  const double sum = weight_sum(pooling, sequence);
  if (sum == 0) return 0.0f;
  return static_cast<float>(1.0 / (pooling.mode == PoolingMode::mean_sqrt_len ? std::sqrt(sum) : sum));
}

// (sequence, chunk of columns) items dealt out in runs of equal cost.
class Items {
 public:
  Items(const Pooling& pooling, int64_t threads) : pooling_(pooling) {
    const int64_t total = pooling.sequences == 0 ? 0 : pooling.offsets[pooling.sequences];
    const bool serial = threads == 1 || total * pooling.columns < kSerialElements;
    parts_ = serial ? 1 : threads;
    const int64_t wanted = serial ? 1 : (4 * threads + pooling.sequences - 1) / std::max<int64_t>(pooling.sequences, 1);
    chunks_ = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(pooling.columns / kChunkColumns, 1));
  }
  int64_t parts() const { return parts_; }
  int64_t chunks() const { return chunks_; }
  int64_t chunk_begin(int64_t chunk) const {
    return chunk == chunks_ ? pooling_.columns : pooling_.columns * chunk / chunks_ / 16 * 16;
  }
  // First item of a part; the parts' items follow each other.
  int64_t begin(int64_t part) const {
    const int64_t items = pooling_.sequences * chunks_;
    const int64_t target = cost_before(items) / parts_ * part;
    if (part == parts_) return items;
    int64_t low = 0, high = items;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (cost_before(middle) < target)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }

 private:
  int64_t cost_before(int64_t item) const {
    const int64_t s = item / chunks_, c = item % chunks_;
    const int64_t inside = c == 0 ? 0 : c * pooling_.length(s);
    return pooling_.offsets[s] * chunks_ + inside + item * kRowOverhead;
  }
  const Pooling& pooling_;
  int64_t parts_, chunks_;
};

// Columns [begin, end) of a sequence's vectors as float32, `out_stride` apart at `out`; sums not yet scaled.
inline void pool_columns(const PoolingLoops& loops, const Pooling& pooling, const float* positions, int64_t sequence,
                         int64_t begin, int64_t end, float* out, int64_t out_stride) {
  const int64_t first = pooling.offsets[sequence], length = pooling.length(sequence), columns = end - begin;
  const auto column = [&](int64_t row) {
    return static_cast<const uint8_t*>(pooling.row(row)) + begin * dtype_bytes(pooling.dtype);
  };
  if (pooling.mode == PoolingMode::first_m) {
    for (int64_t j = 0; j < pooling.m; ++j) {
      if (j < length) {
        loops.load[pooling.dtype](column(first + j), columns, out + j * out_stride);
      } else {
        std::fill_n(out + j * out_stride, columns, 0.0f);
      }
    }
  } else if (length == 0) {
    std::fill_n(out, columns, 0.0f);
  } else if (pooling.sums()) {
    const float* weights = pooling.position_weighted() ? positions
                           : pooling.weights           ? pooling.weights + first
                                                       : nullptr;
    loops.sum_rows[pooling.dtype](column(first), pooling.stride, length, weights, columns, out);
  } else if (pooling.mode == PoolingMode::max) {
    loops.max_rows[pooling.dtype](column(first), pooling.stride, length, columns, out);
  } else {
    const int64_t row = pooling.mode == PoolingMode::first ? first : first + length - 1;
    loops.load[pooling.dtype](column(row), columns, out);
  }
}

// Scales the sums in place; a vector whose weights sum to 0 becomes 0, whatever its rows hold.
inline void scale_sums(const PoolingLoops& loops, const Pooling& pooling, int64_t sequence, float* vector) {
  if (!pooling.sums()) return;
  const float scale = sum_scale(pooling, sequence);
  if (scale == 0.0f) {
    std::fill_n(vector, pooling.columns, 0.0f);
  } else {
    loops.store_scaled[kFloat32](vector, scale, pooling.columns, vector);
  }
}

inline float norm(const PoolingLoops& loops, const float* vector, int64_t columns) {
  return std::sqrt(loops.dot[kFloat32](vector, vector, columns));
}

// Calls finish(sequence, vectors) once for each sequence with its `m` pooled float32 vectors, `columns` apart; they
// live until it returns.
template <class ParallelFor, class Finish>
void segment_pool(const PoolingLoops& loops, const Pooling& pooling, int64_t threads, const ParallelFor& parallel_for,
                  const Finish& finish) {
  const Items items(pooling, threads);
  const std::vector<float> positions = position_weights(pooling);
  const int64_t size = pooling.m * pooling.columns;
  // a sequence worked on by several threads needs a place that they share
  std::vector<float> shared(items.chunks() > 1 ? pooling.sequences * size : 0);
  const auto finish_sequence = [&](int64_t sequence, float* vectors) {
    scale_sums(loops, pooling, sequence, vectors);
    finish(sequence, vectors);
  };
  parallel_for(items.parts(), [&](int64_t part) {
    std::vector<float> own(shared.empty() ? size : 0);
    for (int64_t item = items.begin(part); item < items.begin(part + 1); ++item) {
      const int64_t sequence = item / items.chunks(), chunk = item % items.chunks();
      const int64_t begin = items.chunk_begin(chunk), end = items.chunk_begin(chunk + 1);
      float* vectors = shared.empty() ? own.data() : shared.data() + sequence * size;
      pool_columns(loops, pooling, positions.data(), sequence, begin, end, vectors + begin, pooling.columns);
      if (shared.empty()) finish_sequence(sequence, vectors);
    }
  });
  if (shared.empty()) return;
  parallel_for(pooling.sequences,
               [&](int64_t sequence) { finish_sequence(sequence, shared.data() + sequence * size); });
}

// ---- gradient ----

struct PoolingGradient {
  float* sequences;  // [sequences, m, columns]: in, gradient of the output; consumed
  bool normalize;
  Dtype dtype;        // of `rows` below
  uint8_t* rows;      // [total, row_bytes]: out
  int64_t row_bytes;  // of a whole row; columns past pooling.columns become 0
  float* weights;     // [total]: out, or null
};

// Turns the gradient of one normalised vector into that of the vector itself.
inline void unnormalize_gradient(const PoolingLoops& loops, const float* vector, int64_t columns, float* grad) {
  const float length = norm(loops, vector, columns);
  if (!(length > kNormEps)) {
    loops.store_scaled[kFloat32](grad, 1.0f / kNormEps, columns, grad);
    return;
  }
  const float inverse = 1.0f / length;
  const float along = loops.dot[kFloat32](vector, grad, columns) * inverse * inverse;
  for (int64_t c = 0; c < columns; ++c) grad[c] = (grad[c] - along * vector[c]) * inverse;
}

// One row's gradient from its sequence's; the weight's gradient is returned where it is wanted.
inline void write_row(const PoolingLoops& loops, const Pooling& pooling, const PoolingGradient& out, int64_t row,
                      const float* grad, float scale) {
  uint8_t* to = out.rows + row * out.row_bytes;
  const int64_t bytes = pooling.columns * dtype_bytes(out.dtype);
  if (grad == nullptr) {
    std::memset(to, 0, out.row_bytes);
    return;
  }
  loops.store_scaled[out.dtype](grad, scale, pooling.columns, to);
  std::memset(to + bytes, 0, out.row_bytes - bytes);
}

// Rows [begin, end) of one sequence, for every mode but max.
inline void sequence_rows_backward(const PoolingLoops& loops, const Pooling& pooling, const PoolingGradient& out,
                                   int64_t sequence, int64_t begin, int64_t end, float scale, float weight_shift) {
  const int64_t first = pooling.offsets[sequence], length = pooling.length(sequence);
  const float* grad = out.sequences + sequence * pooling.m * pooling.columns;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t place = r - first;
    if (pooling.sums()) {
      const float weight = pooling.position_weighted() ? static_cast<float>(place + 1)
                           : pooling.weights           ? pooling.weights[r]
                                                       : 1.0f;
      if (pooling.weights == nullptr && !pooling.position_weighted() && r > begin) {
        // all rows of an unweighted mean are the same
        std::memcpy(out.rows + r * out.row_bytes, out.rows + (r - 1) * out.row_bytes, out.row_bytes);
      } else {
        write_row(loops, pooling, out, r, grad, scale * weight);
      }
      if (out.weights != nullptr) {
        out.weights[r] = scale == 0.0f
                             ? 0.0f
                             : loops.dot[pooling.dtype](pooling.row(r), grad, pooling.columns) * scale - weight_shift;
      }
    } else if (pooling.mode == PoolingMode::first_m) {
      write_row(loops, pooling, out, r, place < pooling.m ? grad + place * pooling.columns : nullptr, 1.0f);
    } else {
      const bool taken = place == (pooling.mode == PoolingMode::first ? 0 : length - 1);
      write_row(loops, pooling, out, r, taken ? grad : nullptr, 1.0f);
    }
  }
}

// The gradient of max goes to the first maximum of each column.
inline void max_backward(const PoolingLoops& loops, const Pooling& pooling, const PoolingGradient& out,
                         int64_t sequence, std::vector<int32_t>& places) {
  const int64_t first = pooling.offsets[sequence], length = pooling.length(sequence), size = dtype_bytes(out.dtype);
  if (length == 0) return;
  std::memset(out.rows + first * out.row_bytes, 0, length * out.row_bytes);
  loops.argmax_rows[pooling.dtype](pooling.row(first), pooling.stride, length, pooling.columns, places.data());
  // rounded to the dtype of the rows as one vector, then scattered
  std::vector<uint8_t> narrow(pooling.columns * size);
  loops.store_scaled[out.dtype](out.sequences + sequence * pooling.columns, 1.0f, pooling.columns, narrow.data());
  for (int64_t c = 0; c < pooling.columns; ++c) {
    std::memcpy(out.rows + (first + places[c]) * out.row_bytes + c * size, narrow.data() + c * size, size);
  }
}

// Gradients of the rows and, where out.weights is given, of the weights. `pooling.rows` is read only where the mode is
// max, the output was normalised, or weights learn.
template <class ParallelFor>
void segment_pool_backward(const PoolingLoops& loops, const Pooling& pooling, const PoolingGradient& out,
                           int64_t threads, const ParallelFor& parallel_for) {
  const int64_t size = pooling.m * pooling.columns;
  std::vector<float> weight_shifts(out.weights == nullptr ? 0 : pooling.sequences);
  if (out.normalize || out.weights != nullptr) {
    segment_pool(loops, pooling, threads, parallel_for, [&](int64_t sequence, const float* vectors) {
      float* grad = out.sequences + sequence * size;
      for (int64_t j = 0; out.normalize && j < pooling.m; ++j) {
        unnormalize_gradient(loops, vectors + j * pooling.columns, pooling.columns, grad + j * pooling.columns);
      }
      if (out.weights != nullptr) {
        const double sum = weight_sum(pooling, sequence);
        const double power = pooling.mode == PoolingMode::mean_sqrt_len ? 0.5 : 1.0;
        const double along = loops.dot[kFloat32](vectors, grad, pooling.columns);
        weight_shifts[sequence] = sum == 0 ? 0.0f : static_cast<float>(power * along / sum);
      }
    });
  }
  if (pooling.mode == PoolingMode::max) {
    const Items items(pooling, threads);
    const int64_t chunks = items.chunks();
    parallel_for(items.parts(), [&](int64_t part) {
      std::vector<int32_t> places(pooling.columns);
      const int64_t begin = (items.begin(part) + chunks - 1) / chunks;
      const int64_t end = (items.begin(part + 1) + chunks - 1) / chunks;
      for (int64_t s = begin; s < end; ++s) max_backward(loops, pooling, out, s, places);
    });
    return;
  }
  const int64_t total = pooling.sequences == 0 ? 0 : pooling.offsets[pooling.sequences];
  const int64_t parts = total * pooling.columns < kSerialElements ? 1 : threads;
  parallel_for(parts, [&](int64_t part) {
    int64_t row = total * part / parts;
    const int64_t last = total * (part + 1) / parts;
    int64_t s = std::upper_bound(pooling.offsets, pooling.offsets + pooling.sequences + 1, row) - pooling.offsets - 1;
    for (; row < last; ++s) {
      const int64_t end = std::min<int64_t>(last, pooling.offsets[s + 1]);
      if (row == end) continue;
      sequence_rows_backward(loops, pooling, out, s, row, end, sum_scale(pooling, s),
                             weight_shifts.empty() ? 0.0f : weight_shifts[s]);
      row = end;
    }
  });
}

}  // namespace embedding_kernels

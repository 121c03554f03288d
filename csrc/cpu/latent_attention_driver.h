// Splitting for the latent attention family. Knows no torch and no threads: `parallel_for(count, task)` is given, and
// runs task(0) ... task(count - 1), each once. Results do not depend on the threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "latent_attention.h"

namespace embedding_kernels {

// Runs row(r, scratch) for every row, in blocks of some 2^14 columns; scratch has room for `room` floats.
template <class ParallelFor, class Row>
void for_rows(int64_t rows, int64_t columns, int64_t room, const ParallelFor& parallel_for, const Row& row) {
  const int64_t block = std::max<int64_t>(1, (int64_t{1} << 14) / std::max<int64_t>(columns, 1));
  parallel_for((rows + block - 1) / block, [&](int64_t task) {
    std::vector<float> scratch(room);
    for (int64_t r = task * block; r < std::min(rows, (task + 1) * block); ++r) row(r, scratch.data());
  });
}

// Packed rows before the gated linear unit, and what pools them.
struct GatedPooling {
  const uint8_t* rows;  // [tokens, 2 columns]: values, then gates
  int64_t stride;       // bytes
  Dtype dtype;
  int64_t columns;
  const float* bias;       // [2 columns] or null
  const int32_t* offsets;  // [sequences + 1]
  int64_t sequences;
  const float* weights;  // [tokens] or null

  float weight(int64_t token) const { return weights == nullptr ? 1.0f : weights[token]; }

  GatedRow row(int64_t token, int64_t column) const {
    const uint8_t* const value = rows + token * stride + column * dtype_bytes(dtype);
    return {value, value + columns * dtype_bytes(dtype), bias == nullptr ? nullptr : bias + column,
            bias == nullptr ? nullptr : bias + columns + column};
  }
};

// Of each sequence 1 / sum of weights, or 0 where the sum is 0: then the mean is 0, whatever the rows hold.
inline std::vector<float> gated_scales(const GatedPooling& pooling) {
  std::vector<float> scales(pooling.sequences);
  for (int64_t s = 0; s < pooling.sequences; ++s) {
    double total = 0;
    for (int64_t t = pooling.offsets[s]; t < pooling.offsets[s + 1]; ++t) total += pooling.weight(t);
    scales[s] = total == 0 ? 0.0f : static_cast<float>(1.0 / total);
  }
  return scales;
}

// A strip of columns runs down the rows with its sums in the first cache.
constexpr int64_t kGatedStrip = 512;

inline int64_t gated_strips(const GatedPooling& pooling) { return (pooling.columns + kGatedStrip - 1) / kGatedStrip; }

// store(sequence, column, count, sums, scale) takes the strip [column, column + count) of a sequence's sum.
template <class ParallelFor, class Store>
void geglu_segment_pool(const LatentAttentionLoops& loops, const GatedPooling& pooling, const ParallelFor& parallel_for,
                        const Store& store) {
  const int64_t strips = gated_strips(pooling);
  const std::vector<float> scales = gated_scales(pooling);
  parallel_for(pooling.sequences * strips, [&](int64_t task) {
    const int64_t sequence = task / strips, column = task % strips * kGatedStrip;
    const int64_t count = std::min(kGatedStrip, pooling.columns - column);
    float sums[kGatedStrip] = {}, lost[kGatedStrip] = {};
    const int64_t end = scales[sequence] == 0 ? 0 : pooling.offsets[sequence + 1];
    for (int64_t t = pooling.offsets[sequence]; t < end; ++t) {
      loops.add_gated[pooling.dtype](pooling.row(t, column), pooling.weight(t), count, {sums, lost});
    }
    store(sequence, column, count, sums, scales[sequence]);
  });
}

struct GatedGradient {
  const float* scales;  // [sequences], of gated_scales
  const float* pooled;  // [sequences, columns]: gradient of the mean, times the scale
  uint8_t* rows;        // [tokens, 2 columns], dense, of the dtype of the rows
  float* bias;          // [2 columns] or null
  float* weights;       // [tokens] or null
};

// The gradient of the mean takes from each weight's own the weighted mean of them all.
inline void finish_weights(const GatedPooling& pooling, const float* scales, const std::vector<float>& products,
                           float* out) {
  const int64_t strips = gated_strips(pooling), tokens = pooling.offsets[pooling.sequences];
  for (int64_t s = 0; s < pooling.sequences; ++s) {
    const int64_t first = pooling.offsets[s], last = pooling.offsets[s + 1];
    std::vector<double> own(last - first);
    double mean = 0;
    for (int64_t t = first; t < last; ++t) {
      for (int64_t strip = 0; strip < strips; ++strip) own[t - first] += products[strip * tokens + t];
      mean += own[t - first] * pooling.weight(t);
    }
    mean *= scales[s];
    for (int64_t t = first; t < last; ++t) out[t] = static_cast<float>(own[t - first] - mean);
  }
}

template <class ParallelFor>
void geglu_segment_pool_backward(const LatentAttentionLoops& loops, const GatedPooling& pooling,
                                 const GatedGradient& out, const ParallelFor& parallel_for) {
  const int64_t strips = gated_strips(pooling), tokens = pooling.offsets[pooling.sequences];
  const int64_t row_bytes = 2 * pooling.columns * dtype_bytes(pooling.dtype);
  std::vector<float> products(out.weights == nullptr ? 0 : strips * tokens);
  parallel_for(strips, [&](int64_t strip) {
    const int64_t column = strip * kGatedStrip, count = std::min(kGatedStrip, pooling.columns - column);
    float sums[4][kGatedStrip] = {};
    const Compensated of_value = {sums[0], sums[1]}, of_gate = {sums[2], sums[3]};
    const bool biased = out.bias != nullptr;
    for (int64_t s = 0; s < pooling.sequences; ++s) {
      for (int64_t t = pooling.offsets[s]; t < pooling.offsets[s + 1]; ++t) {
        uint8_t* const value = out.rows + t * row_bytes + column * dtype_bytes(pooling.dtype);
        if (out.scales[s] == 0) {
          std::fill_n(value, count * dtype_bytes(pooling.dtype), uint8_t{0});
          std::fill_n(value + row_bytes / 2, count * dtype_bytes(pooling.dtype), uint8_t{0});
          continue;
        }
        const float product = loops.gated_backward[pooling.dtype](
            pooling.row(t, column), out.pooled + s * pooling.columns + column, pooling.weight(t), count, value,
            value + row_bytes / 2, biased ? &of_value : nullptr, biased ? &of_gate : nullptr);
        if (out.weights != nullptr) products[strip * tokens + t] = product;
      }
    }
    if (biased) {
      std::copy(sums[0], sums[0] + count, out.bias + column);
      std::copy(sums[2], sums[2] + count, out.bias + pooling.columns + column);
    }
  });
  if (out.weights != nullptr) finish_weights(pooling, out.scales, products, out.weights);
}

}  // namespace embedding_kernels

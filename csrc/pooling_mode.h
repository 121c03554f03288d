// How a sequence's rows become one vector, or m.
#pragma once

namespace embedding_kernels {

enum class PoolingMode { mean, weighted_mean, mean_sqrt_len, max, first, first_m, last };

constexpr bool sums_rows(PoolingMode mode) {
  return mode == PoolingMode::mean || mode == PoolingMode::weighted_mean || mode == PoolingMode::mean_sqrt_len;
}

constexpr float kNormEps = 1e-12f;  // smallest norm that is divided by (torch.nn.functional.normalize)

}  // namespace embedding_kernels

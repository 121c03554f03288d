// Inner loops of the norm family: one table a level of instruction set, filled by norm_loops.cpp. Arrays of function
// pointers are indexed by the Dtype of the rows.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace embedding_kernels {

// What all rows of a norm share. weight and bias are float32; bias may be null.
struct NormKind {
  int64_t dim;
  float eps;
  bool centred;  // layer norm, else RMS norm
  const float* weight;
  const float* bias;
};

struct NormLoops {
  // summed = x + residual, rounded (residual null: summed is not written, x is taken); normed is its norm. scratch has
  // room for dim floats.
  void (*forward[kDtypes])(const NormKind& kind, const void* x, const void* residual, void* normed, void* summed,
                           float* scratch);

  // From the gradient of normed and, where it is not null, of summed: grad_x, which is that of residual too;
  // grad_weight and grad_bias are added to, where they are not null. scratch has room for 2 dim floats.
  void (*backward[kDtypes])(const NormKind& kind, const void* grad, const void* grad_summed, const void* summed,
                            void* grad_x, float* grad_weight, float* grad_bias, float* scratch);

  // out[c] = in[c] as float32, plus `more`.
  void (*load[kDtypes])(const void* in, float more, int64_t dim, float* out);
};

extern const NormLoops norm_loops_portable;
extern const NormLoops norm_loops_avx2;
extern const NormLoops norm_loops_avx512;

const NormLoops& norm_loops();

}  // namespace embedding_kernels

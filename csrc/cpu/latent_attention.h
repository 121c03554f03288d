// Inner loops of the latent attention family: one table a level of instruction set, filled by
// latent_attention_loops.cpp. Arrays of function pointers are indexed by the Dtype of the rows.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace embedding_kernels {

// Columns of one row before the gated linear unit: value and gate of a dtype, float32 biases of both or null.
struct GatedRow {
  const void* value;
  const void* gate;
  const float* value_bias;
  const float* gate_bias;
};

// A sum of many terms and what its roundings have lost so far.
struct Compensated {
  float* sum;
  float* lost;
};

struct LatentAttentionLoops {
  // out = softmax of a row within `groups` groups of `size` columns. scratch has room for size floats, in whole
  // vectors.
  void (*softmax[kDtypes])(const void* scores, int64_t groups, int64_t size, float* scratch, void* out);

  // out = p (grad - sum of grad p), the sum within a group.
  void (*softmax_backward[kDtypes])(const void* grad, const void* probabilities, int64_t groups, int64_t size,
                                    void* out);

  // total[c] += weight * value[c] * gelu(gate[c]).
  void (*add_gated[kDtypes])(const GatedRow& row, float weight, int64_t columns, const Compensated& total);

  // From grad[c], the gradient of the weighted product over the weight: gradients of value and gate, which are also
  // added to the totals where those are not null. Returns the sum of grad[c] * value[c] * gelu(gate[c]).
  float (*gated_backward[kDtypes])(const GatedRow& row, const float* grad, float weight, int64_t columns,
                                   void* grad_value, void* grad_gate, const Compensated* value_total,
                                   const Compensated* gate_total);
};

extern const LatentAttentionLoops latent_attention_loops_portable;
extern const LatentAttentionLoops latent_attention_loops_avx2;
extern const LatentAttentionLoops latent_attention_loops_avx512;

const LatentAttentionLoops& latent_attention_loops();

}  // namespace embedding_kernels

// Which calls of varlen_attention and of its gradient go to the kernels for Hopper, and those kernels' host side.
#pragma once

#include <algorithm>

#include "attention_host.cuh"
#include "tensor_map.cuh"

namespace embedding_kernels::cuda {

// Tiles of 64 rows and more: long sequences, of as many rows as maps count (ops/cuda_table.py has the same). Any dims
// that the operator takes: they are padded to 64, 96, 128 or 256 columns, which the copy engine fills with zeros and
// clips.
inline bool goes_to_hopper(const AttentionCall& call) {
  const AttentionTensors& t = call.tensors;
  const int64_t least = long_for_hopper();
  const bool is_long = t.max_seqlen_q >= least && t.q.size(0) >= least / 2 * call.rule.sequences;
  return is_long && std::max(t.q.size(0), t.k.size(0)) <= kRaggedRows && is_hopper(t.q);
}

struct GradientLevels;  // in attention_backward.cuh

void attend_on_hopper(const AttentionCall& call, Tensor& out, Tensor& lse);

struct AttentionGradients {
  Tensor q, k, v;  // of q and k as float32 where they have to be turned back
};
// The gradients of rotated q and k and of v, as sum_gradients in attention_backward.cu.
void sum_gradients_on_hopper(const AttentionCall& call, const Tensor& q, const Tensor& k, const Tensor& v,
                             const Tensor& grad_out, const GradientLevels& of_rows, AttentionGradients& gradients);

}  // namespace embedding_kernels::cuda

// Table of contents: the schema of every operator, and which kernel serves which dispatch key. Compiled once for each
// library: into _cpu.so with the schemas, into _cuda.so (EMBEDDING_KERNELS_CUDA) with the CUDA kernels alone, and into
// the host emulation of those (tests/cuda_host), whose operators have a namespace of their own and take CPU tensors.
//
// Every argument is positional here, because torch differentiates no keyword-only one; sizes are SymInt, so that
// torch.compile does not recompile for each shape. <op>_forward is <op> without autograd.
#include <torch/csrc/stable/library.h>

#include "kernels.h"

#define EK_LIBRARY(name, m) STABLE_TORCH_LIBRARY(name, m)
#define EK_LIBRARY_IMPL(name, key, m) STABLE_TORCH_LIBRARY_IMPL(name, key, m)
#if defined(EMBEDDING_KERNELS_CUDA_HOST)
#define EK_LIBRARY_NAME embedding_kernels_cuda_host
#define EK_CUDA_KEY CPU
#else
#define EK_LIBRARY_NAME embedding_kernels
#define EK_CUDA_KEY CUDA
#endif

#if !defined(EMBEDDING_KERNELS_CUDA)

#define SEGMENT_POOL_SIGNATURE                                                                            \
  "(Tensor hidden, Tensor cu_seqlens, str mode, SymInt m=1, Tensor? weights=None, bool normalize=False, " \
  "SymInt? truncate_dim=None, ScalarType? out_dtype=None) -> Tensor"
#define PACK_PADDED_SIGNATURE "(Tensor padded, Tensor mask, SymInt total_tokens) -> Tensor"
#define UNPACK_PADDED_SIGNATURE "(Tensor packed, Tensor mask) -> Tensor"

#define VARLEN_ATTENTION_OPTIONS                                                                             \
  "float? scale=None, bool causal=False, SymInt window_left=-1, SymInt window_right=-1, float softcap=0.0, " \
  "Tensor? bias_table=None, Tensor? rope_cos=None, Tensor? rope_sin=None, Tensor? positions_q=None, "        \
  "Tensor? positions_k=None, Tensor? seqused_k=None"
#define VARLEN_ATTENTION_SIGNATURE                                                                        \
  "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt " \
  "max_seqlen_k, " VARLEN_ATTENTION_OPTIONS ") -> (Tensor, Tensor)"
#define MERGE_ATTENTION_SIGNATURE "(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)"

#define ANCHOR_ATTENTION_SIGNATURE "(Tensor views, Tensor queries, Tensor cu_passages) -> Tensor"
#define ANCHOR_SCORES_SIGNATURE "(Tensor views, Tensor anchors, Tensor cu_passages, bool per_view=False) -> Tensor"

#define GROUPED_SOFTMAX_SIGNATURE "(Tensor scores, SymInt groups) -> Tensor"
#define GEGLU_SEGMENT_POOL_SIGNATURE                                                                       \
  "(Tensor hidden, Tensor? bias, Tensor cu_seqlens, Tensor? weights=None, ScalarType? out_dtype=None) -> " \
  "Tensor"

#define ADD_RMS_NORM_SIGNATURE                                                                            \
  "(Tensor x, Tensor? residual, Tensor weight, float eps=1e-06, bool one_plus_weight=False) -> (Tensor, " \
  "Tensor)"
#define ADD_LAYER_NORM_SIGNATURE \
  "(Tensor x, Tensor? residual, Tensor weight, Tensor? bias=None, float eps=1e-05) -> (Tensor, Tensor)"
#define TOKEN_PREPEND_SIGNATURE "(Tensor hidden, Tensor source_rows, Tensor target_rows) -> Tensor"
#define TOKEN_PREPEND_RMS_NORM_SIGNATURE                                                                       \
  "(Tensor x, Tensor? residual, Tensor source_rows, Tensor target_rows, Tensor weight, float eps=1e-06, bool " \
  "one_plus_weight=False) -> (Tensor, Tensor)"

EK_LIBRARY(EK_LIBRARY_NAME, m) {
  // anchor scores
  m.def("anchor_attention" ANCHOR_ATTENTION_SIGNATURE);
  m.def("anchor_attention_forward" ANCHOR_ATTENTION_SIGNATURE);
  m.def("anchor_attention_backward(Tensor grad, Tensor views, Tensor queries, Tensor cu_passages) -> (Tensor, Tensor)");
  m.def("anchor_scores" ANCHOR_SCORES_SIGNATURE);
  m.def("anchor_scores_forward" ANCHOR_SCORES_SIGNATURE);
  m.def(
      "anchor_scores_backward(Tensor grad, Tensor views, Tensor anchors, Tensor cu_passages, bool per_view) -> "
      "(Tensor, Tensor)");
  m.def("anchor_topk(Tensor views, Tensor anchors, Tensor cu_passages, SymInt k) -> (Tensor, Tensor)");
  // attention
  m.def("varlen_attention" VARLEN_ATTENTION_SIGNATURE);
  m.def("varlen_attention_forward" VARLEN_ATTENTION_SIGNATURE);
  m.def(
      "varlen_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, Tensor q, Tensor k, "
      "Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt "
      "max_seqlen_k, " VARLEN_ATTENTION_OPTIONS ") -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("merge_attention" MERGE_ATTENTION_SIGNATURE);
  m.def("merge_attention_forward" MERGE_ATTENTION_SIGNATURE);
  m.def(
      "merge_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor out_a, Tensor lse_a, Tensor out_b, Tensor "
      "lse_b) -> (Tensor, Tensor, Tensor, Tensor)");
  // hamming
  m.def("pack_bits(Tensor x) -> Tensor");
  m.def("hamming_distance(Tensor queries, Tensor codes) -> Tensor");
  m.def(
      "hamming_topk(Tensor queries, Tensor codes, SymInt k, Tensor? allowed=None, Tensor? code_norms=None) -> "
      "(Tensor, Tensor)");
  m.def("hamming_range(Tensor queries, Tensor codes, SymInt radius, Tensor? allowed=None) -> (Tensor, Tensor, Tensor)");
  m.def(
      "rescore_topk(Tensor queries, Tensor candidates, Tensor vectors, SymInt k, Tensor? scale=None) -> (Tensor, "
      "Tensor)");
  // latent attention
  m.def("grouped_softmax" GROUPED_SOFTMAX_SIGNATURE);
  m.def("grouped_softmax_forward" GROUPED_SOFTMAX_SIGNATURE);
  m.def("grouped_softmax_backward(Tensor grad, Tensor probabilities, SymInt groups) -> Tensor");
  m.def("geglu_segment_pool" GEGLU_SEGMENT_POOL_SIGNATURE);
  m.def("geglu_segment_pool_forward" GEGLU_SEGMENT_POOL_SIGNATURE);
  m.def(
      "geglu_segment_pool_backward(Tensor grad, Tensor hidden, Tensor? bias, Tensor cu_seqlens, Tensor? weights) -> "
      "(Tensor, Tensor, Tensor)");
  // norm
  m.def("add_rms_norm" ADD_RMS_NORM_SIGNATURE);
  m.def("add_rms_norm_forward" ADD_RMS_NORM_SIGNATURE);
  m.def(
      "add_rms_norm_backward(Tensor grad_normed, Tensor? grad_summed, Tensor summed, Tensor weight, float eps, bool "
      "one_plus_weight) -> (Tensor, Tensor)");
  m.def("add_layer_norm" ADD_LAYER_NORM_SIGNATURE);
  m.def("add_layer_norm_forward" ADD_LAYER_NORM_SIGNATURE);
  m.def(
      "add_layer_norm_backward(Tensor grad_normed, Tensor? grad_summed, Tensor summed, Tensor weight, Tensor? bias, "
      "float eps) -> (Tensor, Tensor, Tensor)");
  m.def("token_prepend" TOKEN_PREPEND_SIGNATURE);
  m.def("token_prepend_forward" TOKEN_PREPEND_SIGNATURE);
  m.def("token_prepend_backward(Tensor grad, Tensor source_rows, Tensor target_rows) -> Tensor");
  m.def("token_prepend_rms_norm" TOKEN_PREPEND_RMS_NORM_SIGNATURE);
  m.def("token_prepend_rms_norm_forward" TOKEN_PREPEND_RMS_NORM_SIGNATURE);
  m.def(
      "token_prepend_rms_norm_backward(Tensor grad_normed, Tensor? grad_summed, Tensor summed, Tensor source_rows, "
      "Tensor target_rows, Tensor weight, float eps, bool one_plus_weight) -> (Tensor, Tensor)");
  // paragraph vectors
  m.def(
      "paragraph_vector_step(Tensor(a!) documents, Tensor(b!) document_squares, Tensor(c!) words, Tensor(d!) bias, "
      "Tensor(e!) word_squares, Tensor rows, Tensor tokens, Tensor cu_seqlens, Tensor negatives, Tensor log_expected, "
      "float learning_rate, bool binary=True, bool update_words=True, Tensor(f!)? projection=None, "
      "Tensor(g!)? projection_squares=None, Tensor(h!)? context=None, Tensor(i!)? context_squares=None, "
      "SymInt window=0) -> Tensor");
  // pooling
  m.def("segment_pool" SEGMENT_POOL_SIGNATURE);
  m.def("segment_pool_forward" SEGMENT_POOL_SIGNATURE);
  m.def(
      "segment_pool_backward(Tensor grad, Tensor? hidden, Tensor cu_seqlens, SymInt total_tokens, SymInt dim, "
      "ScalarType dtype, str mode, SymInt m, Tensor? weights, bool normalize) -> (Tensor, Tensor)");
  m.def(
      "segment_pool_pack_bits(Tensor hidden, Tensor cu_seqlens, str mode, SymInt m=1, Tensor? weights=None, "
      "SymInt? truncate_dim=None) -> Tensor");
  m.def("pack_padded" PACK_PADDED_SIGNATURE);
  m.def("pack_padded_forward" PACK_PADDED_SIGNATURE);
  m.def("unpack_padded" UNPACK_PADDED_SIGNATURE);
  m.def("unpack_padded_forward" UNPACK_PADDED_SIGNATURE);
}

#if !defined(EMBEDDING_KERNELS_CUDA_HOST)

STABLE_TORCH_LIBRARY_IMPL(embedding_kernels, CPU, m) {
  using namespace embedding_kernels;
  m.impl("anchor_attention", TORCH_BOX(&cpu::anchor_attention));
  m.impl("anchor_attention_forward", TORCH_BOX(&cpu::anchor_attention));
  m.impl("anchor_attention_backward", TORCH_BOX(&cpu::anchor_attention_backward));
  m.impl("anchor_scores", TORCH_BOX(&cpu::anchor_scores));
  m.impl("anchor_scores_forward", TORCH_BOX(&cpu::anchor_scores));
  m.impl("anchor_scores_backward", TORCH_BOX(&cpu::anchor_scores_backward));
  m.impl("anchor_topk", TORCH_BOX(&cpu::anchor_topk));
  m.impl("varlen_attention", TORCH_BOX(&cpu::varlen_attention));
  m.impl("varlen_attention_forward", TORCH_BOX(&cpu::varlen_attention));
  m.impl("varlen_attention_backward", TORCH_BOX(&cpu::varlen_attention_backward));
  m.impl("merge_attention", TORCH_BOX(&cpu::merge_attention));
  m.impl("merge_attention_forward", TORCH_BOX(&cpu::merge_attention));
  m.impl("merge_attention_backward", TORCH_BOX(&cpu::merge_attention_backward));
  m.impl("pack_bits", TORCH_BOX(&cpu::pack_bits));
  m.impl("hamming_distance", TORCH_BOX(&cpu::hamming_distance));
  m.impl("hamming_topk", TORCH_BOX(&cpu::hamming_topk));
  m.impl("hamming_range", TORCH_BOX(&cpu::hamming_range));
  m.impl("rescore_topk", TORCH_BOX(&cpu::rescore_topk));
  m.impl("grouped_softmax", TORCH_BOX(&cpu::grouped_softmax));
  m.impl("grouped_softmax_forward", TORCH_BOX(&cpu::grouped_softmax));
  m.impl("grouped_softmax_backward", TORCH_BOX(&cpu::grouped_softmax_backward));
  m.impl("geglu_segment_pool", TORCH_BOX(&cpu::geglu_segment_pool));
  m.impl("geglu_segment_pool_forward", TORCH_BOX(&cpu::geglu_segment_pool));
  m.impl("geglu_segment_pool_backward", TORCH_BOX(&cpu::geglu_segment_pool_backward));
  m.impl("add_rms_norm", TORCH_BOX(&cpu::add_rms_norm));
  m.impl("add_rms_norm_forward", TORCH_BOX(&cpu::add_rms_norm));
  m.impl("add_rms_norm_backward", TORCH_BOX(&cpu::add_rms_norm_backward));
  m.impl("add_layer_norm", TORCH_BOX(&cpu::add_layer_norm));
  m.impl("add_layer_norm_forward", TORCH_BOX(&cpu::add_layer_norm));
  m.impl("add_layer_norm_backward", TORCH_BOX(&cpu::add_layer_norm_backward));
  m.impl("token_prepend", TORCH_BOX(&cpu::token_prepend));
  m.impl("token_prepend_forward", TORCH_BOX(&cpu::token_prepend));
  m.impl("token_prepend_backward", TORCH_BOX(&cpu::token_prepend_backward));
  m.impl("token_prepend_rms_norm", TORCH_BOX(&cpu::token_prepend_rms_norm));
  m.impl("token_prepend_rms_norm_forward", TORCH_BOX(&cpu::token_prepend_rms_norm));
  m.impl("token_prepend_rms_norm_backward", TORCH_BOX(&cpu::token_prepend_rms_norm_backward));
  m.impl("paragraph_vector_step", TORCH_BOX(&cpu::paragraph_vector_step));
  m.impl("segment_pool", TORCH_BOX(&cpu::segment_pool));
  m.impl("segment_pool_forward", TORCH_BOX(&cpu::segment_pool));
  m.impl("segment_pool_backward", TORCH_BOX(&cpu::segment_pool_backward));
  m.impl("segment_pool_pack_bits", TORCH_BOX(&cpu::segment_pool_pack_bits));
  m.impl("pack_padded", TORCH_BOX(&cpu::pack_padded));
  m.impl("pack_padded_forward", TORCH_BOX(&cpu::pack_padded));
  m.impl("unpack_padded", TORCH_BOX(&cpu::unpack_padded));
  m.impl("unpack_padded_forward", TORCH_BOX(&cpu::unpack_padded));
}

#endif
#endif

#if defined(EMBEDDING_KERNELS_CUDA) || defined(EMBEDDING_KERNELS_CUDA_HOST)

EK_LIBRARY_IMPL(EK_LIBRARY_NAME, EK_CUDA_KEY, m) {
  using namespace embedding_kernels;
  m.impl("anchor_attention", TORCH_BOX(&cuda::anchor_attention));
  m.impl("anchor_attention_forward", TORCH_BOX(&cuda::anchor_attention));
  m.impl("anchor_attention_backward", TORCH_BOX(&cuda::anchor_attention_backward));
  m.impl("anchor_scores", TORCH_BOX(&cuda::anchor_scores));
  m.impl("anchor_scores_forward", TORCH_BOX(&cuda::anchor_scores));
  m.impl("anchor_scores_backward", TORCH_BOX(&cuda::anchor_scores_backward));
  m.impl("anchor_topk", TORCH_BOX(&cuda::anchor_topk));
  m.impl("varlen_attention", TORCH_BOX(&cuda::varlen_attention));
  m.impl("varlen_attention_forward", TORCH_BOX(&cuda::varlen_attention));
  m.impl("varlen_attention_backward", TORCH_BOX(&cuda::varlen_attention_backward));
  m.impl("merge_attention", TORCH_BOX(&cuda::merge_attention));
  m.impl("merge_attention_forward", TORCH_BOX(&cuda::merge_attention));
  m.impl("merge_attention_backward", TORCH_BOX(&cuda::merge_attention_backward));
  m.impl("pack_bits", TORCH_BOX(&cuda::pack_bits));
  m.impl("hamming_distance", TORCH_BOX(&cuda::hamming_distance));
  m.impl("hamming_topk", TORCH_BOX(&cuda::hamming_topk));
  m.impl("hamming_range", TORCH_BOX(&cuda::hamming_range));
  m.impl("rescore_topk", TORCH_BOX(&cuda::rescore_topk));
  m.impl("grouped_softmax", TORCH_BOX(&cuda::grouped_softmax));
  m.impl("grouped_softmax_forward", TORCH_BOX(&cuda::grouped_softmax));
  m.impl("grouped_softmax_backward", TORCH_BOX(&cuda::grouped_softmax_backward));
  m.impl("geglu_segment_pool", TORCH_BOX(&cuda::geglu_segment_pool));
  m.impl("geglu_segment_pool_forward", TORCH_BOX(&cuda::geglu_segment_pool));
  m.impl("geglu_segment_pool_backward", TORCH_BOX(&cuda::geglu_segment_pool_backward));
  m.impl("add_rms_norm", TORCH_BOX(&cuda::add_rms_norm));
  m.impl("add_rms_norm_forward", TORCH_BOX(&cuda::add_rms_norm));
  m.impl("add_rms_norm_backward", TORCH_BOX(&cuda::add_rms_norm_backward));
  m.impl("add_layer_norm", TORCH_BOX(&cuda::add_layer_norm));
  m.impl("add_layer_norm_forward", TORCH_BOX(&cuda::add_layer_norm));
  m.impl("add_layer_norm_backward", TORCH_BOX(&cuda::add_layer_norm_backward));
  m.impl("token_prepend", TORCH_BOX(&cuda::token_prepend));
  m.impl("token_prepend_forward", TORCH_BOX(&cuda::token_prepend));
  m.impl("token_prepend_backward", TORCH_BOX(&cuda::token_prepend_backward));
  m.impl("token_prepend_rms_norm", TORCH_BOX(&cuda::token_prepend_rms_norm));
  m.impl("token_prepend_rms_norm_forward", TORCH_BOX(&cuda::token_prepend_rms_norm));
  m.impl("token_prepend_rms_norm_backward", TORCH_BOX(&cuda::token_prepend_rms_norm_backward));
  m.impl("segment_pool", TORCH_BOX(&cuda::segment_pool));
  m.impl("segment_pool_forward", TORCH_BOX(&cuda::segment_pool));
  m.impl("segment_pool_backward", TORCH_BOX(&cuda::segment_pool_backward));
  m.impl("segment_pool_pack_bits", TORCH_BOX(&cuda::segment_pool_pack_bits));
  m.impl("pack_padded", TORCH_BOX(&cuda::pack_padded));
  m.impl("pack_padded_forward", TORCH_BOX(&cuda::pack_padded));
  m.impl("unpack_padded", TORCH_BOX(&cuda::unpack_padded));
  m.impl("unpack_padded_forward", TORCH_BOX(&cuda::unpack_padded));
}

#endif

// Declarations of the kernels that ops.cpp registers.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

namespace embedding_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace cpu {

Tensor anchor_attention(Tensor views, Tensor queries, Tensor cu_passages);
std::tuple<Tensor, Tensor> anchor_attention_backward(Tensor grad, Tensor views, Tensor queries, Tensor cu_passages);
Tensor anchor_scores(Tensor views, Tensor anchors, Tensor cu_passages, bool per_view);
std::tuple<Tensor, Tensor> anchor_scores_backward(Tensor grad, Tensor views, Tensor anchors, Tensor cu_passages,
                                                  bool per_view);
std::tuple<Tensor, Tensor> anchor_topk(Tensor views, Tensor anchors, Tensor cu_passages, int64_t k);

// The options of varlen_attention, in the order of its schema.
#define EK_ATTENTION_OPTIONS                                                                            \
  std::optional<double> scale, bool causal, int64_t window_left, int64_t window_right, double softcap,  \
      std::optional<Tensor> bias_table, std::optional<Tensor> rope_cos, std::optional<Tensor> rope_sin, \
      std::optional<Tensor> positions_q, std::optional<Tensor> positions_k, std::optional<Tensor> seqused_k

std::tuple<Tensor, Tensor> varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k,
                                            int64_t max_seqlen_q, int64_t max_seqlen_k, EK_ATTENTION_OPTIONS);
std::tuple<Tensor, Tensor, Tensor, Tensor> varlen_attention_backward(Tensor grad_out, std::optional<Tensor> grad_lse,
                                                                     Tensor out, Tensor lse, Tensor q, Tensor k,
                                                                     Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k,
                                                                     int64_t max_seqlen_q, int64_t max_seqlen_k,
                                                                     EK_ATTENTION_OPTIONS);
std::tuple<Tensor, Tensor> merge_attention(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b);
std::tuple<Tensor, Tensor, Tensor, Tensor> merge_attention_backward(Tensor grad_out, std::optional<Tensor> grad_lse,
                                                                    Tensor out_a, Tensor lse_a, Tensor out_b,
                                                                    Tensor lse_b);

Tensor pack_bits(Tensor x);
Tensor hamming_distance(Tensor queries, Tensor codes);
std::tuple<Tensor, Tensor> hamming_topk(Tensor queries, Tensor codes, int64_t k, std::optional<Tensor> allowed,
                                        std::optional<Tensor> code_norms);
std::tuple<Tensor, Tensor, Tensor> hamming_range(Tensor queries, Tensor codes, int64_t radius,
                                                 std::optional<Tensor> allowed);
std::tuple<Tensor, Tensor> rescore_topk(Tensor queries, Tensor candidates, Tensor vectors, int64_t k,
                                        std::optional<Tensor> scale);

Tensor grouped_softmax(Tensor scores, int64_t groups);
Tensor grouped_softmax_backward(Tensor grad, Tensor probabilities, int64_t groups);
Tensor geglu_segment_pool(Tensor hidden, std::optional<Tensor> bias, Tensor cu_seqlens, std::optional<Tensor> weights,
                          std::optional<ScalarType> out_dtype);
std::tuple<Tensor, Tensor, Tensor> geglu_segment_pool_backward(Tensor grad, Tensor hidden, std::optional<Tensor> bias,
                                                               Tensor cu_seqlens, std::optional<Tensor> weights);

std::tuple<Tensor, Tensor> add_rms_norm(Tensor x, std::optional<Tensor> residual, Tensor weight, double eps,
                                        bool one_plus_weight);
std::tuple<Tensor, Tensor> add_rms_norm_backward(Tensor grad_normed, std::optional<Tensor> grad_summed, Tensor summed,
                                                 Tensor weight, double eps, bool one_plus_weight);
std::tuple<Tensor, Tensor> add_layer_norm(Tensor x, std::optional<Tensor> residual, Tensor weight,
                                          std::optional<Tensor> bias, double eps);
std::tuple<Tensor, Tensor, Tensor> add_layer_norm_backward(Tensor grad_normed, std::optional<Tensor> grad_summed,
                                                           Tensor summed, Tensor weight, std::optional<Tensor> bias,
                                                           double eps);

Tensor token_prepend(Tensor hidden, Tensor source_rows, Tensor target_rows);
Tensor token_prepend_backward(Tensor grad, Tensor source_rows, Tensor target_rows);
std::tuple<Tensor, Tensor> token_prepend_rms_norm(Tensor x, std::optional<Tensor> residual, Tensor source_rows,
                                                  Tensor target_rows, Tensor weight, double eps, bool one_plus_weight);
std::tuple<Tensor, Tensor> token_prepend_rms_norm_backward(Tensor grad_normed, std::optional<Tensor> grad_summed,
                                                           Tensor summed, Tensor source_rows, Tensor target_rows,
                                                           Tensor weight, double eps, bool one_plus_weight);

Tensor paragraph_vector_step(Tensor documents, Tensor document_squares, Tensor words, Tensor bias, Tensor word_squares,
                             Tensor rows, Tensor tokens, Tensor cu_seqlens, Tensor negatives, Tensor log_expected,
                             double learning_rate, bool binary, bool update_words, std::optional<Tensor> projection,
                             std::optional<Tensor> projection_squares, std::optional<Tensor> context,
                             std::optional<Tensor> context_squares, int64_t window);

Tensor segment_pool(Tensor hidden, Tensor cu_seqlens, std::string mode, int64_t m, std::optional<Tensor> weights,
                    bool normalize, std::optional<int64_t> truncate_dim, std::optional<ScalarType> out_dtype);
std::tuple<Tensor, Tensor> segment_pool_backward(Tensor grad, std::optional<Tensor> hidden, Tensor cu_seqlens,
                                                 int64_t total_tokens, int64_t dim, ScalarType dtype, std::string mode,
                                                 int64_t m, std::optional<Tensor> weights, bool normalize);
Tensor segment_pool_pack_bits(Tensor hidden, Tensor cu_seqlens, std::string mode, int64_t m,
                              std::optional<Tensor> weights, std::optional<int64_t> truncate_dim);
Tensor pack_padded(Tensor padded, Tensor mask, int64_t total_tokens);
Tensor unpack_padded(Tensor packed, Tensor mask);

}  // namespace cpu

// The same operators on CUDA: where one has no kernel in C++, Triton serves it and nothing refers to its name.
namespace cuda {

decltype(cpu::anchor_attention) anchor_attention;
decltype(cpu::anchor_attention_backward) anchor_attention_backward;
decltype(cpu::anchor_scores) anchor_scores;
decltype(cpu::anchor_scores_backward) anchor_scores_backward;
decltype(cpu::anchor_topk) anchor_topk;
decltype(cpu::varlen_attention) varlen_attention;
decltype(cpu::varlen_attention_backward) varlen_attention_backward;
decltype(cpu::merge_attention) merge_attention;
decltype(cpu::merge_attention_backward) merge_attention_backward;
decltype(cpu::pack_bits) pack_bits;
decltype(cpu::hamming_distance) hamming_distance;
decltype(cpu::hamming_topk) hamming_topk;
decltype(cpu::hamming_range) hamming_range;
decltype(cpu::rescore_topk) rescore_topk;
decltype(cpu::grouped_softmax) grouped_softmax;
decltype(cpu::grouped_softmax_backward) grouped_softmax_backward;
decltype(cpu::geglu_segment_pool) geglu_segment_pool;
decltype(cpu::geglu_segment_pool_backward) geglu_segment_pool_backward;
decltype(cpu::add_rms_norm) add_rms_norm;
decltype(cpu::add_rms_norm_backward) add_rms_norm_backward;
decltype(cpu::add_layer_norm) add_layer_norm;
decltype(cpu::add_layer_norm_backward) add_layer_norm_backward;
decltype(cpu::token_prepend) token_prepend;
decltype(cpu::token_prepend_backward) token_prepend_backward;
decltype(cpu::token_prepend_rms_norm) token_prepend_rms_norm;
decltype(cpu::token_prepend_rms_norm_backward) token_prepend_rms_norm_backward;
decltype(cpu::segment_pool) segment_pool;
decltype(cpu::segment_pool_backward) segment_pool_backward;
decltype(cpu::segment_pool_pack_bits) segment_pool_pack_bits;
decltype(cpu::pack_padded) pack_padded;
decltype(cpu::unpack_padded) unpack_padded;

}  // namespace cuda

}  // namespace embedding_kernels

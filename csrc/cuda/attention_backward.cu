// varlen_attention_backward on CUDA: bfloat16 and float16, heads of 16 to 256 dimensions in steps of 8, padded as in
// the forward pass to 64, 128 or 256 columns. float32 is left to the Triton kernel.
//
// Two passes over the pairs, 7 products of [rows, 16 columns] for the 5 that one pass with atomics would need; a warp
// owns 16 rows, a block 64.
#include "../kernels.h"
#include "attention_backward.cuh"
#include "attention_hopper.cuh"
#include "row_lanes.cuh"

namespace embedding_kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr const char* kOp = "varlen_attention_backward";

// levels and shares as GradientLevels, `stride` from head to head.
template <class T>
__global__ void attention_shares_kernel(HeadRows<T> grad_out, HeadRows<T> out, const float* __restrict__ lse,
                                        const float* __restrict__ grad_lse, int64_t total, int64_t heads,
                                        int64_t stride, int lanes, float* __restrict__ levels,
                                        float* __restrict__ shares) {
  for_rows_with_sums(
      total * heads, lanes,
      [&](int64_t item, int lane) {
        const int64_t row = item / heads, head = item % heads;
        const T* const grad = grad_out.data + row * grad_out.row_stride + head * grad_out.head_stride;
        const T* const values = out.data + row * out.row_stride + head * out.head_stride;
        float sum = 0;
        for (int d = lane * kWide<T>; d < out.dim; d += lanes * kWide<T>) {
          float x[kWide<T>], y[kWide<T>];
          load(grad + d, x);
          load(values + d, y);
#pragma unroll
          for (int i = 0; i < kWide<T>; ++i) sum += x[i] * y[i];
        }
        return sum;
      },
      [&](int64_t item, float sum) {
        const int64_t row = item / heads, head = item % heads, from = head * total + row, to = head * stride + row;
        levels[to] = lse[from] * kLog2E;
        shares[to] = grad_lse == nullptr ? sum : sum - grad_lse[from];
      });
}

// sums [16, kSums] += left [16, 16] · the step's rows, from column `first` on.
template <class T, int D, int kSums>
__device__ inline void add_products(const uint32_t (&left)[4], uint32_t others, int first, int32_t dim, int lane,
                                    float (&sums)[kSums / 8][4]) {
#pragma unroll
  for (int step = 0; step < kSums / 16; ++step) {
    if (kSums < D ? first + 16 * step >= dim : !has_columns(step / 2, dim)) continue;
    uint32_t right[4];
    load_right<D>(others, first / 16 + step, lane, right);
    multiply<T>(sums[2 * step], left, right[0], right[1]);
    multiply<T>(sums[2 * step + 1], left, right[2], right[3]);
  }
}

// Writes the warp's rows of a gradient, [total, heads, dim], from column `first` on; rows that pair with none are 0.
template <class To, int kSums>
__device__ inline void store_rows(To* gradient, int32_t dim, int first, float scale, const OwnRows& own, int lane,
                                  const float (&sums)[kSums / 8][4]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = 8 * r + lane / 4;
    To* const to = gradient + ((static_cast<int64_t>(own.first) + row) * gridDim.y + blockIdx.y) * dim;
#pragma unroll
    for (int n = 0; n < kSums / 8; ++n) {
      const int column = first + 8 * n + lane % 4 * 2;
      if (row >= own.count || column >= dim) continue;
      const float low = row < own.known ? sums[n][2 * r] * scale : 0;
      const float high = row < own.known ? sums[n][2 * r + 1] * scale : 0;
      if constexpr (sizeof(To) == 2) {
        *reinterpret_cast<uint32_t*>(to + column) = pack_pair<To>(low, high);
      } else {
        to[column] = low;
        to[column + 1] = high;
      }
    }
  }
}

template <class T, class Shape>
__global__ void __launch_bounds__(kAttentionThreads) attention_gradient_kernel(const GradientArguments<T> a) {
  constexpr int D = Shape::D, kSums = Shape::kSums, kChunk = Shape::kChunk;
  auto& shared = shared_memory<GradientShared<T, Shape>>();
  const int lane = static_cast<int>(threadIdx.x) % kWarp, first = static_cast<int>(blockIdx.z) * kSums;
  // one head's table beside the tiles, where the block has one head
  const bool one_head = a.rule.table == nullptr || a.members == 1;
  const float* table = one_head ? stage_table(a.rule, query_head<Shape>(a, 0), shared.table) : nullptr;
  GradientRows<Shape> rows;
  Cursor now, ahead;
  begin_rows(a, shared, static_cast<int32_t>(a.last_first ? gridDim.x - 1 - blockIdx.x : blockIdx.x), rows, now, ahead);

  float of_first[kSums / 8][4] = {}, of_second[Shape::kOwnKeys ? kSums / 8 : 1][4] = {};
  for (int stage = 0; now.member < a.members; stage ^= 1) {
    ptx::wait_copies<0>();
    ptx::sync_block();  // the tile is here, and nobody reads the other one any more
    copy_others(a, shared, stage ^ 1, ahead);
    ptx::commit_copies();
    ptx::sync_warp();  // products want its lanes together
#pragma unroll 1
    for (int chunk = 0; chunk < Shape::kOthers / kChunk && now.member < a.members; ++chunk) {
      const int32_t row = now.row, member = now.member;
      const bool mine = now.segment == rows.segment && row < rows.own.walk_last && row + kChunk > rows.own.walk_first;
      advance<kChunk>(shared.walk, now);
      if (!mine) continue;  // the whole warp
      if (!one_head) {
        table =
            a.rule.table + query_head<Shape>(a, member) * (2 * static_cast<int64_t>(a.rule.reach) + 1) + a.rule.reach;
      }
      float weights[2][4], changes[2][4];
      pair_gradients(a, shared, stage, chunk, row, rows, table, weights, changes);
      uint32_t left[4];
      left_of<T>(changes[0], changes[1], left);
      const uint32_t offset = chunk * kChunk * D * 2;
      add_products<T, D, kSums>(left, ptx::shared_address(shared.others[stage][0]) + offset, first, a.own[0].dim, lane,
                                of_first);
      if constexpr (Shape::kOwnKeys) {
        left_of<T>(weights[0], weights[1], left);
        add_products<T, D, kSums>(left, ptx::shared_address(shared.others[stage][1]) + offset, first, a.own[1].dim,
                                  lane, of_second);
      }
    }
  }
  if (a.first_is_wide) {
    store_rows<float, kSums>(static_cast<float*>(a.first_gradient), a.own[0].dim, first, a.scale, rows.own, lane,
                             of_first);
  } else {
    store_rows<T, kSums>(static_cast<T*>(a.first_gradient), a.own[0].dim, first, a.scale, rows.own, lane, of_first);
  }
  if constexpr (Shape::kOwnKeys) {
    store_rows<T, kSums>(a.second_gradient, a.own[1].dim, first, 1, rows.own, lane, of_second);
  }
}

template <class T, int D, Pass pass>
void launch_columns(const GradientArguments<T>& a, int64_t heads, const Tensor& like) {
  using Shape = GradientShape<D, pass>;
  const int64_t rows = pass == Pass::keys ? a.rule.keys.total : a.rule.queries.total;
  const int64_t slots = rows / Shape::kOwn + a.rule.sequences;
  const dim3 grid(static_cast<unsigned>((slots + kAttentionWarps - 1) / kAttentionWarps), static_cast<unsigned>(heads),
                  D / Shape::kSums);
  launch(kOp, attention_gradient_kernel<T, Shape>, grid, dim3(kAttentionThreads), sizeof(GradientShared<T, Shape>),
         current_stream(like), a);
}
template <Pass pass, class T>
void launch_gradients(const GradientArguments<T>& a, int64_t heads, const Tensor& like) {
  const int32_t columns = std::max(a.own[0].dim, a.own[1].dim);
  if (columns <= 64) {
    launch_columns<T, 64, pass>(a, heads, like);
  } else if (columns <= 128) {
    launch_columns<T, 128, pass>(a, heads, like);
  } else {
    launch_columns<T, 256, pass>(a, heads, like);
  }
}

template <class T>
void sum_gradients(const AttentionCall& call, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& grad_out,
                   const GradientLevels& of_rows, AttentionGradients& gradients) {
  const bool wide = call.rotation.half > 0;
  const auto address = [&](Tensor& tensor) -> void* {
    return wide ? static_cast<void*>(mutable_pointer<float>(tensor)) : mutable_pointer<T>(tensor);
  };
  GradientArguments<T> a = {call.rule,
                            call.rule.after < call.rule.before,
                            {head_rows<T>(q), head_rows<T>(grad_out)},
                            {head_rows<T>(k), head_rows<T>(v)},
                            1,
                            of_rows,
                            static_cast<float>(call.scale),
                            address(gradients.q),
                            wide,
                            nullptr};
  launch_gradients<Pass::queries>(a, q.size(1), q);
  for (int factor = 0; factor < 2; ++factor) std::swap(a.own[factor], a.others[factor]);
  a.last_first = call.rule.before < call.rule.after;
  a.members = call.rule.group;
  a.first_gradient = address(gradients.k);
  a.second_gradient = mutable_pointer<T>(gradients.v);
  launch_gradients<Pass::keys>(a, k.size(1), q);
}

// `memory` [2, heads, stride] owns them; Hopper's copies want rows from multiples of 16 bytes on.
template <class T>
GradientLevels levels_of(const Tensor& grad_out, const Tensor& out, const Tensor& lse,
                         const std::optional<Tensor>& grad_lse, Tensor& memory) {
  const int64_t total = out.size(0), heads = out.size(1), stride = (total + 3) / 4 * 4;
  memory = empty_like_device(out, {2, heads, stride}, ScalarType::Float);
  float *const levels = mutable_pointer<float>(memory), *const shares = levels + heads * stride;
  const int lanes = lanes_for(out.size(2) / kWide<T>);
  launch(kOp, attention_shares_kernel<T>, dim3(blocks_for(total * heads * lanes, kThreads)), dim3(kThreads), 0,
         current_stream(out), head_rows<T>(grad_out), head_rows<T>(out), pointer<float>(lse),
         pointer_or_null<float>(grad_lse), total, heads, stride, lanes, levels, shares);
  return {levels, shares, stride};
}

Tensor empty_rows(const Tensor& like, ScalarType dtype) {
  return empty_like_device(like, {like.size(0), like.size(1), like.size(2)}, dtype);
}
void clear(Tensor& tensor) {
  if (tensor.numel() == 0) return;
  fill_zero(kOp, mutable_pointer<uint8_t>(tensor), static_cast<size_t>(tensor.numel() * tensor.element_size()),
            current_stream(tensor));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> varlen_attention_backward(Tensor grad_out, std::optional<Tensor> grad_lse,
                                                                     Tensor out, Tensor lse, Tensor q, Tensor k,
                                                                     Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k,
                                                                     int64_t max_seqlen_q, int64_t max_seqlen_k,
                                                                     EK_ATTENTION_OPTIONS) {
  const AttentionCall call(kOp,
                           {q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, bias_table, rope_cos,
                            rope_sin, positions_q, positions_k, seqused_k},
                           scale, causal, window_left, window_right, softcap);
  check_attention_gradients(kOp, grad_out, grad_lse, out, lse, q, v);
  const AttentionTensors& t = call.tensors;
  const ScalarType dtype = q.scalar_type();
  const bool turned = call.rotation.half > 0;
  AttentionGradients gradients = {empty_rows(q, turned ? ScalarType::Float : dtype),
                                  empty_rows(k, turned ? ScalarType::Float : dtype), empty_rows(v, dtype)};
  if (call.empty()) {
    gradients = {empty_rows(q, dtype), empty_rows(k, dtype), empty_rows(v, dtype)};
    for (Tensor* const gradient : {&gradients.q, &gradients.k, &gradients.v}) clear(*gradient);
    Tensor table = empty_like_device(q, {bias_table ? bias_table->size(0) : 0, bias_table ? bias_table->size(1) : 0},
                                     ScalarType::Float);
    clear(table);
    return {gradients.q, gradients.k, gradients.v, table};
  }
  grad_out = wide_rows(grad_out), out = wide_rows(out), lse = torch::stable::contiguous(lse);
  if (grad_lse) grad_lse = torch::stable::contiguous(*grad_lse);
  const Tensor rotated_q = rotated(kOp, call, t.q, call.rule.queries);
  const Tensor rotated_k = rotated(kOp, call, t.k, call.rule.keys);
  Tensor memory = lse, table = empty_like_device(q, {0, 0}, ScalarType::Float);
  GradientLevels of_rows{};
  with_half_type(dtype, [&]<class T>(T) {
    of_rows = levels_of<T>(grad_out, out, lse, grad_lse, memory);
    if constexpr (kForHopper) {
      if (goes_to_hopper(call)) {
        sum_gradients_on_hopper(call, rotated_q, rotated_k, t.v, grad_out, of_rows, gradients);
        return;
      }
    }
    sum_gradients<T>(call, rotated_q, rotated_k, t.v, grad_out, of_rows, gradients);
  });
  if (turned) {
    gradients.q = turned_back(kOp, call, gradients.q, call.rule.queries, dtype);
    gradients.k = turned_back(kOp, call, gradients.k, call.rule.keys, dtype);
  }
  if (bias_table) table = bias_gradient(kOp, call, rotated_q, rotated_k, t.v, grad_out, of_rows);
  return {gradients.q, gradients.k, gradients.v, table};
}

}  // namespace embedding_kernels::cuda

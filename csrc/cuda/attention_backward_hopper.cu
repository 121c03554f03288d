// varlen_attention_backward on Hopper: bfloat16 and float16, any head dims that the operator takes, padded to 64, 96,
// 128 or 256 columns. Two passes over the pairs, over rows of queries and over rows of keys; in each, one warp has
// tiles copied and two warpgroups of 64 own rows multiply them (of 256 columns: both the same rows, half of the columns
// each). Every sum has one owner, who adds in a fixed order: the same bits at any distribution of the items.
//
//                              queries                     keys
//   columns                    64    96    128   256       64    96    128   256
//   rows of the other side     128   128   128   64        64    64    64    64     in a tile
//   KiB of a stage             32    64    64    64        16    32    32    64
//   stages                     4     2     2     2         4     4     4     2
//   KiB of own rows            32    64    64    64        32    64    64    64
//   registers of sums          32    48    64    64        64    96    128   128
//   of scores and gains        128   128   128   64        64    64    64    64
//   of weights and changes     32    32    32    16        32    32    32    32
//
// A thread that multiplies has 232 registers, one that copies 40, and none is spilled. Of keys with 128 columns and
// more that holds since the gains are multiplied after the weights are formed, whose wait the other warpgroup covers.
//
// What bounds it, not measured. In the terms of attention_hopper.cu, a tile of a block takes
//
//   cycles of products         1536  2304  3072  2560      1024  1536  2048  3072
//   of exponentials            1024  1024  1024  512       512   512   512   512
//   of other instructions      980   1060  1140  970       840   900   980   1140   485 to 570, 420 to 570 a warp
//   of shared memory           1280  2050  2560  2820      900   1410  1790  3070
//   of the second cache        1370  2050  2730  2730      680   1020  1370  2730
//
// Of 128 columns that is 3584 cycles for 128 keys and 64 queries, 707 TFLOP/s of the five products that one pass with
// atomics would need (in TFLOP/s of all seven: the whole 989). What a warpgroup waits for is covered by the other one
// alone, so three quarters of that is expected, 540 TFLOP/s at 16k tokens without a mask, and 470 at 2k, where an item
// has 32 tiles of queries and about 3000 cycles at its ends. Of 64 columns, where three units are nearly equally busy,
// 380 and 330; of 256, where scores are formed twice and shared memory gives 430 at most, 320 and 290.
#include "attention_backward_hopper.cuh"
#include "attention_hopper.cuh"

namespace embedding_kernels::cuda {
namespace {

constexpr const char* kOp = "varlen_attention_backward";
constexpr int kThreads = (1 + kGradientGroups) * kWarpgroup;

// Lanes 4 i to 4 i + 3 hand each other words, so that lane j of them gets word j of each, in order.
__device__ inline void turn_words(uint32_t (&words)[4], int lane) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
    const bool upper = (lane & bit) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & bit) != 0) continue;
      const uint32_t got = ptx::shuffle_xor(upper ? words[i] : words[i + bit], static_cast<uint32_t>(bit));
      words[i] = upper ? got : words[i];
      words[i + bit] = upper ? words[i + bit] : got;
    }
  }
}

// Where a warp's sums go: rows of [total, heads, dim] from column `first` on.
struct GradientPlace {
  int64_t row_stride;  // in values
  int64_t start;       // of the warp's first row
  int32_t dim, first;
  int32_t count, known;  // rows that there are, and those that pair; the rest are 0
};

template <class T, int N>
__device__ inline void store_sums(T* gradient, const GradientPlace& place, float scale, int lane, float (&sums)[N][4]) {
  static_assert(N % 4 == 0 && sizeof(T) == 2);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = 8 * r + lane / 4;
    const float factor = row < place.known ? scale : 0;
    T* const to = gradient + place.start + row * place.row_stride;
#pragma unroll
    for (int n = 0; n < N; n += 4) {
      ptx::Words4 words;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float low = row < place.known ? sums[n + i][2 * r] * factor : 0;
        const float high = row < place.known ? sums[n + i][2 * r + 1] * factor : 0;
        words.word[i] = pack_pair<T>(low, high);
      }
      turn_words(words.word, lane);
      const int column = place.first + 8 * (n + lane % 4);
      if (row < place.count && column < place.dim) ptx::store_words4(to + column, words);
    }
  }
}
template <int N>
__device__ inline void store_sums(float* gradient, const GradientPlace& place, float scale, int lane,
                                  float (&sums)[N][4]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = 8 * r + lane / 4;
    float* const to = gradient + place.start + row * place.row_stride;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const int column = place.first + 8 * n + lane % 4 * 2;
      if (row >= place.count || column >= place.dim) continue;
      to[column] = row < place.known ? sums[n][2 * r] * scale : 0;
      to[column + 1] = row < place.known ? sums[n][2 * r + 1] * scale : 0;
    }
  }
}

// A thread's place. Taken anew for each tile and item, since nvcc would keep what follows from it in registers that the
// sums need.
struct Place {
  int group, warp, lane;
};
__device__ inline Place place_of_thread() {
  uint32_t thread = threadIdx.x;
  ptx::settle(thread);
  const int at = static_cast<int>(thread);
  return {at / kWarpgroup - 1, at % kWarpgroup / kWarp, at % kWarp};
}

template <class Shape>
__device__ inline HopperRows rows_of(const HopperGradientArguments& a, const GradientItem& item) {
  const AttentionSide& side = Shape::kOwnKeys ? a.rule.keys : a.rule.queries;
  const Place me = place_of_thread();
  const OwnRows& own = item.rows[me.group];
  HopperRows rows;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = 16 * me.warp + 8 * r + me.lane / 4;
    const bool there = row < own.count;
    const int64_t place = item.head * a.of_rows.stride + own.first + row;
    rows.at[r] = there ? position_of(side, own.start, own.first + row) : 0;
    rows.level[r] = !Shape::kOwnKeys && there ? a.of_rows.levels[place] : 0;
    rows.share[r] = !Shape::kOwnKeys && there ? a.of_rows.shares[place] : 0;
  }
  return rows;
}

// The rows that warpgroup `group` owns, of one factor; and the columns of the other side that it sums.
template <class Shape>
__device__ inline uint32_t own_tile(const HopperGradientShared<Shape>& shared, int factor, int group) {
  return ptx::shared_address(shared.own[factor]) + (Shape::kSplit ? 0 : group * panel_bytes(kGroupRows));
}
template <class Shape>
__device__ inline uint32_t columns_of_group(const HopperGradientShared<Shape>& shared, int stage, int factor,
                                            int group) {
  const int panel = Shape::kSplit ? group * Shape::kSums / kPanelValues : 0;
  return ptx::shared_address(shared.others[stage][factor]) + panel * panel_bytes(Shape::kOthers);
}

// Adds the tile in `stage`, which the warpgroup needs. The gains' products run while weights are formed (kAhead), else
// beside those of the weights, after them where both warpgroups have the same rows: then no register is left for
// weights that are read yet, gains and changes at once.
template <class T, class Shape>
__device__ inline void add_tile(const HopperGradientArguments& a, HopperGradientShared<Shape>& shared,
                                const GradientItem& item, int stage, const HopperRows& of_item,
                                float (&of_first)[Shape::kSums / 8][4],
                                float (&of_second)[Shape::kOwnKeys ? Shape::kSums / 8 : 1][4]) {
  constexpr int N = Shape::kOthers / 8;
  const Place me = place_of_thread();
  float scores[N][4], gains[N][4];
  uint32_t weights[Shape::kOthers / 16][4], changes[Shape::kOthers / 16][4];
  multiply_rows<T, Shape>(own_tile(shared, 0, me.group), ptx::shared_address(shared.others[stage][0]), scores);
  if constexpr (Shape::kAhead) {
    multiply_rows<T, Shape>(own_tile(shared, 1, me.group), ptx::shared_address(shared.others[stage][1]), gains);
  }
  // rows of keys have but a position, which is got again rather than kept
  const HopperRows rows = Shape::kOwnKeys ? rows_of<Shape>(a, item) : of_item;
  const HopperTile tile = tile_at(a, shared, item, stage, me.lane);
  const bool all =
      !a.rule.formed && all_pair<Shape::kOthers>(item.rows[me.group], tile.window, has_positions<Shape>(a.rule),
                                                 tile.coordinate, tile.valid);
  ptx::wait_products<Shape::kAhead ? 1 : 0>();
  ptx::settle(scores);
  if (a.rule.formed) {
    weigh<T, Shape, true, true>(a.rule, tile, rows, scores, weights);
  } else if (all) {
    weigh<T, Shape, false, false>(a.rule, tile, rows, scores, weights);
  } else {
    weigh<T, Shape, true, false>(a.rule, tile, rows, scores, weights);
  }
  const Place still = place_of_thread();
  const auto multiply_gains = [&] {
    multiply_rows<T, Shape>(own_tile(shared, 1, still.group), ptx::shared_address(shared.others[stage][1]), gains);
  };
  if constexpr (!Shape::kAhead && !Shape::kSplit) multiply_gains();
  if constexpr (Shape::kOwnKeys) {
    add_products<T, Shape>(weights, columns_of_group(shared, stage, 1, still.group), of_second);
  }
  if constexpr (!Shape::kAhead && Shape::kSplit) multiply_gains();
  ptx::wait_products<Shape::kOwnKeys && !Shape::kSplit ? 1 : 0>();
  ptx::settle(gains);
  if (is_last(a, item, shared.tiles[stage], still.group)) {
    give_free(shared.ring, place_of_item<Shape>(0), still.lane);
  }
  // tiles have multiples of four rows
  const float* const shares = shared.shares[stage] + rows_before(item.walk_first) + still.lane % 4 * 2;
  if (all) {
    change<T, Shape, false>(shares, rows, scores, gains, changes);
  } else {
    change<T, Shape, true>(shares, rows, scores, gains, changes);
  }
  add_products<T, Shape>(changes, columns_of_group(shared, stage, 0, still.group), of_first);
  ptx::wait_products<0>();
  ptx::settle(of_first);
  if constexpr (Shape::kOwnKeys) ptx::settle(of_second);
}

// Writes the warp's rows of the gradients.
template <class T, class Shape>
__device__ inline void store_gradients(const HopperGradientArguments& a, const GradientItem& item,
                                       float (&of_first)[Shape::kSums / 8][4],
                                       float (&of_second)[Shape::kOwnKeys ? Shape::kSums / 8 : 1][4]) {
  const Place me = place_of_thread();
  const OwnRows& own = item.rows[me.group];
  const int64_t heads = a.items.heads, row = own.first + 16 * me.warp;
  const auto place = [&](int factor) {
    const int32_t dim = a.dims[factor];
    return GradientPlace{heads * dim,
                         (row * heads + item.head) * dim,
                         dim,
                         Shape::kSplit ? me.group * Shape::kSums : 0,
                         own.count - 16 * me.warp,
                         own.known - 16 * me.warp};
  };
  if (a.first_is_wide) {
    store_sums(static_cast<float*>(a.first_gradient), place(0), a.scale, me.lane, of_first);
  } else {
    store_sums(static_cast<T*>(a.first_gradient), place(0), a.scale, me.lane, of_first);
  }
  if constexpr (Shape::kOwnKeys) {
    store_sums(static_cast<T*>(a.second_gradient), place(1), 1, me.lane, of_second);
  }
}

// Where a thread stands in both rings: in the lower half of one register the stage's step, in the upper the item.
template <class Shape>
struct Progress {
  uint32_t at = 0;
  __device__ RingPlace<Shape::kPlaces> stage() const { return place_of_step<Shape>(at & 0xffff); }
  __device__ RingPlace<Shape::kPlaces> own() const { return place_of_item<Shape>(at >> 16); }
  __device__ const GradientItem& item(const HopperGradientShared<Shape>& shared) const {
    return shared.items[(at >> 16) % 2];
  }
  __device__ void to_next_stage() {
    at = (at & 0xffff0000) | ((at + 1) & 0xffff);
    ptx::settle(at);
  }
  __device__ void to_next_item() {
    at += 0x10000;
    ptx::settle(at);
  }
};

// A warpgroup's part of all items that the block draws.
template <class T, class Shape>
__device__ inline void sum_items(const HopperGradientArguments& a, HopperGradientShared<Shape>& shared) {
  for (Progress<Shape> progress;; progress.to_next_item()) {
    wait_full(shared.ring, progress.own());
    if (progress.item(shared).head < 0) return;
    const HopperRows rows = Shape::kOwnKeys ? HopperRows{} : rows_of<Shape>(a, progress.item(shared));
    float of_first[Shape::kSums / 8][4] = {}, of_second[Shape::kOwnKeys ? Shape::kSums / 8 : 1][4] = {};
    if (needs_none(progress.item(shared), place_of_thread().group)) {
      give_free(shared.ring, progress.own(), place_of_thread().lane);
    }
#pragma unroll 1
    for (bool more = progress.item(shared).tiles > 0; more; progress.to_next_stage()) {
      const RingPlace<Shape::kPlaces> place = progress.stage();
      const GradientTile& tile = shared.tiles[place.stage];
      wait_full(shared.ring, place);
      if (needs(progress.item(shared), tile, place_of_thread().group)) {
        add_tile<T, Shape>(a, shared, progress.item(shared), place.stage, rows, of_first, of_second);
      }
      more = !tile.last;
      ptx::sync_warp();  // the other lanes have read what lies beside the tile
      give_free(shared.ring, place, place_of_thread().lane);
    }
    store_gradients<T, Shape>(a, progress.item(shared), of_first, of_second);
    ptx::sync_warp();  // before any of its lanes frees the next item's rows
  }
}

template <class T, class Shape>
__global__ void __launch_bounds__(kThreads, 1)
    attention_gradient_hopper_kernel(const __grid_constant__ HopperGradientArguments a) {
  auto& shared = shared_memory<HopperGradientShared<Shape>>();
  constexpr uint32_t kReaders = kGradientGroups * kGroupWarps;
  if (threadIdx.x == 0) {
    begin_ring(shared.ring, kReaders);
    ptx::publish_barriers();
  }
  ptx::sync_block();
  if (threadIdx.x < kWarpgroup) {
    ptx::keep_registers<40>();
    if (threadIdx.x < kWarp) produce(a, shared);
  } else {
    ptx::take_registers<232>();
    sum_items<T>(a, shared);
  }
}

// Rows of queries as the copy engine takes them beside a tile: lse, then shares, of all heads.
TensorMap map_of_levels(const GradientLevels& of_rows, int64_t total, int64_t heads, uint32_t box_rows) {
  return tensor_map(kOp, of_rows.levels,
                    {TensorShape::kFloat,
                     2,
                     {static_cast<uint64_t>(total), static_cast<uint64_t>(2 * heads)},
                     {4, 4 * static_cast<uint64_t>(of_rows.stride)},
                     {box_rows, 1},
                     false});
}
// The copy engine moves the bits of positions as they are.
TensorMap map_of_positions(const int32_t* positions, int64_t total, uint32_t box_rows) {
  const auto rows = static_cast<uint64_t>(total);
  return tensor_map(kOp, positions,
                    {TensorShape::kFloat, 2, {rows, 1}, {4, (rows + 3) / 4 * 16}, {box_rows, 1}, false});
}

struct GradientTensors {
  Tensor own[2], others[2];
  std::optional<Tensor> positions;  // of the other side, from a multiple of 16 bytes on
};

template <class T, int D, Pass pass>
void launch_columns(const AttentionCall& call, const GradientTensors& tensors, HopperGradientArguments a) {
  using Shape = HopperGradientShape<D, pass>;
  const auto map = [](const Tensor& rows, int box_rows) {
    return ragged_map(kOp, pointer<T>(rows), rows.size(2), rows.size(1), rows.stride(1), rows.stride(0),
                      static_cast<uint32_t>(box_rows));
  };
  for (int factor = 0; factor < 2; ++factor) {
    a.own[factor] = map(tensors.own[factor], Shape::kOwn);
    a.others[factor] = map(tensors.others[factor], Shape::kOthers);
    a.dims[factor] = static_cast<int32_t>(tensors.own[factor].size(2));
  }
  if (Shape::kOwnKeys) a.levels = map_of_levels(a.of_rows, call.rule.queries.total, a.heads, Shape::kBeside);
  if (tensors.positions) {
    a.positions = map_of_positions(pointer<int32_t>(*tensors.positions), tensors.positions->size(0), Shape::kBeside);
  }
  const Tensor& own = tensors.own[0];
  a.items.slots = static_cast<int32_t>(own.size(0) / Shape::kOwn) + call.rule.sequences;
  a.items.heads = static_cast<int32_t>(own.size(1));
  const int64_t items = int64_t{a.items.slots} * a.items.heads;
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(items, multiprocessors(own))));
  launch(kOp, attention_gradient_hopper_kernel<T, Shape>, grid, dim3(kThreads), sizeof(HopperGradientShared<Shape>),
         current_stream(own), a);
}

template <Pass pass, class T>
void launch_gradients(const AttentionCall& call, const GradientTensors& tensors, const HopperGradientArguments& a) {
  const int64_t columns = std::max(tensors.own[0].size(2), tensors.own[1].size(2));
  if (columns <= 64) {
    launch_columns<T, 64, pass>(call, tensors, a);
  } else if (columns <= 96) {
    launch_columns<T, 96, pass>(call, tensors, a);
  } else if (columns <= 128) {
    launch_columns<T, 128, pass>(call, tensors, a);
  } else {
    launch_columns<T, 256, pass>(call, tensors, a);
  }
}

std::optional<Tensor> aligned(const std::optional<Tensor>& positions) {
  if (!positions || reinterpret_cast<uintptr_t>(positions->const_data_ptr()) % 16 == 0) return positions;
  return torch::stable::clone(*positions);
}

template <class T>
void sum_gradients(const AttentionCall& call, const GradientTensors& of_queries, const GradientTensors& of_keys,
                   const GradientLevels& of_rows, AttentionGradients& gradients) {
  const Tensor& q = of_queries.own[0];
  const bool wide = call.rotation.half > 0;
  const auto address = [&](Tensor& tensor) -> void* {
    return wide ? static_cast<void*>(mutable_pointer<float>(tensor)) : mutable_pointer<T>(tensor);
  };
  Tensor counters = empty_like_device(q, {2}, ScalarType::Int);
  fill_zero(kOp, mutable_pointer<int32_t>(counters), 2 * sizeof(int32_t), current_stream(q));
  auto* const counter = reinterpret_cast<uint32_t*>(mutable_pointer<int32_t>(counters));
  HopperGradientArguments a{};
  a.rule = call.rule;
  a.of_rows = of_rows;
  a.heads = static_cast<int32_t>(q.size(1));
  a.scale = static_cast<float>(call.scale);
  a.first_is_wide = wide;
  a.members = 1;
  a.items = {counter, 0, 0, call.rule.after < call.rule.before};
  a.first_gradient = address(gradients.q);
  launch_gradients<Pass::queries, T>(call, of_queries, a);
  a.members = call.rule.group;
  a.items = {counter + 1, 0, 0, call.rule.before < call.rule.after};
  a.first_gradient = address(gradients.k);
  a.second_gradient = mutable_pointer<T>(gradients.v);
  launch_gradients<Pass::keys, T>(call, of_keys, a);
}

}  // namespace

void sum_gradients_on_hopper(const AttentionCall& call, const Tensor& q, const Tensor& k, const Tensor& v,
                             const Tensor& grad_out, const GradientLevels& of_rows, AttentionGradients& gradients) {
  const GradientTensors of_queries = {{q, grad_out}, {k, v}, aligned(call.tensors.positions_k)};
  const GradientTensors of_keys = {{k, v}, {q, grad_out}, aligned(call.tensors.positions_q)};
  with_half_type(q.scalar_type(), [&]<class T>(T) { sum_gradients<T>(call, of_queries, of_keys, of_rows, gradients); });
}

}  // namespace embedding_kernels::cuda

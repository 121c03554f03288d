// varlen_attention on Hopper: bfloat16 and float16, any head dims that the operator takes, padded to 64, 96, 128 or 256
// columns. One warp has tiles copied, two warpgroups of 64 queries each multiply them.
//
//   columns                     64     96     128    256
//   keys of a tile              128    128    128    64
//   KiB of a tile               16     32     32     32
//   tiles of keys, and values   4      2      2      2
//   sets of queries             2      2      2      1
//   KiB of a block              162    193    193    193
//
// A warpgroup forms the scores of a tile while it adds the values of the one before (as FlashAttention-3 does), and the
// softmax of a tile runs beside that sum; so at any time one set of scores and one of weights is held, and no register
// is spilled.
//
// What bounds it, not measured. A multiprocessor of an H200 (132, 1.83 GHz) multiplies m64nNk16 in N / 2 cycles, does
// 16 exponentials a cycle, reads 128 bytes of shared memory a cycle, and its share of the second cache is about 24
// bytes a cycle. A block of 128 queries takes for each tile:
//
//   columns                     64     96     128    256
//   cycles of products          1024   1536   2048   2048
//   of exponentials             1024   1024   1024   512
//   of other instructions       1050   1100   1200   700    four a cycle, of 520 to 600 (350) a warp
//   of shared memory            900    1470   1790   2050   factors of products, and tiles that arrive
//   of the second cache         1370   2050   2730   2730   two tiles
//
// So the second cache gives 740 TFLOP/s to all of them, and less where sequences are short: what begins and ends an
// item costs about 1500 cycles that nothing covers. Expected, at 2k and 16k tokens, no mask: 64 columns 380 and 430
// TFLOP/s, where three units are equally busy; 128 columns 540 and 620.
#include "attention_hopper.cuh"
#include "attention_hopper_tiles.cuh"
#include "attention_softmax.cuh"

namespace embedding_kernels::cuda {
namespace {

constexpr const char* kOp = "varlen_attention";
constexpr int kGroups = 2;
constexpr int kThreads = (1 + kGroups) * kWarpgroup;

template <int columns>
struct HopperShape {
  static constexpr int D = columns;
  static constexpr int kPanels = panels_of(columns);
  static constexpr int kKeys = D <= 128 ? 128 : 64;
  static constexpr int kStages = D <= 64 ? 4 : 2;
  static constexpr int kQueryStages = D <= 128 ? 2 : 1;
  static constexpr bool kTurns = D <= 128;
  static constexpr uint32_t kTileBytes = kPanels * panel_bytes(kKeys);
  static constexpr uint32_t kQueryBytes = kPanels * panel_bytes(kGroupRows);  // of a warpgroup
};

template <class Shape>
struct HopperShared {
  alignas(1024) unsigned char queries[Shape::kQueryStages][kGroups][Shape::kQueryBytes];
  unsigned char keys[Shape::kStages][Shape::kTileBytes];
  unsigned char values[Shape::kStages][Shape::kTileBytes];
  int32_t positions[Shape::kStages][Shape::kKeys];  // with the keys
  Item items[Shape::kQueryStages];                  // with the queries
  Ring<Shape::kQueryStages> query_ring;
  Ring<Shape::kStages> key_ring, value_ring;
};

struct HopperArguments {
  TensorMap queries, keys, values, out;
  AttentionRule rule;
  Rotation rotation;  // of queries; keys come rotated
  Items items;
  float* lse;  // [heads, total]
};

// ---- the warp that has tiles copied ----

// Positions of a tile's keys; 0 past the last that counts.
template <int kKeys>
__device__ inline void stage_positions(const int32_t* positions, int32_t row, int32_t last, int32_t* staged, int lane) {
#pragma unroll
  for (int i = 0; i < kKeys; i += kWarp) {
    staged[i + lane] = row + i + lane < last ? positions[row + i + lane] : 0;
  }
  ptx::sync_warp();
}

// An item's keys and values, tile after tile. Rows past the last that any query may pair with come as zeros.
template <class Shape>
__device__ inline void copy_pairs(const HopperArguments& a, HopperShared<Shape>& shared, const Item& item,
                                  RingPlace<Shape::kStages>& place, int lane) {
  constexpr int kKeys = Shape::kKeys;
  const OwnRows& own = item.own;
  const int32_t head = item.head / a.rule.group, count = own.walk_last - own.other_start;
#pragma unroll 1
  for (int32_t row = own.walk_first; row < own.walk_last; row += kKeys, place.advance()) {
    if (a.rule.keys.positions != nullptr) {
      wait_free(shared.key_ring, place);
      stage_positions<kKeys>(a.rule.keys.positions, row, own.walk_last, shared.positions[place.stage], lane);
    }
    if (lane != 0) continue;
    const int32_t within = row - own.other_start;
    const auto copy = [&](Ring<Shape::kStages>& ring, const TensorMap& map, unsigned char* tiles) {
      wait_free(ring, place);
      const uint32_t full = full_at(ring, place);
      ptx::arrive_expecting(full, Shape::kTileBytes);
      copy_panels<Shape::kPanels, kKeys>(ptx::shared_address(tiles) + place.stage * Shape::kTileBytes, &map, head,
                                         own.other_start, count, within, full);
    };
    copy(shared.key_ring, a.keys, shared.keys[0]);
    copy(shared.value_ring, a.values, shared.values[0]);
  }
}

template <class Shape>
__device__ inline void produce(const HopperArguments& a, HopperShared<Shape>& shared, int lane) {
  RingPlace<Shape::kQueryStages> queries;
  RingPlace<Shape::kStages> tiles;
  uint32_t drawn = draw(a.items, lane);
#pragma unroll 1
  for (;; queries.advance()) {
    const Item item = next_item<kGroups * kGroupRows, false>(a.rule, a.items, lane, drawn);
    if (lane == 0) {
      wait_free(shared.query_ring, queries);
      const uint32_t full = full_at(shared.query_ring, queries);
      shared.items[queries.stage] = item;
      const int groups = item.head < 0 ? 0 : item.own.count > kGroupRows ? 2 : 1;
      ptx::arrive_expecting(full, groups * Shape::kQueryBytes);
#pragma unroll 1
      for (int group = 0; group < groups; ++group) {
        copy_panels<Shape::kPanels, kGroupRows>(ptx::shared_address(shared.queries[queries.stage][group]), &a.queries,
                                                item.head, item.own.first, item.own.count, group * kGroupRows, full);
      }
    }
    if (item.head < 0) return;
    copy_pairs(a, shared, item, tiles, lane);
  }
}

// ---- the warpgroups that multiply ----

// They issue the products of each tile in turns, so that one's softmax runs beside the other's products; left alone,
// both would rather start them together and wait for them together. Both take a turn for each tile of an item, also
// for one that they do not need. At 256 columns the products take far longer than the softmax.
enum Meeting : uint32_t { kOneGroup = 1, kTurn = 1 + kGroups };  // barriers by number, of each warpgroup
template <class Shape>
__device__ inline void begin_turn(int group) {
  if constexpr (Shape::kTurns) ptx::sync_threads(kTurn + group, kGroups * kWarpgroup);
}
template <class Shape>
__device__ inline void end_turn(int group) {
  if constexpr (Shape::kTurns) ptx::arrive(kTurn + (group ^ 1), kGroups * kWarpgroup);
}

// A warpgroup's queries of an item, and where a thread stands among them.
template <class Shape>
struct GroupRows {
  OwnRows own;
  int32_t head;
  int group;
  const float* table;  // of the head, its middle; read through the first cache, which its few lines stay in
  int32_t at[2];       // positions of the lane's rows
  uint32_t tile;       // in shared memory
};

template <class T, class Shape>
__device__ inline void begin_scores(uint32_t queries, uint32_t keys, float (&scores)[1][Shape::kKeys / 8][4]) {
  const uint64_t left = along_rows(queries), right = along_rows(keys);
  ptx::begin_products();
#pragma unroll
  for (int step = 0; step < Shape::D / 16; ++step) {
    const uint32_t panel = step / 4, column = step % 4 * 32;
    multiply_tiles<T>(scores[0], further(left, panel * panel_bytes(kGroupRows) + column),
                      further(right, panel * panel_bytes(Shape::kKeys) + column), step > 0 ? 1 : 0);
  }
  ptx::commit_products();
}

template <class T, class Shape>
__device__ inline void begin_mixing(uint32_t values, const uint32_t (&weights)[Shape::kKeys / 16][4],
                                    float (&mixed)[1][Shape::D / 8][4]) {
  const uint64_t right = along_columns(values, panel_bytes(Shape::kKeys));
  ptx::begin_products();
#pragma unroll
  for (int step = 0; step < Shape::kKeys / 16; ++step) {
    multiply_held<T>(mixed[0], weights[step], further(right, step * 16 * kPanelRow));
  }
  ptx::commit_products();
}

// What earlier keys count once those of a tile are in.
struct Decay {
  bool some;  // the same for a whole warp
  float of[2];
};

// Scores of the tile from row `row` on to weights; all but what was mixed is scaled to the new level.
template <class Shape>
__device__ inline Decay weigh(const AttentionRule& rule, const GroupRows<Shape>& rows, int32_t row,
                              const int32_t* staged, int lane, float (&scores)[1][Shape::kKeys / 8][4],
                              Gathered<Shape::D, 1>& gathered) {
  constexpr int kKeys = Shape::kKeys, kColumns = kKeys / 8;
  const OwnRows& own = rows.own;
  const int32_t coordinate = row - own.other_start, valid = own.other_end - row;
  const Columns columns = columns_of(staged, coordinate, valid, lane);
  if (rule.formed) form_scores<false, false, 1, kColumns>(rule, rows.table, columns, rows.at, scores, scores);
  const Window window = window_of<false>(rule);
  if (!all_pair<kKeys>(own, window, staged != nullptr, coordinate, valid)) hide(rows.at, window, columns, scores);
  const float factor = rule.formed ? 1.0f : rule.factor;
  float level[2];
  const bool higher = raise_levels<1, kColumns>(factor, scores, gathered.level, level);
  // mostly the highest is among the first keys
  Decay decay = {ptx::vote_ballot(higher) != 0, {1, 1}};
  if (decay.some) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      decay.of[r] = decay_of(gathered.level[r], level[r]);
      gathered.level[r] = level[r];
      gathered.sums[r] *= decay.of[r];
    }
  }
  form_weights<1, kColumns>(factor, level, scores, gathered.sums);
  return decay;
}

template <class T, int kColumns>
__device__ inline void hold_weights(const float (&scores)[1][kColumns][4], uint32_t (&weights)[kColumns / 2][4]) {
#pragma unroll
  for (int n = 0; n < kColumns; n += 2) left_of<T>(scores[0][n], scores[0][n + 1], weights[n / 2]);
}

// Tiles that the other warpgroup alone needs.
template <class Shape>
__device__ inline void pass_tiles(HopperShared<Shape>& shared, int group, int32_t count,
                                  RingPlace<Shape::kStages>& place, int lane) {
#pragma unroll 1
  for (; count > 0; --count, place.advance()) {
    wait_full(shared.key_ring, place);
    begin_turn<Shape>(group);
    end_turn<Shape>(group);
    wait_full(shared.value_ring, place);
    give_free(shared.key_ring, place, lane);
    give_free(shared.value_ring, place, lane);
  }
}

// The tiles from row `row` on; at least one.
template <class T, class Shape>
__device__ inline void gather_tiles(const HopperArguments& a, HopperShared<Shape>& shared, const GroupRows<Shape>& rows,
                                    int32_t row, int32_t count, RingPlace<Shape::kStages>& place, int lane,
                                    Gathered<Shape::D, 1>& gathered) {
  constexpr int kKeys = Shape::kKeys, kColumns = kKeys / 8;
  const bool positions = a.rule.keys.positions != nullptr;
  float scores[1][kColumns][4];
  uint32_t weights[kColumns / 2][4];
  // the staged positions are freed with the keys, so later than the products alone would
  const auto weigh_tile = [&](const RingPlace<Shape::kStages>& tile) {
    if (!positions) give_free(shared.key_ring, tile, lane);
    const Decay decay =
        weigh(a.rule, rows, row, positions ? shared.positions[tile.stage] : nullptr, lane, scores, gathered);
    if (positions) {
      ptx::sync_warp();
      give_free(shared.key_ring, tile, lane);
    }
    row += kKeys;
    return decay;
  };
  wait_full(shared.key_ring, place);
  begin_turn<Shape>(rows.group);
  begin_scores<T, Shape>(rows.tile, ptx::shared_address(shared.keys) + place.stage * Shape::kTileBytes, scores);
  end_turn<Shape>(rows.group);
  ptx::wait_products<0>();
  ptx::settle(scores[0]);
  weigh_tile(place);
  hold_weights<T, kColumns>(scores, weights);
#pragma unroll 1
  while (--count > 0) {
    RingPlace<Shape::kStages> next = place;
    next.advance();
    wait_full(shared.key_ring, next);
    begin_turn<Shape>(rows.group);
    begin_scores<T, Shape>(rows.tile, ptx::shared_address(shared.keys) + next.stage * Shape::kTileBytes, scores);
    wait_full(shared.value_ring, place);
    begin_mixing<T, Shape>(ptx::shared_address(shared.values) + place.stage * Shape::kTileBytes, weights,
                           gathered.mixed);
    end_turn<Shape>(rows.group);
    ptx::wait_products<1>();
    ptx::settle(scores[0]);
    const Decay decay = weigh_tile(next);
    ptx::wait_products<0>();
    ptx::settle(gathered.mixed[0]);
    give_free(shared.value_ring, place, lane);
    if (decay.some) {
#pragma unroll
      for (int r = 0; r < 2; ++r) scale_row<1, Shape::D / 8>(r, decay.of[r], gathered.mixed);
    }
    hold_weights<T, kColumns>(scores, weights);
    place = next;
  }
  wait_full(shared.value_ring, place);
  begin_mixing<T, Shape>(ptx::shared_address(shared.values) + place.stage * Shape::kTileBytes, weights, gathered.mixed);
  ptx::wait_products<0>();
  ptx::settle(gathered.mixed[0]);
  give_free(shared.value_ring, place, lane);
  place.advance();
}

// Output and lse of a warp's sixteen rows, which go out by way of the queries' place: the copy engine clips them to the
// sequence and to the dimensions that there are.
template <class T, class Shape>
__device__ inline void write_rows(const HopperArguments& a, unsigned char* tile, const GroupRows<Shape>& rows, int warp,
                                  int lane, const Gathered<Shape::D, 1>& gathered) {
  const OwnRows& own = rows.own;
  const int first = 16 * warp;
  // other warps' parts of the last products with the queries may be under way
  ptx::sync_threads(kOneGroup + rows.group, kWarpgroup);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = first + r * 8 + lane / 4;
    float sum = gathered.sums[r];
    sum += ptx::shuffle_xor(sum, 1);
    sum += ptx::shuffle_xor(sum, 2);
    const float share = sum == 0 ? 0.0f : 1 / sum;
#pragma unroll
    for (int n = 0; n < Shape::D / 8; ++n) {
      const float low = gathered.mixed[0][n][r * 2], high = gathered.mixed[0][n][r * 2 + 1];
      unsigned char* const to = tile + n / 8 * panel_bytes(kGroupRows) + panel_offset(row, n % 8) + lane % 4 * 4;
      *reinterpret_cast<uint32_t*>(to) = sum == 0 ? 0u : pack_pair<T>(low * share, high * share);
    }
    if (lane % 4 == 0 && row < own.count) {
      a.lse[static_cast<int64_t>(rows.head) * a.rule.queries.total + own.first + row] = lse_of(gathered.level[r], sum);
    }
  }
  ptx::publish_stores();
  ptx::sync_warp();
  if (lane == 0 && first < own.count) {
#pragma unroll
    for (int panel = 0; panel < Shape::kPanels; ++panel) {
      int32_t place[5];
      ragged_place(panel * kPanelValues, rows.head, own.first, own.count, first, place);
      ptx::store_box5(&a.out, place, rows.tile + panel * panel_bytes(kGroupRows) + first * kPanelRow);
    }
    ptx::commit_stores();
  }
}

// Gives a place of queries back when the output that followed them there has been read.
template <class Shape>
__device__ inline void free_queries(HopperShared<Shape>& shared, const RingPlace<Shape::kQueryStages>& place,
                                    int lane) {
  if (lane == 0) ptx::wait_stores_read<0>();
  give_free(shared.query_ring, place, lane);
}

// Turns the queries, which have arrived, and takes their positions.
template <class T, class Shape>
__device__ inline void take_queries(const HopperArguments& a, unsigned char* tile, int thread, GroupRows<Shape>& rows) {
  const OwnRows& own = rows.own;
  if (a.rotation.half > 0) {
    rotate_rows(
        reinterpret_cast<T*>(tile), own.count, a.rotation, thread, kWarpgroup,
        [](int row, int column) {
          return column / kPanelValues * kGroupRows * kPanelValues +
                 element_index<kPanelValues>(row, column % kPanelValues);
        },
        [&](int row) { return position_of(a.rule.queries, own.start, own.first + row); });
    ptx::publish_stores();
    ptx::sync_threads(kOneGroup + rows.group, kWarpgroup);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = thread / kWarp * 16 + r * 8 + thread % kWarp / 4;
    rows.at[r] = row < own.count ? position_of(a.rule.queries, own.start, own.first + row) : 0;
  }
}

template <class T, class Shape>
__device__ inline void consume(const HopperArguments& a, HopperShared<Shape>& shared, int group, int thread) {
  const int warp = thread / kWarp, lane = thread % kWarp;
  // with a second place for queries the first is not waited for before the next item has come
  constexpr bool kAtOnce = Shape::kQueryStages == 1;
  RingPlace<Shape::kQueryStages> queries, before;
  RingPlace<Shape::kStages> tiles;
  bool any_before = false;
  if (group != 0) end_turn<Shape>(group);  // the first turn is the first one's
#pragma unroll 1
  for (;; queries.advance()) {
    wait_full(shared.query_ring, queries);
    if (!kAtOnce && any_before) free_queries(shared, before, lane);
    const Item& item = shared.items[queries.stage];
    GroupRows<Shape> rows;
    rows.head = item.head;
    if (rows.head < 0) break;
    rows.group = group;
    rows.own = rows_of_group<false>(a.rule, item.own, group, lane);
    const TileSpan span = tiles_needed<Shape::kKeys>(item.own, rows.own);
    const int32_t count = tiles_of<Shape::kKeys>(item.own), row = item.own.walk_first + span.first * Shape::kKeys;
    rows.table =
        a.rule.table == nullptr ? nullptr : a.rule.table + rows.head * (2 * int64_t{a.rule.reach} + 1) + a.rule.reach;
    unsigned char* const tile = shared.queries[queries.stage][group];
    rows.tile = ptx::shared_address(tile);
    take_queries<T>(a, tile, thread, rows);
    Gathered<Shape::D, 1> gathered = {};
    gathered.level[0] = gathered.level[1] = -INFINITY;
    pass_tiles(shared, group, span.first, tiles, lane);
    if (span.first < span.last) {
      gather_tiles<T>(a, shared, rows, row, span.last - span.first, tiles, lane, gathered);
    }
    pass_tiles(shared, group, count - span.last, tiles, lane);
    if (rows.own.count > 0) write_rows<T>(a, tile, rows, warp, lane, gathered);
    ptx::sync_warp();
    if (kAtOnce) free_queries(shared, queries, lane);
    before = queries;
    any_before = true;
  }
  if (group == 0) begin_turn<Shape>(group);  // nothing is left at the barrier
}

template <class T, class Shape>
__global__ void __launch_bounds__(kThreads, 1) attention_hopper_kernel(const __grid_constant__ HopperArguments a) {
  auto& shared = shared_memory<HopperShared<Shape>>();
  const int thread = static_cast<int>(threadIdx.x);
  // the same for a warp: from a shuffle the compiler knows it, and keeps addresses of tiles in uniform registers
  const auto group = static_cast<int>(ptx::shuffle(static_cast<uint32_t>(thread / kWarpgroup), 0));
  if (thread == 0) {
    begin_ring(shared.query_ring, kGroups * kGroupWarps);
    begin_ring(shared.key_ring, kGroups * kGroupWarps);
    begin_ring(shared.value_ring, kGroups * kGroupWarps);
    ptx::publish_barriers();
    for (const TensorMap* const map : {&a.queries, &a.keys, &a.values, &a.out}) ptx::prefetch_map(map);
  }
  ptx::sync_block();
  if (group == 0) {
    ptx::keep_registers<40>();
    if (thread < kWarp) produce(a, shared, thread);
  } else {
    ptx::take_registers<232>();
    consume<T>(a, shared, group - 1, thread % kWarpgroup);
  }
}

// ---- host ----

template <class T>
TensorMap map_of(const Tensor& rows, int box_rows) {
  return ragged_map(kOp, pointer<T>(rows), rows.size(2), rows.size(1), rows.stride(1), rows.stride(0),
                    static_cast<uint32_t>(box_rows));
}

template <class T, int columns>
void launch_attention(const AttentionCall& call, const Tensor& keys, Tensor& out, Tensor& lse) {
  using Shape = HopperShape<columns>;
  const AttentionTensors& t = call.tensors;
  Tensor counter = empty_like_device(t.q, {1}, ScalarType::Int);
  fill_zero(kOp, mutable_pointer<int32_t>(counter), sizeof(int32_t), current_stream(t.q));
  const int64_t slots = t.q.size(0) / (kGroups * kGroupRows) + call.rule.sequences, heads = t.q.size(1);
  HopperArguments a = {map_of<T>(t.q, kGroupRows),
                       map_of<T>(keys, Shape::kKeys),
                       map_of<T>(t.v, Shape::kKeys),
                       map_of<T>(out, 16),
                       call.rule,
                       call.rotation,
                       {reinterpret_cast<uint32_t*>(mutable_pointer<int32_t>(counter)), static_cast<int32_t>(slots),
                        static_cast<int32_t>(heads), call.rule.after < call.rule.before},
                       mutable_pointer<float>(lse)};
  launch(kOp, attention_hopper_kernel<T, Shape>, dim3(blocks_for(slots * heads, 1, multiprocessors(t.q))),
         dim3(kThreads), sizeof(HopperShared<Shape>), current_stream(t.q), a);
}

}  // namespace

void attend_on_hopper(const AttentionCall& call, Tensor& out, Tensor& lse) {
  const AttentionTensors& t = call.tensors;
  const int64_t columns = std::max(t.q.size(2), t.v.size(2));
  const Tensor keys = rotated(kOp, call, t.k, call.rule.keys);
  with_half_type(t.q.scalar_type(), [&]<class T>(T) {
    if (columns <= 64) {
      launch_attention<T, 64>(call, keys, out, lse);
    } else if (columns <= 96) {
      launch_attention<T, 96>(call, keys, out, lse);
    } else if (columns <= 128) {
      launch_attention<T, 128>(call, keys, out, lse);
    } else {
      launch_attention<T, 256>(call, keys, out, lse);
    }
  });
}

}  // namespace embedding_kernels::cuda

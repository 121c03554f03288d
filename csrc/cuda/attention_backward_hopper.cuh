// The passes of varlen_attention_backward on Hopper: what one is made of, its producer, and a step over a tile.
//
// A pass owns rows of queries (and sums their gradient) or of keys (theirs and the values'). The own side always has
// the rows of the sums, so weights and changes of scores leave the registers only as held left factors:
//   keys:    S^T = K Q^T, dP^T = V dO^T, dV += P^T dO, dK += dS^T Q
//   queries: S = Q K^T, dP = dO V^T, dQ += dS K
#pragma once

#include "attention_backward.cuh"
#include "attention_hopper_tiles.cuh"

namespace embedding_kernels::cuda {

constexpr int kGradientGroups = 2;  // warpgroups that multiply

template <int columns, Pass pass>
struct HopperGradientShape {
  static constexpr int D = columns;
  static constexpr bool kOwnKeys = pass == Pass::keys;
  static constexpr int kPanels = panels_of(D);
  // Two gradients of 256 columns do not fit into the registers of a warpgroup, so both have the same rows, and half of
  // the columns each.
  static constexpr bool kSplit = D == 256;
  static constexpr int kSums = kSplit ? 128 : D;  // columns that a warpgroup sums
  static constexpr int kOwn = kSplit ? kGroupRows : kGradientGroups * kGroupRows;
  static constexpr int kOthers = kOwnKeys || kSplit ? 64 : 128;  // rows of a tile of the other side
  // The second product is under way while weights are formed where registers suffice.
  static constexpr bool kAhead = !(kOwnKeys && kSums == 128);
  static constexpr uint32_t kOwnBytes = kPanels * panel_bytes(kOwn), kOtherBytes = kPanels * panel_bytes(kOthers);
  static constexpr int kStages = kOtherBytes == 32768 ? 2 : 4;
  static constexpr int kPlaces = kStages + 1;  // of a ring: the last one is of the own rows
  // What lies beside a tile, a word a row, is copied from a multiple of 16 bytes on, as the copy engine demands, so
  // from up to three rows before the tile; and to a multiple of 128 bytes.
  static constexpr int kBeside = kOthers + 4, kBesideRoom = kOthers + 32;
};
__device__ inline int32_t rows_before(int32_t row) { return row & 3; }

// The own side's rows and their partners in the two products, q · k and grad_out · v, as in GradientArguments.
struct HopperGradientArguments {
  AttentionRule rule;
  Items items;
  TensorMap own[2], others[2];
  TensorMap levels;     // of the queries: GradientLevels as rows of heads
  TensorMap positions;  // of the other side
  GradientLevels of_rows;
  int32_t heads;    // of queries
  int32_t members;  // heads of the other side for a head of the own
  int32_t dims[2];  // of the own side's rows
  float scale;
  void* first_gradient;  // of own[0], as float32 where it has to be turned back
  bool first_is_wide;
  void* second_gradient;  // of own[1], for keys
};

// An item as the warpgroups take it, who keep nothing of it in registers.
struct GradientItem {
  int32_t head;          // −1: no more items
  int32_t first, known;  // rows
  int32_t tiles, walk_first;
  OwnRows rows[kGradientGroups];
  TileSpan needed[kGradientGroups];
};

// What lies in a stage: a tile of the item, of a head of the other side, and whether it is the item's last.
struct GradientTile {
  int32_t member, number;
  bool last;
};
__device__ inline bool needs(const GradientItem& item, const GradientTile& tile, int group) {
  return tile.number >= item.needed[group].first && tile.number < item.needed[group].last;
}
__device__ inline bool needs_none(const GradientItem& item, int group) { return item.needed[group].last == 0; }

template <class Shape>
struct HopperGradientShared {
  alignas(1024) uint8_t own[2][Shape::kOwnBytes];
  alignas(1024) uint8_t others[Shape::kStages][2][Shape::kOtherBytes];
  alignas(128) float levels[Shape::kStages][Shape::kOwnKeys ? Shape::kBesideRoom : 32];
  alignas(128) float shares[Shape::kStages][Shape::kOwnKeys ? Shape::kBesideRoom : 32];
  alignas(128) int32_t positions[Shape::kStages][Shape::kBesideRoom];
  GradientTile tiles[Shape::kStages];
  GradientItem items[2];
  Ring<Shape::kPlaces> ring;
};

template <class Shape>
__device__ inline bool has_positions(const AttentionRule& rule) {
  return (Shape::kOwnKeys ? rule.queries : rule.keys).positions != nullptr;
}
template <class Shape>
__device__ inline int32_t first_query_head(const HopperGradientArguments& a, int32_t head) {
  return Shape::kOwnKeys ? head * a.members : head;
}

// Whether the own rows are not needed any more past this tile.
__device__ inline bool is_last(const HopperGradientArguments& a, const GradientItem& item, const GradientTile& tile,
                               int group) {
  return tile.member + 1 == a.members && tile.number + 1 == item.needed[group].last;
}

// Where a step of the stages, and an item, stand in the ring.
template <class Shape>
__device__ inline RingPlace<Shape::kPlaces> place_of_step(uint32_t step) {
  return {static_cast<int>(step % Shape::kStages), step / Shape::kStages % 2};
}
template <class Shape>
__device__ inline RingPlace<Shape::kPlaces> place_of_item(uint32_t number) {
  return {Shape::kStages, number % 2};
}

// ---- the producer ----

// One thread has tile `number` of an item copied, of a head of the other side.
template <class Shape>
__device__ inline void copy_tile(const HopperGradientArguments& a, HopperGradientShared<Shape>& shared,
                                 const GradientItem& item, const GradientTile& tile, uint32_t step) {
  const RingPlace<Shape::kPlaces> place = place_of_step<Shape>(step);
  const int32_t of_queries = first_query_head<Shape>(a, item.head) + tile.member;
  const int32_t head = Shape::kOwnKeys ? of_queries : of_queries / a.rule.group;
  const OwnRows& own = item.rows[0];
  const int32_t row = item.walk_first + tile.number * Shape::kOthers;
  const bool positions = has_positions<Shape>(a.rule);
  const uint32_t rows_bytes = 4 * Shape::kBeside;
  const int32_t beside = row - rows_before(row);
  const uint32_t full = full_at(shared.ring, place);
  wait_free(shared.ring, place);
  shared.tiles[place.stage] = tile;
  ptx::arrive_expecting(full,
                        2 * Shape::kOtherBytes + (Shape::kOwnKeys ? 2 * rows_bytes : 0) + (positions ? rows_bytes : 0));
#pragma unroll
  for (int factor = 0; factor < 2; ++factor) {
    copy_panels<Shape::kPanels, Shape::kOthers>(ptx::shared_address(shared.others[place.stage][factor]),
                                                &a.others[factor], head, own.other_start,
                                                own.other_end - own.other_start, row - own.other_start, full);
  }
  if constexpr (Shape::kOwnKeys) {
    ptx::load_box2(ptx::shared_address(shared.levels[place.stage]), &a.levels, beside, of_queries, full);
    ptx::load_box2(ptx::shared_address(shared.shares[place.stage]), &a.levels, beside, a.heads + of_queries, full);
  }
  if (positions) ptx::load_box2(ptx::shared_address(shared.positions[place.stage]), &a.positions, beside, 0, full);
}

// One thread has the rows of an item copied, and all tiles that it walks over; all read the item past own_full.
template <class Shape>
__device__ inline void copy_item(const HopperGradientArguments& a, HopperGradientShared<Shape>& shared,
                                 const GradientItem& item, uint32_t own_full, uint32_t& step) {
  ptx::arrive_expecting(own_full, 2 * Shape::kOwnBytes);
#pragma unroll
  for (int factor = 0; factor < 2; ++factor) {
    copy_panels<Shape::kPanels, Shape::kOwn>(ptx::shared_address(shared.own[factor]), &a.own[factor], item.head,
                                             item.first, item.known, 0, own_full);
  }
#pragma unroll 1
  for (int32_t member = 0; member < a.members; ++member) {
#pragma unroll 1
    for (int32_t number = 0; number < item.tiles; ++number) {
      const bool last = member + 1 == a.members && number + 1 == item.tiles;
      copy_tile(a, shared, item, {member, number, last}, step++);
    }
  }
}

// One warp draws items, hands them on and has their rows copied. An item lies where the one before the last one lay,
// which all are done with once they have freed the last one's rows.
template <class Shape>
__device__ inline void produce(const HopperGradientArguments& a, HopperGradientShared<Shape>& shared) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  uint32_t step = 0;  // of the ring
  uint32_t drawn = draw(a.items, lane);
  for (uint32_t number = 0;; ++number) {
    const Item item = next_item<Shape::kOwn, Shape::kOwnKeys>(a.rule, a.items, lane, drawn);
    const RingPlace<Shape::kPlaces> own_place = place_of_item<Shape>(number);
    if (lane == 0) wait_free(shared.ring, own_place);
    ptx::sync_warp();
    GradientItem& handed = shared.items[number % 2];
    if (lane == 0) handed.head = item.head;
    if (item.head < 0) {
      if (lane == 0) ptx::arrive_at(full_at(shared.ring, own_place));
      return;
    }
    for (int group = 0; group < kGradientGroups; ++group) {
      const OwnRows rows = rows_of_group<Shape::kOwnKeys>(a.rule, item.own, Shape::kSplit ? 0 : group, lane);
      if (lane != 0) continue;
      handed.rows[group] = rows;
      handed.needed[group] = tiles_needed<Shape::kOthers>(item.own, rows);
    }
    if (lane != 0) continue;
    handed.tiles = tiles_of<Shape::kOthers>(item.own);
    handed.walk_first = item.own.walk_first;
    handed.first = item.own.first;
    handed.known = item.own.known;
    copy_item(a, shared, handed, full_at(shared.ring, own_place), step);
  }
}

// ---- a step over a tile, by a warpgroup ----

// sums [64, kOthers] = own rows · the tile's, as one commit.
template <class T, class Shape>
__device__ inline void multiply_rows(uint32_t own, uint32_t others, float (&sums)[Shape::kOthers / 8][4]) {
  const uint64_t left = along_rows(own), right = along_rows(others);
  ptx::begin_products();
#pragma unroll
  for (int step = 0; step < Shape::D / 16; ++step) {
    const uint32_t panel = step / 4, inside = step % 4 * 32;
    multiply_tiles<T>(sums, further(left, panel * panel_bytes(Shape::kOwn) + inside),
                      further(right, panel * panel_bytes(Shape::kOthers) + inside), step != 0);
  }
  ptx::commit_products();
}

// sums [64, kSums] += held [64, kOthers] · the tile's columns, as one commit.
template <class T, class Shape>
__device__ inline void add_products(const uint32_t (&held)[Shape::kOthers / 16][4], uint32_t others,
                                    float (&sums)[Shape::kSums / 8][4]) {
  const uint64_t right = along_columns(others, panel_bytes(Shape::kOthers));
  ptx::begin_products();
#pragma unroll
  for (int step = 0; step < Shape::kOthers / 16; ++step) {
    multiply_held<T>(sums, held[step], further(right, step * panel_bytes(16)));
  }
  ptx::commit_products();
}

// What a thread knows of its two rows, and of the tile.
struct HopperRows {
  int32_t at[2];
  float level[2], share[2];  // of queries
};
struct HopperTile {
  Columns columns;
  Window window;
  int32_t coordinate, valid;  // as all_pair's
  const float* table;
  const float* levels;  // of the tile's queries, from the lane's first column on
};

// The tile in `stage`.
template <class Shape>
__device__ inline HopperTile tile_at(const HopperGradientArguments& a, const HopperGradientShared<Shape>& shared,
                                     const GradientItem& item, int stage, int lane) {
  const OwnRows& own = item.rows[0];  // all have the same other side
  const int32_t row = item.walk_first + shared.tiles[stage].number * Shape::kOthers;
  const int32_t coordinate = row - own.other_start, valid = own.other_end - row;
  const int64_t head = first_query_head<Shape>(a, item.head) + shared.tiles[stage].member;
  const int64_t entries = 2 * static_cast<int64_t>(a.rule.reach) + 1;
  const int32_t before = rows_before(row);
  return {
      columns_of(has_positions<Shape>(a.rule) ? shared.positions[stage] + before : nullptr, coordinate, valid, lane),
      window_of<Shape::kOwnKeys>(a.rule),
      coordinate,
      valid,
      a.rule.table == nullptr ? nullptr : a.rule.table + head * entries + a.rule.reach,
      shared.levels[stage] + before + lane % 4 * 2};
}

__device__ inline Columns columns_from(const Columns& columns, int n) {
  return {columns.positions == nullptr ? nullptr : columns.positions + 8 * n, columns.coordinate + 8 * n,
          columns.valid - 8 * n};
}

// Makes weights of products, and a left factor of them for keys. What stays is the weights times the scores' slopes,
// and less than 0 where there is no pair. Masked: some pairs may not be any.
template <class T, class Shape, bool kMasked, bool kFormed>
__device__ inline void weigh(const AttentionRule& rule, const HopperTile& tile, const HopperRows& rows,
                             float (&scores)[Shape::kOthers / 8][4], uint32_t (&held)[Shape::kOthers / 16][4]) {
#pragma unroll
  for (int step = 0; step < Shape::kOthers / 16; ++step) {
    float weights[2][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int n = 2 * step + half;
      float formed[1][1][4], slopes[1][1][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) formed[0][0][i] = scores[n][i];
      if constexpr (kFormed) {
        form_scores<Shape::kOwnKeys, true>(rule, tile.table, columns_from(tile.columns, n), rows.at, formed, slopes);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float level = Shape::kOwnKeys ? tile.levels[8 * n + i % 2] : rows.level[i / 2];
        const float weight =
            ptx::exp2_near(ptx::fused_multiply_add(formed[0][0][i], kFormed ? 1.0f : rule.factor, -level));
        const bool paired = !kMasked || pairs(tile.columns, n, i % 2, rows.at[i / 2], tile.window);
        weights[half][i] = paired ? weight : 0;
        scores[n][i] = !paired ? -1 : kFormed && rule.cap != 0 ? weight * slopes[0][0][i] : weight;
      }
    }
    if constexpr (Shape::kOwnKeys) left_of<T>(weights[0], weights[1], held[step]);
  }
}

// Changes of the products as a left factor; `shares` of the tile's queries, from the lane's first column on.
template <class T, class Shape, bool kMasked>
__device__ inline void change(const float* shares, const HopperRows& rows,
                              const float (&weights)[Shape::kOthers / 8][4],
                              const float (&gains)[Shape::kOthers / 8][4], uint32_t (&held)[Shape::kOthers / 16][4]) {
#pragma unroll
  for (int step = 0; step < Shape::kOthers / 16; ++step) {
    float changes[2][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int n = 2 * step + half;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float share = Shape::kOwnKeys ? shares[8 * n + i % 2] : rows.share[i / 2];
        const float product = weights[n][i] * (gains[n][i] - share);
        // what does not pair may have any share, not a number even
        changes[half][i] = kMasked && weights[n][i] < 0 ? 0 : product;
      }
    }
    left_of<T>(changes[0], changes[1], held[step]);
  }
}

}  // namespace embedding_kernels::cuda

// What Hopper's passes over queries and keys share: items of work, tiles of ragged rows, rings between the warp that
// has tiles copied and the warpgroups that multiply them.
//
// An item is a slot of 64 rows for each warpgroup that multiplies, all of one sequence, and a head. One warp draws
// items from a counter, so that blocks with short ones take more of them, and hands each on beside the rows themselves.
// The block then walks the other side's rows in tiles from the first that any of its rows may pair with; a warpgroup
// multiplies those of them that its own rows need.
#pragma once

#include "attention.cuh"
#include "warpgroup.cuh"

namespace embedding_kernels::cuda {

constexpr int kGroupRows = 64;  // of a warpgroup: those of a product
constexpr int kGroupWarps = kWarpgroup / kWarp;

constexpr int panels_of(int columns) { return (columns + kPanelValues - 1) / kPanelValues; }
__host__ __device__ constexpr uint32_t panel_bytes(int rows) { return static_cast<uint32_t>(rows * kPanelRow); }

// ---- products ----

template <class T, int kColumns>
__device__ inline void multiply_tiles(float (&sums)[kColumns][4], uint64_t left, uint64_t right, uint32_t add) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    ptx::multiply_tiles_bfloat16(sums, left, right, add);
  } else {
    ptx::multiply_tiles_float16(sums, left, right, add);
  }
}
template <class T, int kColumns>
__device__ inline void multiply_held(float (&sums)[kColumns][4], const uint32_t (&left)[4], uint64_t right) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    ptx::multiply_held_bfloat16(sums, left, right);
  } else {
    ptx::multiply_held_float16(sums, left, right);
  }
}

// ---- items ----

struct Items {
  uint32_t* counter;  // 0 before the launch
  int32_t slots;      // of a head
  int32_t heads;
  bool last_first;  // the last rows of a sequence have the most pairs, and the longest items come first
};

struct Item {
  OwnRows own;   // of all the block's warpgroups
  int32_t head;  // −1: no more items
};

// Draws a number; asked for long before it is used, since it takes a while.
__device__ inline uint32_t draw(const Items& items, int lane) {
  return lane == 0 ? ptx::add_global(items.counter, 1u) : 0;
}

// The item of a number drawn, or the next that has rows; draws another number. A whole warp comes. Slots of a head
// follow each other, so that the blocks of one moment share its rows in the second cache.
template <int kRows, bool kOwnKeys>
__device__ inline Item next_item(const AttentionRule& rule, const Items& items, int lane, uint32_t& drawn) {
  Item item;
  do {
    const uint32_t number = ptx::shuffle(drawn, 0);
    const auto slots = static_cast<uint32_t>(items.slots);
    if (number >= slots * static_cast<uint32_t>(items.heads)) {
      item.head = -1;
      return item;
    }
    drawn = draw(items, lane);
    item.head = static_cast<int32_t>(number / slots);
    const auto slot = static_cast<int32_t>(number % slots);
    item.own = own_rows<kRows, kOwnKeys>(rule, items.last_first ? items.slots - 1 - slot : slot, lane);
  } while (item.own.count == 0);
  return item;
}

// The rows of an item that are warpgroup `group`'s; a whole warp comes.
template <bool kOwnKeys>
__device__ inline OwnRows rows_of_group(const AttentionRule& rule, const OwnRows& all, int group, int lane) {
  OwnRows own = all;
  own.count = smaller(larger(all.count - group * kGroupRows, 0), kGroupRows);
  own.known = smaller(larger(all.known - group * kGroupRows, 0), kGroupRows);
  own.first = own.count == 0 ? all.first : all.first + group * kGroupRows;
  find_partners<kGroupRows, kOwnKeys>(rule, lane, own);
  return own;
}

// ---- tiles of the other side ----

// Tiles of an item, and those of them that some rows of it need.
template <int kTile>
__device__ inline int32_t tiles_of(const OwnRows& all) {
  return (all.walk_last - all.walk_first + kTile - 1) / kTile;
}
struct TileSpan {
  int32_t first, last;
};
template <int kTile>
__device__ inline TileSpan tiles_needed(const OwnRows& all, const OwnRows& own) {
  if (own.walk_first >= own.walk_last) return {0, 0};
  return {(own.walk_first - all.walk_first) / kTile, (own.walk_last - all.walk_first + kTile - 1) / kTile};
}

// One thread starts the copies of `kRows` rows of one head from row `row` of the rows [first, first + count) on, those
// past them as zeros; kPanels · panel_bytes(kRows) bytes, which the barrier's phase must expect. The map's boxes have
// kRows rows.
template <int kPanels, int kRows>
__device__ inline void copy_panels(uint32_t tile, const TensorMap* map, int32_t head, int32_t first, int32_t count,
                                   int32_t row, uint32_t barrier) {
#pragma unroll 1
  for (int panel = 0; panel < kPanels; ++panel) {
    int32_t place[5];
    ragged_place(panel * kPanelValues, head, first, count, row, place);
    ptx::load_box5(tile + panel * panel_bytes(kRows), map, place, barrier);
  }
}

}  // namespace embedding_kernels::cuda

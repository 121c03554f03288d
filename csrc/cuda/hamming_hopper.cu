// The scan of more than a few queries on Hopper: |a| + |b| - 2 |a and b|, the last by warpgroups' products of bits.
//
// One warp of a block has tiles of 256 codes copied, three count their ones, and two warpgroups multiply 64 queries by
// a tile, up to four times each, so that up to 512 queries share it. What a product finds stays in registers, where a
// filter asks whether any of it may be near; what is near goes by way of shared memory, a warp's sixteen rows and 32
// codes at a time, to the visits that all roads share. A warp has its rows alone, so that it finds codes in order.
//
// A model: clocks of a multiprocessor for 128 queries (both warpgroups once) and a tile of 1,024 bits. No rate of
// products of bits is published for this chip: eight times int8 is assumed, as on A100, so that they take as long as
// those of any other type of the same bytes.
//   products                   1024   8 of 64 x 256 x 256 bits, 128 each
//   filter                      412   a scheduler has a warp of each warpgroup, and a warp for 128 sums 64 IMAD on one
//                                     pipe, 64 IADD3 and 39 LOP3 on another, two clocks each: it hides behind the
//                                     products of the other warpgroup from 512 bits on; shorter codes are bound by it
//   shared memory               640   the products' reads; and for a tile up to 768 more: the copy engine, the counting
//                                     of ones, halves of them into registers, where they serve all queries
//   ones, once for a tile       768   three codes of 32 words a lane, 4 popcounts a clock and scheduler. A row of ones
//                                     among the queries would cost little, but 128, 256 or 512 queries would take a
//                                     block or a turn more; a row of each warp's, a sixteenth of all products
//   second cache, for a tile    512   32 KiB at 64 bytes a clock; at 512 queries 1/4 byte a distance
// So a tile and 512 queries take the 4,096 clocks of their products, and 128 queries what the memory needs for the
// codes (1,580 at 4.8 TB/s on 132 multiprocessors). Predicted, at 1.83 GHz: 7.7e12 distances a second. For the nearest
// 10 of 100 M codes of 1,024 bits by 1,024 queries: 13.3 ms for the round of all codes, 0.9 ms for those before it
// (round_strides), 0.4 ms to look again at the 3 % of row groups and tiles in which it finds something: 14.6 ms.
#include "hamming_visit.cuh"
#include "warpgroup.cuh"

namespace embedding_kernels::cuda {
namespace {

constexpr int kGroups = 2;  // warpgroups that multiply
constexpr int kGroupWarps = kWarpgroup / kWarp, kGroupRows = 64;
constexpr int kThreads = (1 + kGroups) * kWarpgroup;
constexpr int kCounters = kWarpgroup - kWarp;  // threads that count the ones of codes
constexpr int kCodes = 256;                    // of a tile
constexpr int kStages = 4, kMostChunks = 4;    // a tile of several chunks is there as a whole
constexpr int kMostRowGroups = 8;              // marks of 32 warps' rows make a word
constexpr int kColumns = kCodes / 8, kEighths = 8, kEighthCodes = kCodes / kEighths;
constexpr int kWarpRows = 16, kPairs = kEighthCodes / 2;
constexpr int kPairPitch = kPairs + 4;  // so that rows of a fragment lie in different banks
constexpr uint32_t kChunkBytes = kCodes * kPanelRow, kQueryPanel = kGroupRows * kPanelRow;

struct Item {
  uint32_t tile;  // kNoTile: no more of them
  uint32_t near;  // bit 4 g + w: rows of warp w of row group g are to be looked at
};

struct HopperShared {
  alignas(1024) unsigned char codes[kStages][kChunkBytes];
  uint32_t pairs[kGroups * kGroupWarps][kWarpRows * kPairPitch];  // common bits of two neighbouring codes
  // with the last chunk of a tile: the ones of its codes, and half of them
  alignas(16) uint16_t half_ones[kStages][kCodes];
  uint16_t ones[kStages][kCodes];
  Item items[kStages];  // with the first chunk
  Ring<kStages> ring;
  uint64_t counted[kStages];
};

struct HopperScan {
  TensorMap codes;
  Scan scan;
  // 2^16, which the compiler may not know: it would shift and add where one instruction multiplies and adds
  uint32_t upper_half;
};

// A warp's share, as visits want it.
struct Share {
  int lane, row;  // the first of its rows in the block
  uint32_t group, span, first_query;

  __device__ uint32_t* counted(const Scan& s) const { return shared_at<uint32_t>(s.at_counts) + 2 * row; }
};

__host__ __device__ inline int row_groups_of(const Scan& s) { return s.sharers / kGroupWarps; }
__host__ __device__ inline int block_rows_of(const Scan& s) { return row_groups_of(s) * kGroupRows; }

// ---- the ring ----

// Arrived at by the warps that count, when the ones of a stage's codes are there.
__device__ inline uint32_t counted_at(const HopperShared& shared, const RingPlace<kStages>& place) {
  return ptx::shared_address(shared.counted) + place.stage * static_cast<uint32_t>(sizeof(uint64_t));
}

__device__ inline void begin_barriers(HopperShared& shared) {
  constexpr int kCounterWarps = kCounters / kWarp;
  begin_ring(shared.ring, kGroups * kGroupWarps + kCounterWarps);
  for (uint64_t& counted : shared.counted) ptx::begin_barrier(ptx::shared_address(&counted), kCounterWarps);
  ptx::publish_barriers();
}

// ---- the queries of a block ----

// [3, rows]: a code is near where twice the ones in common, less those of the code, reach the first; the ones of the
// queries; and what makes sums of the filter reach its bits.
__device__ inline int32_t* numbers(const Scan& s, int which) {
  return shared_at<int32_t>(s.at_limits) + which * block_rows_of(s);
}

// The filter of two codes, 16 bits each: bits in common, less half the ones of the code, less half the limit, is not
// below zero where this makes it reach bit 15. Halves are rounded so that a code by one too far may be taken for near;
// visits look again.
__device__ inline uint32_t filter_start(int32_t limit) {
  constexpr int32_t kMost = 1 << 14;  // past all that bits of 512 bytes reach, and nothing is carried
  const int32_t half = limit > 2 * kMost ? kMost : limit < -2 * kMost ? -kMost : (limit + 1) >> 1;
  return static_cast<uint32_t>(0x8000 - half) * 0x10001u;
}

__device__ inline void lay_numbers(const Scan& s, uint32_t first_query, int queries, int thread) {
  for (int row = thread; row < block_rows_of(s); row += kThreads) {
    const int64_t q = int64_t{first_query} + row;
    const int32_t own = row < queries ? s.query_ones[q] : 0;
    const int32_t limit = row >= queries ? kNever : s.bounds == nullptr ? kAlways : own - (s.bounds[q] - 1 + s.ties);
    numbers(s, 0)[row] = limit;
    numbers(s, 1)[row] = own;
    numbers(s, 2)[row] = static_cast<int32_t>(filter_start(limit));
    shared_at<uint32_t>(s.at_counts)[2 * row] = shared_at<uint32_t>(s.at_counts)[2 * row + 1] = 0;
  }
}

__device__ inline uint32_t query_panel(const Scan& s, int row_group, int chunk) {
  return ptx::shared_address(shared_at<uint8_t>(s.at_queries)) + (row_group * s.chunks + chunk) * kQueryPanel;
}

__device__ inline void lay_queries(const Scan& s, uint32_t first_query, int queries, int thread) {
  constexpr int kPieces = kPanelRow / 16;
  const int pieces = s.chunks * kPieces;
  for (int item = thread; item < block_rows_of(s) * pieces; item += kThreads) {
    const int row = item / pieces, chunk = item % pieces / kPieces, piece = item % kPieces;
    ptx::Words4 words = {};
    if (row < queries) {
      words = ptx::load_constant_words4(s.queries + (int64_t{first_query} + row) * pieces * 16 + item % pieces * 16);
    }
    ptx::store_shared_words4(query_panel(s, row / kGroupRows, chunk) + panel_offset(row % kGroupRows, piece), words);
  }
  ptx::publish_stores();
}

// ---- the warp that has tiles copied ----

__device__ inline int64_t mark_at(const Scan& s, uint32_t group, int sharer, uint32_t tile) {
  return (int64_t{group} * s.sharers + sharer) * s.tiles + tile;
}

// Which warps' rows a tile is near.
__device__ inline uint32_t marks_of(const Scan& s, const Share& w, uint32_t tile) {
  const bool near = w.lane < s.sharers && s.near_tiles[mark_at(s, w.group, w.lane, tile)] != 0;
  const uint32_t marks = ptx::vote_ballot(near);
  ptx::sync_warp();  // who finds nothing near writes the marks, past the first lane's arrival
  return marks;
}

__device__ inline void copy_tiles(const HopperScan& a, HopperShared& shared, const Share& w) {
  const Scan& s = a.scan;
  Tiles tiles(s, w.span);
  RingPlace<kStages> place;
#pragma unroll 1
  for (uint32_t tile = 0; tile != kNoTile;) {
    tile = tiles.next(s, w);
    const uint32_t near = tile != kNoTile && s.only_near ? marks_of(s, w, tile) : 0xffffffffu;
    const int chunks = tile == kNoTile ? 1 : s.chunks;
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk, place.advance()) {
      ptx::sync_warp();  // a lane left behind would miss the phase that it waits for
      wait_free(shared.ring, place);
      if (w.lane != 0) continue;
      const uint32_t full = full_at(shared.ring, place);
      if (chunk == 0) shared.items[place.stage] = {tile, near};
      if (tile == kNoTile) {
        ptx::arrive_at(full);
      } else {
        ptx::arrive_expecting(full, kChunkBytes);
        ptx::load_box2(ptx::shared_address(shared.codes) + place.stage * kChunkBytes, &a.codes, chunk * kPanelRow,
                       static_cast<int32_t>(tile * kCodes), full);
      }
    }
  }
}

// ---- the warps that count the ones of codes ----

__device__ inline uint32_t ones_of_row(uint32_t panel, int row, int pieces) {
  uint32_t ones = 0;
#pragma unroll
  for (int piece = 0; piece < kPanelRow / 16; ++piece) {
    if (piece >= pieces) break;
    const ptx::Words4 words = ptx::load_shared_words4(panel + panel_offset(row, piece));
#pragma unroll
    for (int i = 0; i < 4; ++i) ones += ptx::count_bits(words.word[i]);
  }
  return ones;
}

// Where a warpgroup that multiplies looks for a code's ones: a thread has two neighbouring codes of each eight, and
// reads those of four eights at once.
__device__ inline int place_of_ones(int code) {
  const int eight = code / 8, pair = code % 8 / 2;
  return ((eight / 4 * 4 + pair) * 4 + eight % 4) * 2 + code % 2;
}

__device__ inline void count_ones(const Scan& s, HopperShared& shared, int thread) {
  constexpr int kTurns = (kCodes + kCounters - 1) / kCounters;
  RingPlace<kStages> place;
#pragma unroll 1
  for (;;) {
    uint32_t ones[kTurns] = {};
#pragma unroll 1
    for (int chunk = 0; chunk < s.chunks; ++chunk, place.advance()) {
      wait_full(shared.ring, place);
      if (chunk == 0 && shared.items[place.stage].tile == kNoTile) return;
      const uint32_t panel = ptx::shared_address(shared.codes) + place.stage * kChunkBytes;
      const int left = (static_cast<int>(s.width) - chunk * kPanelRow + 15) / 16;
      const bool last = chunk + 1 == s.chunks;
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) {
        const int code = turn * kCounters + thread;
        if (code >= kCodes) break;
        ones[turn] += ones_of_row(panel, code, left);
        if (!last) continue;
        shared.ones[place.stage][code] = static_cast<uint16_t>(ones[turn]);
        shared.half_ones[place.stage][place_of_ones(code)] = static_cast<uint16_t>(ones[turn] / 2);
      }
      ptx::sync_warp();
      if (last && thread % kWarp == 0) ptx::arrive_at(counted_at(shared, place));
      give_free(shared.ring, place, thread % kWarp);
    }
  }
}

// ---- the warpgroups that multiply ----

// The warpgroups issue their products in turns, so that one's filter runs beside the other's products; left alone, both
// would rather start together and wait together. Both take as many turns for a tile, needed or not.
constexpr uint32_t kTurn = 1;  // barriers by number, of each warpgroup
__device__ inline void begin_turn(int group) { ptx::sync_threads(kTurn + group, kGroups * kWarpgroup); }
__device__ inline void end_turn(int group) { ptx::arrive(kTurn + (group ^ 1), kGroups * kWarpgroup); }

// Products of 256 bits, and nothing between them: else the compiler puts fences there.
template <int kSteps>
__device__ inline void multiply_chunk(uint64_t left, uint64_t right, uint32_t add, uint32_t (&common)[kColumns][4]) {
  ptx::begin_products();
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    ptx::count_common_bits(common, left + 2 * step, right + 2 * step, step > 0 ? 1 : add);
  }
  ptx::commit_products();
}

// Ones in common of a row group and a tile, whose first chunk is at `place`. Chunks are freed but the last, if asked.
__device__ inline void multiply(const Scan& s, const HopperShared& shared, int row_group, RingPlace<kStages> place,
                                int group, bool frees, int lane, uint32_t (&common)[kColumns][4]) {
  RingPlace<kStages> before = place;
#pragma unroll 1
  for (int chunk = 0; chunk < s.chunks; ++chunk) {
    wait_full(shared.ring, place);
    if (chunk == 0) begin_turn(group);
    const uint64_t left = along_rows(query_panel(s, row_group, chunk));
    const uint64_t right = along_rows(ptx::shared_address(shared.codes) + place.stage * kChunkBytes);
    const int steps = (static_cast<int>(s.width) - chunk * kPanelRow + 31) / 32;
    const uint32_t add = chunk > 0 ? 1 : 0;
    if (steps >= 4) {
      multiply_chunk<4>(left, right, add, common);
    } else if (steps == 3) {
      multiply_chunk<3>(left, right, add, common);
    } else if (steps == 2) {
      multiply_chunk<2>(left, right, add, common);
    } else {
      multiply_chunk<1>(left, right, add, common);
    }
    if (chunk + 1 == s.chunks) end_turn(group);
    if (frees && chunk > 0) {
      ptx::wait_products<1>();
      give_free(shared.ring, before, lane);
    }
    before = place;
    place.advance();
  }
  ptx::wait_products<0>();
  ptx::settle(common);
}

__device__ inline void load_half_ones(const HopperShared& shared, const RingPlace<kStages>& place, int lane,
                                      uint32_t (&half_ones)[kColumns]) {
  const uint32_t from = ptx::shared_address(shared.half_ones[place.stage]) + lane % 4 * 16;
#pragma unroll
  for (int n = 0; n < kColumns; n += 4) {
    const ptx::Words4 words = ptx::load_shared_words4(from + n / 4 * 64);
#pragma unroll
    for (int i = 0; i < 4; ++i) half_ones[n + i] = words.word[i];
  }
}

// Bit e: some code of the e-th eighth of the tile may be near one of the warp's rows.
__device__ inline uint32_t find_near(const uint32_t (&common)[kColumns][4], const uint32_t (&half_ones)[kColumns],
                                     const int32_t* starts, uint32_t upper_half, int lane) {
  constexpr uint32_t kReached = 0x80008000u;
  const uint32_t start[2] = {static_cast<uint32_t>(starts[lane / 4]), static_cast<uint32_t>(starts[lane / 4 + 8])};
  uint32_t reached[kEighths], any = 0;
#pragma unroll
  for (int eighth = 0; eighth < kEighths; ++eighth) {
    reached[eighth] = 0;
#pragma unroll
    for (int n = eighth * kColumns / kEighths; n < (eighth + 1) * kColumns / kEighths; ++n) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        reached[eighth] |= common[n][2 * r] + common[n][2 * r + 1] * upper_half - half_ones[n] + start[r];
      }
    }
    any |= reached[eighth];
  }
  if (ptx::vote_ballot((any & kReached) != 0) == 0) return 0;
  uint32_t near = 0;
#pragma unroll
  for (int eighth = 0; eighth < kEighths; ++eighth) {
    near |= static_cast<uint32_t>(ptx::vote_ballot((reached[eighth] & kReached) != 0) != 0) << eighth;
  }
  return near;
}

// A warp's sixteen rows and an eighth of a tile, a lane a code.
__device__ inline bool visit_eighth(const Scan& s, const HopperShared& shared, const Share& w, uint32_t tile, int stage,
                                    int eighth, uint32_t* pairs, const uint32_t (&common)[kColumns][4]) {
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
    if (n / (kColumns / kEighths) != eighth) continue;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      pairs[(w.lane / 4 + 8 * r) * kPairPitch + n % (kColumns / kEighths) * 4 + w.lane % 4] =
          common[n][2 * r] | common[n][2 * r + 1] << 16;
    }
  }
  ptx::sync_warp();
  const int code = eighth * kEighthCodes + w.lane;
  const int64_t index = int64_t{tile} * kCodes + code;
  const bool present = is_present(s, index);
  const int32_t code_ones = shared.ones[stage][code];
  const int32_t* const limits = numbers(s, 0) + w.row;
  const auto twice_common = [&](int row) {
    return static_cast<int32_t>(pairs[row * kPairPitch + w.lane / 2] >> w.lane % 2 * 16 & 0xffff) * 2;
  };
  uint32_t rows = 0;
#pragma unroll
  for (int row = 0; row < kWarpRows; ++row) {
    const bool near = present && twice_common(row) - code_ones >= limits[row];
    rows |= static_cast<uint32_t>(ptx::vote_ballot(near) != 0) << row;
  }
  bool any = false;
#pragma unroll 1
  for (; rows != 0; rows &= rows - 1) {
    const int row = static_cast<int>(ptx::highest_bit(rows & (0u - rows)));
    any |= visit(s, w, row, index, present, numbers(s, 1)[w.row + row] + code_ones - twice_common(row));
  }
  ptx::sync_warp();  // the pairs were read
  return any;
}

__device__ inline void multiply_tiles(const HopperScan& a, HopperShared& shared, const Share& block, int group,
                                      int warp) {
  const Scan& s = a.scan;
  const int lane = block.lane;
  const bool frees = row_groups_of(s) <= kGroups;  // of several row groups, the next reads the chunks again
  uint32_t common[kColumns][4], half_ones[kColumns];
  RingPlace<kStages> place;
  if (group != 0) end_turn(group);  // the first turn is the first one's
#pragma unroll 1
  for (;;) {
    wait_full(shared.ring, place);
    const Item item = shared.items[place.stage];
    if (item.tile == kNoTile) break;
    RingPlace<kStages> last = place;
    for (int chunk = 1; chunk < s.chunks; ++chunk) last.advance();
    bool counted = false;
#pragma unroll 1
    for (int rows = group; rows - group < row_groups_of(s); rows += kGroups) {
      const uint32_t marks = rows < row_groups_of(s) ? item.near >> kGroupWarps * rows : 0;
      if ((marks & ((1 << kGroupWarps) - 1)) == 0) {
        begin_turn(group);
        end_turn(group);
        continue;
      }
      multiply(s, shared, rows, place, group, frees, lane, common);
      if (!counted) {
        wait_at(counted_at(shared, last), last.parity);
        load_half_ones(shared, last, lane, half_ones);
        counted = true;
      }
      if ((marks >> warp & 1) == 0) continue;
      const int sharer = rows * kGroupWarps + warp, row = sharer * kWarpRows;
      const Share share = {lane, row, block.group, block.span, block.first_query + row};
      bool any = false;
      uint32_t near = find_near(common, half_ones, numbers(s, 2) + row, a.upper_half, lane);
#pragma unroll 1
      for (; near != 0; near &= near - 1) {
        const int eighth = static_cast<int>(ptx::highest_bit(near & (0u - near)));
        any |= visit_eighth(s, shared, share, item.tile, last.stage, eighth, shared.pairs[group * kGroupWarps + warp],
                            common);
      }
      if (s.near_tiles != nullptr && s.mode != ScanMode::kWrite && lane == 0) {
        s.near_tiles[mark_at(s, block.group, sharer, item.tile)] = any;
      }
    }
    ptx::sync_warp();
#pragma unroll 1
    for (int chunk = 0; chunk < s.chunks; ++chunk, place.advance()) {
      if (frees && counted && chunk + 1 < s.chunks) continue;  // it was freed
      // of a tile passed over, it may not be full yet, nor free of the tile before
      wait_full(shared.ring, place);
      give_free(shared.ring, place, lane);
    }
  }
  if (group == 0) begin_turn(group);  // nothing is left at the barrier
}

// What the warp's rows have counted.
__device__ inline void write_counts(const Scan& s, const Share& block, int queries, int group, int warp) {
  ptx::sync_warp();
  for (int rows = group; rows < row_groups_of(s); rows += kGroups) {
    const int row = (rows * kGroupWarps + warp) * kWarpRows + block.lane / 2;
    if (row >= queries) continue;
    s.counts[((int64_t{block.first_query} + row) * s.spans + block.span) * 2 + block.lane % 2] =
        shared_at<uint32_t>(s.at_counts)[2 * row + block.lane % 2];
  }
}

__global__ void __launch_bounds__(kThreads, 1) hamming_hopper_kernel(const __grid_constant__ HopperScan a) {
  const Scan& s = a.scan;
  auto& shared = shared_memory<HopperShared>();
  const int thread = static_cast<int>(threadIdx.x);
  // the same for a warp: from a shuffle the compiler knows it, and keeps addresses of tiles in uniform registers
  const auto warp = static_cast<int>(ptx::shuffle(static_cast<uint32_t>(thread / kWarp), 0));
  // groups vary fastest: blocks that run together read the same codes
  const uint32_t group = blockIdx.x % s.groups, span = blockIdx.x / s.groups;
  const uint32_t first_query = group * s.queries_a_block;
  const int64_t left = s.query_count - int64_t{first_query};
  const int queries = static_cast<int>(left < 0 ? 0 : left < s.queries_a_block ? left : s.queries_a_block);
  if (thread == 0) {
    ptx::prefetch_map(&a.codes);
    begin_barriers(shared);
  }
  lay_numbers(s, first_query, queries, thread);
  lay_queries(s, first_query, queries, thread);
  ptx::sync_block();

  const Share block = {thread % kWarp, 0, group, span, first_query};
  const int warpgroup = warp / kGroupWarps;
  if (warpgroup == 0) {
    ptx::keep_registers<56>();
    if (warp == 0) {
      copy_tiles(a, shared, block);
    } else {
      count_ones(s, shared, thread - kWarp);
    }
  } else {
    ptx::take_registers<224>();
    multiply_tiles(a, shared, block, warpgroup - 1, warp % kGroupWarps);
    if (s.mode == ScanMode::kCount) write_counts(s, block, queries, warpgroup - 1, warp % kGroupWarps);
  }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

bool plan_scan_on_hopper(const Tensor& codes, Scan& s) {
  if (!is_hopper(codes)) return false;
  // what the copy engine takes; coordinates of codes have 31 bits
  const bool is_copied = s.access == 16 && (s.count == 1 || s.stride >= s.width) && s.count > 0 && s.count >> 31 == 0;
  if (!is_copied || s.query_count <= kFewQueries || s.width == 0 || s.width > kMostChunks * kPanelRow) return false;
  s.on_hopper = true;
  s.row_bytes = kPanelRow;
  s.chunks = static_cast<int32_t>(ceil_div(s.width, kPanelRow));
  s.tile_codes = kCodes;
  s.tiles = ceil_div(s.count, kCodes);

  constexpr int64_t kMostShared = 227 * 1024, kNumbers = kGroupRows * (3 + 2) * 4;
  s.at_queries = static_cast<int32_t>(ceil_div(sizeof(HopperShared), 1024) * 1024);
  const int64_t fitting = (kMostShared - s.at_queries) / (s.chunks * int64_t{kQueryPanel} + kNumbers);
  // as many as may share a tile, both warpgroups the same; fewer where there would be fewer blocks than can run
  int64_t row_groups = std::min<int64_t>(fitting / kGroups * kGroups, kMostRowGroups);
  const int64_t resident = multiprocessors(codes);
  while (row_groups > kGroups && ceil_div(s.query_count, kGroupRows * row_groups) * s.tiles < resident) {
    row_groups -= kGroups;
  }
  s.groups = static_cast<int32_t>(ceil_div(s.query_count, kGroupRows * row_groups));
  s.queries_a_block = static_cast<int32_t>(ceil_div(s.query_count, s.groups));
  row_groups = ceil_div(s.queries_a_block, kGroupRows);
  s.sharers = static_cast<int32_t>(row_groups * kGroupWarps);

  s.at_limits = s.at_queries + static_cast<int32_t>(row_groups * s.chunks * kQueryPanel);
  s.at_counts = s.at_limits + static_cast<int32_t>(row_groups * kGroupRows * 3 * 4);
  s.shared_bytes = s.at_counts + static_cast<int32_t>(row_groups * kGroupRows * 2 * 4);
  return true;
}

// A block a multiprocessor and wave: of one wave and up to four, that which leaves the fewest idle.
void visit_every_on_hopper(Scan& s, int64_t multiprocessors) {
  double best = 0;
  for (int64_t waves = 1; waves <= 4; ++waves) {
    const int64_t most = std::max<int64_t>(s.visited, 1);
    const int64_t spans = std::clamp<int64_t>(multiprocessors * waves / s.groups, 1, most), blocks = spans * s.groups;
    const double share =
        static_cast<double>(blocks) / static_cast<double>(ceil_div(blocks, multiprocessors) * multiprocessors);
    if (share <= best + 0.02) continue;
    best = share;
    s.spans = spans;
  }
}

void run_scan_on_hopper(const char* op, const Scan& s, cudaStream_t stream) {
  // of a single code the stride counts for nothing
  const int64_t stride = s.count > 1 ? s.stride : ceil_div(s.width, 16) * 16;
  const TensorMap map = tensor_map(op, s.codes,
                                   {TensorShape::kByte,
                                    2,
                                    {static_cast<uint64_t>(s.width), static_cast<uint64_t>(s.count)},
                                    {1, static_cast<uint64_t>(stride)},
                                    {kPanelRow, kCodes},
                                    true});
  launch(op, hamming_hopper_kernel, dim3(static_cast<unsigned>(s.spans * s.groups)), dim3(kThreads), s.shared_bytes,
         stream, {map, s, 0x10000u});
}

}  // namespace embedding_kernels::cuda

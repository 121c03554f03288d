// What the kernels of varlen_attention and of its gradient share: who pairs with whom, tiles in shared memory,
// products, scores.
//
// Rows are owned in slots: each sequence is cut into slots of the rows of one warp, so that a block of four warps holds
// one long text's rows or those of several short ones. The block walks the rows of the other side, sequence by sequence
// in chunks that belong to one sequence each; a warp skips the chunks that none of its rows pairs with. So short texts
// share a block's tiles, and no product ever takes in another sequence's rows.
#pragma once

#include "floats.cuh"
#include "launch.cuh"

namespace embedding_kernels::cuda {

constexpr int kAttentionWarps = 4;
constexpr int kAttentionThreads = kAttentionWarps * kWarp;
constexpr int kStagedBiases = 512;  // entries of a head's table that a block keeps beside its tiles
constexpr int32_t kNoLimit = 0x7fffffff;
constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.69314718055994531f;

// One side of the pairs, queries or keys.
struct AttentionSide {
  const int32_t* offsets;
  const int32_t* positions;  // or null: from 0 in each sequence
  int32_t total;
};

// Which queries and keys pair, and how their scores are formed; scores are in base 2.
struct AttentionRule {
  AttentionSide queries, keys;
  const int32_t* seqused_k;  // or null
  int32_t sequences;
  int32_t before, after;  // a query sees keys from `before` before it to `after` after it
  int32_t group;          // heads of queries for a head of keys
  const float* table;     // [heads of queries, 2 reach + 1], or null
  int32_t reach;
  float factor;  // of a product: into the soft cap where there is one, else to base 2
  float cap;     // the soft cap in base 2; 0 for none
  bool formed;   // a score is more than a product times a positive factor
};

// Rows of all heads: row t of head h begins at data + t * row_stride + h * head_stride; 16 bytes at a time.
template <class T>
struct HeadRows {
  const T* data;
  int64_t row_stride, head_stride;
  int32_t dim;
};

__device__ inline int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }
__device__ inline int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }
__device__ inline int64_t clamped(int64_t value, int64_t least, int64_t most) {
  return value < least ? least : value > most ? most : value;
}

// ---- slots ----

// A sequence of n rows from row a on gets a slot more than a / kRows to (a + n) / kRows counts, which is enough
// wherever it begins; so its slots follow from its own offset, and at most one of them is empty.
template <int kRows>
__device__ inline int32_t first_slot(const AttentionSide& side, int32_t sequence) {
  return smaller(larger(side.offsets[sequence], 0), side.total) / kRows + sequence;
}

// The last of `count` sequences that `reached` holds of, and 0 for none; it holds of none past one that it does not
// hold of. A whole warp looks at 32 sequences at a time.
template <class Reached>
__device__ inline int32_t last_reached(int32_t count, int lane, const Reached& reached) {
  int32_t low = 0;
  while (count > 1) {
    const int32_t step = (count + kWarp - 1) / kWarp, place = lane * step;
    const bool here = place < count && reached(low + smaller(place, count - 1));
    const auto hits = static_cast<int32_t>(ptx::count_bits(ptx::vote_ballot(here)));
    const int32_t passed = larger(hits - 1, 0) * step;
    low += passed;
    count = smaller(step, count - passed);
  }
  return low;
}

// The rows of a slot, all of one sequence, and what they may pair with on the other side.
struct OwnRows {
  int32_t sequence;
  int32_t first, count;           // rows
  int32_t known;                  // of them so many pair at all; the rest are keys past seqused_k
  int32_t start;                  // first row of the sequence
  int32_t lowest, highest;        // positions of the known rows
  int32_t other_start;            // first row of the sequence on the other side
  int32_t other_end;              // past its last row that counts
  int32_t walk_first, walk_last;  // rows of the other side that may pair
};

// Distances of pairs as a row sees them: other position − own.
struct Window {
  int32_t before, after;
};

template <bool kOwnKeys>
__device__ inline Window window_of(const AttentionRule& rule) {
  return kOwnKeys ? Window{rule.after, rule.before} : Window{rule.before, rule.after};
}

__device__ inline int32_t position_of(const AttentionSide& side, int32_t start, int32_t row) {
  return side.positions == nullptr ? row - start : larger(side.positions[row], 0);
}

// The positions of the rows and what of the other side these may pair with; a whole warp comes.
template <int kRows, bool kOwnKeys>
__device__ inline void find_partners(const AttentionRule& rule, int lane, OwnRows& own) {
  const AttentionSide& side = kOwnKeys ? rule.keys : rule.queries;
  const AttentionSide& other = kOwnKeys ? rule.queries : rule.keys;
  own.lowest = own.highest = 0;
  own.walk_first = own.walk_last = own.other_start;
  if (own.known == 0) return;  // the whole warp
  if (side.positions == nullptr) {
    own.lowest = own.first - own.start;
    own.highest = own.lowest + own.known - 1;
  } else {
    int32_t lowest = kNoLimit, highest = 0;
#pragma unroll
    for (int row = 0; row < kRows; row += kWarp) {
      const int32_t at = position_of(side, own.start, own.first + smaller(row + lane, own.known - 1));
      lowest = smaller(lowest, at), highest = larger(highest, at);
    }
    own.lowest = static_cast<int32_t>(ptx::warp_min(static_cast<uint32_t>(lowest)));
    own.highest = static_cast<int32_t>(~ptx::warp_min(~static_cast<uint32_t>(highest)));
  }
  own.walk_last = own.other_end;
  if (other.positions == nullptr) {
    const Window window = window_of<kOwnKeys>(rule);
    const int64_t length = own.other_end - own.other_start;
    own.walk_first += static_cast<int32_t>(clamped(static_cast<int64_t>(own.lowest) - window.before, 0, length));
    own.walk_last = own.other_start +
                    static_cast<int32_t>(clamped(static_cast<int64_t>(own.highest) + window.after + 1, 0, length));
  }
}

template <int kRows, bool kOwnKeys>
__device__ inline OwnRows own_rows(const AttentionRule& rule, int32_t slot, int lane) {
  const AttentionSide& side = kOwnKeys ? rule.keys : rule.queries;
  const AttentionSide& other = kOwnKeys ? rule.queries : rule.keys;
  OwnRows own;
  own.sequence = last_reached(rule.sequences, lane, [&](int32_t s) { return first_slot<kRows>(side, s) <= slot; });
  own.start = smaller(larger(side.offsets[own.sequence], 0), side.total);
  const int32_t end = smaller(larger(side.offsets[own.sequence + 1], own.start), side.total);
  const int64_t first = own.start + (static_cast<int64_t>(slot) - first_slot<kRows>(side, own.sequence)) * kRows;
  // slots past the last sequence's are empty, and so are those before the first where offsets do not begin with 0
  own.count = first < own.start || first >= end ? 0 : smaller(static_cast<int32_t>(end - first), kRows);
  own.first = own.count == 0 ? own.start : static_cast<int32_t>(first);
  own.known = own.count;
  own.other_start = smaller(larger(other.offsets[own.sequence], 0), other.total);
  own.other_end = smaller(larger(other.offsets[own.sequence + 1], own.other_start), other.total);
  if (rule.seqused_k != nullptr) {
    const int32_t used = larger(rule.seqused_k[own.sequence], 0);
    if (kOwnKeys) {
      own.known = static_cast<int32_t>(clamped(static_cast<int64_t>(own.start) + used - own.first, 0, own.count));
    } else {
      own.other_end = own.other_start + smaller(own.other_end - own.other_start, used);
    }
  }
  find_partners<kRows, kOwnKeys>(rule, lane, own);
  return own;
}

// ---- the walk over the other side ----

// Rows of one sequence that a block visits, and where that sequence starts and ends.
struct Segment {
  int32_t first, last, start, end;
};
struct Walk {
  Segment segments[kAttentionWarps];
  int32_t sequences[kAttentionWarps];
  int32_t segment_of[kAttentionWarps];  // of each warp; −1 for none
  int32_t count;
};

// Where the block stands: a head of the group, a segment, a row.
struct Cursor {
  int32_t member, segment, row;
};

// The segments of a block from its warps' ranges; all threads call it.
__device__ inline void plan_walk(Walk& walk, const OwnRows& own, int warp, int lane) {
  if (lane == 0) {
    walk.segments[warp] = {own.walk_first, own.walk_last, own.other_start, own.other_end};
    walk.sequences[warp] = own.sequence;
  }
  ptx::sync_block();
  if (threadIdx.x == 0) {
    int32_t count = 0;
    for (int w = 0; w < kAttentionWarps; ++w) {
      const Segment range = walk.segments[w];
      const int32_t sequence = walk.sequences[w];
      const bool some = range.first < range.last, joined = some && count > 0 && walk.sequences[count - 1] == sequence;
      if (joined) {
        Segment& segment = walk.segments[count - 1];
        segment.first = smaller(segment.first, range.first);
        segment.last = larger(segment.last, range.last);
      } else if (some) {
        walk.segments[count] = range;
        walk.sequences[count] = sequence;
        ++count;
      }
      walk.segment_of[w] = some ? count - 1 : -1;
    }
    walk.count = count;
  }
  ptx::sync_block();
}

__device__ inline Cursor walk_start(const Walk& walk, int32_t members) {
  return walk.count == 0 ? Cursor{members, 0, 0} : Cursor{0, 0, walk.segments[0].first};
}
template <int kChunk>
__device__ inline void advance(const Walk& walk, Cursor& cursor) {
  cursor.row += kChunk;
  if (cursor.row < walk.segments[cursor.segment].last) return;
  if (++cursor.segment == walk.count) {
    cursor.segment = 0;
    ++cursor.member;
  }
  cursor.row = walk.segments[cursor.segment].first;
}

// ---- tiles in shared memory ----

// A tile holds rows of D values; the 16-byte pieces of a row are permuted by its number, so that eight rows' pieces of
// one column lie in eight different groups of banks.
template <int D>
__device__ inline uint32_t piece_offset(int row, int piece) {
  return static_cast<uint32_t>(row * D * 2 + ((piece ^ (row & 7)) << 4));
}
template <int D>
__device__ inline int element_index(int row, int column) {
  return row * D + (((column >> 3) ^ (row & 7)) << 3) + (column & 7);
}

// Products take columns 32 at a time; columns past a head's dimensions are zeros up to there.
__device__ inline bool has_columns(int group, int32_t dim) { return group == 0 || 32 * group < dim; }

// Starts copies of `kRows` rows of one head into a tile, those from `valid` on as zeros. Thread `thread` of kThreads.
template <class T, int D, int kRows, int kThreads>
__device__ inline void copy_rows(uint32_t tile, const HeadRows<T>& rows, int64_t head, int32_t first, int32_t valid,
                                 int thread) {
  constexpr int kPieces = D / 8, kRowsAtOnce = kThreads / kPieces;
  static_assert(kThreads % kPieces == 0 && kRows % kRowsAtOnce == 0);
  const int piece = thread % kPieces;
  if (8 * piece >= (rows.dim + 31) / 32 * 32) return;
  const T* const base = rows.data + head * rows.head_stride;
  const bool inside = 8 * piece < rows.dim;
#pragma unroll
  for (int i = 0; i < kRows / kRowsAtOnce; ++i) {
    const int row = i * kRowsAtOnce + thread / kPieces;
    const bool there = inside && row < valid;
    const T* const from = there ? base + static_cast<int64_t>(first + row) * rows.row_stride + 8 * piece : rows.data;
    ptx::copy16_async(tile + piece_offset<D>(row, piece), from, there ? 16 : 0);
  }
}

// ---- products ----

template <class T>
__device__ inline void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ inline void multiply<BFloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  ptx::multiply_bfloat16(c, a, b0, b1);
}
template <>
__device__ inline void multiply<Float16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  ptx::multiply_float16(c, a, b0, b1);
}

// Rows 0 to 15 of a tile, columns 16 step to 16 step + 15, as the left factor.
template <int D>
__device__ inline void load_left(uint32_t tile, int step, int lane, uint32_t (&a)[4]) {
  ptx::load_matrices4(tile + piece_offset<D>(lane % 16, 2 * step + lane / 16), a);
}
// The same rows and columns, turned over, as the right factor: each row of the tile is a column of it. The first two
// words are of rows 0 to 7, the others of rows 8 to 15.
template <int D>
__device__ inline void load_right_turned(uint32_t tile, int step, int lane, uint32_t (&b)[4]) {
  ptx::load_matrices4(tile + piece_offset<D>(lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2), b);
}
// As the right factor as they stand. The first two words are of the first eight columns, the others of the rest.
template <int D>
__device__ inline void load_right(uint32_t tile, int step, int lane, uint32_t (&b)[4]) {
  ptx::load_matrices4_transposed(tile + piece_offset<D>(lane % 16, 2 * step + lane / 16), b);
}

// Sixteen columns of a result as a left factor.
template <class T>
__device__ inline void left_of(const float (&low)[4], const float (&high)[4], uint32_t (&a)[4]) {
  a[0] = pack_pair<T>(low[0], low[1]);
  a[1] = pack_pair<T>(low[2], low[3]);
  a[2] = pack_pair<T>(high[0], high[1]);
  a[3] = pack_pair<T>(high[2], high[3]);
}

// ---- scores ----

// A warp's view of a chunk of the other side. Lane l of a fragment holds columns 2 (l % 4) and the next of every eight
// (n), in its rows l / 4 and that plus 8; everything here counts from the lane's first column.
struct Columns {
  const int32_t* positions;  // of the chunk, or null
  int32_t coordinate;        // position of the first column where positions are null
  int32_t valid;             // columns past it are of no row that counts

  __device__ int32_t at(int n, int i) const {
    return positions == nullptr ? coordinate + 8 * n + i : positions[8 * n + i];
  }
  __device__ bool inside(int n, int i) const { return 8 * n + i < valid; }
};

__device__ inline Columns columns_of(const int32_t* positions, int32_t coordinate, int32_t valid, int lane) {
  const int first = lane % 4 * 2;
  return {positions == nullptr ? nullptr : positions + first, coordinate + first, valid - first};
}

// Whether every row of the warp pairs with all kChunk rows of a chunk.
template <int kChunk>
__device__ inline bool all_pair(const OwnRows& own, const Window& window, bool positions, int32_t coordinate,
                                int32_t valid) {
  if (valid < kChunk) return false;
  if (window.before == kNoLimit && window.after == kNoLimit) return true;
  return !positions && static_cast<int64_t>(coordinate) - own.highest >= -static_cast<int64_t>(window.before) &&
         static_cast<int64_t>(coordinate) + kChunk - 1 - own.lowest <= window.after;
}

__device__ inline int32_t difference(int32_t a, int32_t b) {
  return static_cast<int32_t>(static_cast<uint32_t>(a) - static_cast<uint32_t>(b));
}
__device__ inline bool pairs(const Columns& columns, int n, int i, int32_t at, const Window& window) {
  const int32_t apart = difference(columns.at(n, i), at);
  return columns.inside(n, i) && apart >= -window.before && apart <= window.after;
}

// To a few units in the last place; the plain formula would lose small values to cancellation.
template <bool kAtOnce>
__device__ inline float tanh_of(float x) {
  const float square = x * x;
  const float series =
      x * (1 + square * (-1.0f / 3 + square * (2.0f / 15 + square * (-17.0f / 315 + square * (62.0f / 2835)))));
  const float decay = ptx::exp2_near(fabsf(x) * (-2 * kLog2E));
  // a division has a branch for what is not a normal number; many without it are under way at once
  const float far = kAtOnce ? (1 - decay) * ptx::reciprocal_near(1 + decay) : (1 - decay) / (1 + decay);
  return square < 0.0625f ? series : x < 0 ? -far : far;
}

// This head's table: staged beside the tiles where it fits, which all threads do together before a barrier.
__device__ inline const float* stage_table(const AttentionRule& rule, int64_t head, float* staged) {
  if (rule.table == nullptr) return nullptr;
  const int64_t entries = 2 * static_cast<int64_t>(rule.reach) + 1;
  const float* const table = rule.table + head * entries;
  if (entries > kStagedBiases) return table + rule.reach;
  for (int i = static_cast<int>(threadIdx.x); i < entries; i += kAttentionThreads) staged[i] = table[i];
  return staged + rule.reach;
}

// Scores of products, by key − query from the middle of the table; `at` are the positions of the lane's rows. Where
// kSlopes, the products' own gradients are the scores' times `slopes`.
template <bool kOwnKeys, bool kSlopes, int kTiles, int kColumns>
__device__ inline void form_scores(const AttentionRule& rule, const float* table, const Columns& columns,
                                   const int32_t (&at)[2 * kTiles], float (&scores)[kTiles][kColumns][4],
                                   float (&slopes)[kTiles][kColumns][4]) {
  constexpr bool kAtOnce = !kSlopes && kTiles == 1;  // where registers suffice for many
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[m][n][i] *= rule.factor;
    }
  }
  if (rule.cap != 0) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float capped = tanh_of<kAtOnce>(scores[m][n][i]);
          if constexpr (kSlopes) slopes[m][n][i] = 1 - capped * capped;
          scores[m][n][i] = capped * rule.cap;
        }
      }
    }
  }
  if (table == nullptr) return;
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int32_t apart = difference(columns.at(n, i % 2), at[2 * m + i / 2]);
        const int32_t place = smaller(larger(kOwnKeys ? -apart : apart, -rule.reach), rule.reach);
        scores[m][n][i] = ptx::fused_multiply_add(table[place], kLog2E, scores[m][n][i]);
      }
    }
  }
}

}  // namespace embedding_kernels::cuda

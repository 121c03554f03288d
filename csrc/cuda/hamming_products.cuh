// For hamming_scan.cu only: distances of a warp's queries to a tile, by XOR or as a product of bits.
//
// Each has, for the kernel: a constructor, with a barrier of the block; clear(), add() for each chunk of a tile, and
// finish(), which visits the queries that are near one of its codes and says whether there were any.
#pragma once

#include "hamming_warp.cuh"

namespace embedding_kernels::cuda {
namespace {

struct FewQueries {
  static constexpr bool kOneChunk = false, kShared = false;
  static constexpr int kThreads = kParts * kWarp, kBlocks = 3;

  int32_t distances[kFewQueries];

  __device__ FewQueries(const Scan&, const Warp&) { ptx::sync_block(); }

  __device__ void clear() {
#pragma unroll
    for (int q = 0; q < kFewQueries; ++q) distances[q] = 0;
  }

  __device__ void add(const Scan& s, const Warp& w, uint32_t stage, int chunk) {
    const int64_t pitch = static_cast<int64_t>(s.chunks) * s.row_bytes;
    const uint8_t* query = s.queries + w.first_query * pitch + static_cast<int64_t>(chunk) * s.row_bytes;
#pragma unroll
    for (int piece = 0; piece < kMostPieces; ++piece) {
      if (piece * 16 >= s.row_bytes) break;
      const ptx::Words4 code = ptx::load_shared_words4(stage + piece_place(w.lane, piece, s.row_bytes));
#pragma unroll
      for (int q = 0; q < kFewQueries; ++q) {
        if (q >= w.queries) break;
        const ptx::Words4 asked = ptx::load_constant_words4(query + q * pitch + piece * 16);
#pragma unroll
        for (int i = 0; i < 4; ++i) distances[q] += ptx::count_bits(code.word[i] ^ asked.word[i]);
      }
    }
  }

  __device__ bool finish(const Scan& s, const Warp& w, uint32_t tile, uint32_t) {
    const int64_t index = int64_t{tile} * kTileCodes + w.lane;
    bool any = false;
#pragma unroll
    for (int q = 0; q < kFewQueries; ++q) {
      if (q >= w.queries) break;
      const bool near = s.bounds == nullptr || distances[q] < s.bounds[w.first_query + q] + s.ties;
      if (ptx::vote_ballot(near) != 0) any |= visit(s, w, q, index, is_present(s, index), distances[q]);
    }
    return any;
  }
};

// What both products of bits share: a warp's rows in shared memory, all ones and then its queries, and their visits.
struct QueryRows {
  static constexpr int kThreads = kMostSharers * kParts * kWarp, kBlocks = 1;
  static constexpr int kFragments = kProductRows / 16, kSteps = kMostPieces / 2, kColumns = kTileCodes / 8;

  uint32_t rows;  // shared address

  __device__ QueryRows(const Scan& s, const Warp& w) {
    const int row_count = 16 * s.row_tiles;
    rows = ptx::shared_address(shared_at<uint8_t>(s.at_queries + w.sharer * row_count * s.chunks * s.row_bytes));
    lay_rows(s, w, row_count);
    lay_numbers(s, w);
    ptx::sync_block();
  }

  __device__ void lay_rows(const Scan& s, const Warp& w, int row_count) {
    const int pieces = s.row_bytes / 16, pitch = s.chunks * s.row_bytes;
    for (int item = w.part * kWarp + w.lane; item < row_count * s.chunks * pieces; item += kParts * kWarp) {
      const int chunk = item / (row_count * pieces), row = item / pieces % row_count, piece = item % pieces;
      ptx::Words4 words = {};
      if (row == 0) {
#pragma unroll
        for (int i = 0; i < 4; ++i) words.word[i] = 0xffffffffu;
      } else if (row <= w.queries) {
        const uint8_t* const query = s.queries + (int64_t{w.first_query} + row - 1) * pitch;
        words = ptx::load_constant_words4(query + chunk * s.row_bytes + piece * 16);
      }
      ptx::store_shared_words4(rows + chunk * row_count * s.row_bytes + piece_place(row, piece, s.row_bytes), words);
    }
  }

  // [2, kProductRows]: a code is near where twice the ones in common, less those of the code, reach the first; then the
  // ones of the queries.
  static __device__ int32_t* numbers(const Scan& s, const Warp& w) {
    return shared_at<int32_t>(s.at_limits) + w.sharer * 2 * kProductRows;
  }

  static __device__ void lay_numbers(const Scan& s, const Warp& w) {
    const int row = w.part * kWarp + w.lane;
    if (row >= kProductRows) return;
    const bool is_query = row > 0 && row <= w.queries;
    const int64_t q = int64_t{w.first_query} + row - 1;
    const int32_t own = is_query ? s.query_ones[q] : 0;
    numbers(s, w)[row] = !is_query ? kNever : s.bounds == nullptr ? kAlways : own - (s.bounds[q] - 1 + s.ties);
    numbers(s, w)[kProductRows + row] = own;
  }

  // Rows 16 m to 16 m + 15, bits 256 step to 256 step + 255 of a chunk.
  __device__ void load_queries(const Scan& s, const Warp& w, int chunk, int m, int step,
                               uint32_t (&fragment)[4]) const {
    const int row = 16 * m + w.lane % 16, piece = 2 * step + w.lane / 16;
    ptx::load_matrices4(rows + chunk * 16 * s.row_tiles * s.row_bytes + piece_place(row, piece, s.row_bytes), fragment);
  }

  // The same bits of sixteen codes: eight and eight.
  static __device__ void load_codes(const Scan& s, const Warp& w, uint32_t stage, int half, int step,
                                    uint32_t (&fragments)[4]) {
    const int row = 16 * half + w.lane / 16 * 8 + w.lane % 8, piece = 2 * step + w.lane / 8 % 2;
    ptx::load_matrices4(stage + piece_place(row, piece, s.row_bytes), fragments);
  }

  // The ones of this lane's two codes in each eight, of products whose first row is that of ones.
  template <int kEights>
  static __device__ void ones_of_codes(const Warp& w, const uint32_t (&common)[kEights][4],
                                       int32_t (&ones)[kEights][2]) {
#pragma unroll
    for (int n = 0; n < kEights; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) ones[n][i] = ptx::shuffle(common[n][i], w.lane % 4);
    }
  }

  // Whether one of 16 rows, whose limits are given for this lane's two, is near one of the codes; the same in all
  // lanes.
  static __device__ bool is_near(const uint32_t (&common)[kColumns][4], const int32_t (&ones)[kColumns][2],
                                 int32_t upper, int32_t lower) {
    bool near = false;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        near |= static_cast<int32_t>(2 * common[n][i]) - ones[n][i] >= upper;
        near |= static_cast<int32_t>(2 * common[n][2 + i]) - ones[n][i] >= lower;
      }
    }
    return ptx::vote_ballot(near) != 0;
  }

  // Rows 16 m to 16 m + 15, one after the other, a lane a code.
  static __device__ bool visit_rows(const Scan& s, const Warp& w, uint32_t tile, int m,
                                    const uint32_t (&common)[kColumns][4], const int32_t (&code_ones)[kColumns][2]) {
    int32_t* const distances =
        shared_at<int32_t>(s.at_distances) + (w.sharer * kParts + w.part) * kDistanceRows * kDistancePitch;
    const int32_t* const ones = numbers(s, w) + kProductRows + 16 * m;
    const int row = w.lane / 4;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        int32_t* const to = distances + row * kDistancePitch + 8 * n + w.lane % 4 * 2 + i;
        to[0] = ones[row] + code_ones[n][i] - static_cast<int32_t>(2 * common[n][i]);
        to[8 * kDistancePitch] = ones[row + 8] + code_ones[n][i] - static_cast<int32_t>(2 * common[n][2 + i]);
      }
    }
    ptx::sync_warp();
    const int64_t index = int64_t{tile} * kTileCodes + w.lane;
    const bool present = is_present(s, index);
    bool any = false;
    const int first = m == 0 ? 1 : 0, last = w.queries - 16 * m < 15 ? w.queries - 16 * m : 15;
    for (int r = first; r <= last; ++r) {
      any |= visit(s, w, 16 * m + r - 1, index, present, distances[r * kDistancePitch + w.lane]);
    }
    ptx::sync_warp();
    return any;
  }
};

// Codes of one chunk: the queries stay in registers, and the products of sixteen codes at a time beside them. Products
// begin not with zero but with what makes a code near where they reach half its ones: one comparison a distance. Halves
// are rounded so that a code up to two too far may be taken for near; visits look again.
template <int kRowTiles>
struct ProductOfBits : QueryRows {
  static constexpr bool kOneChunk = true, kShared = true;
  static constexpr int kEights = kColumns / 2;

  uint32_t queries[kRowTiles][kSteps][4];

  __device__ ProductOfBits(const Scan& s, const Warp& w) : QueryRows(s, w) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        if (step * 32 < s.row_bytes) load_queries(s, w, 0, m, step, queries[m][step]);
      }
    }
  }

  __device__ void clear() {}
  __device__ void add(const Scan&, const Warp&, uint32_t, int) {}

  __device__ bool finish(const Scan& s, const Warp& w, uint32_t tile, uint32_t stage) {
    uint32_t near_fragments = 0;
#pragma unroll 1  // products of both halves at once would not fit into registers
    for (int half = 0; half < 2; ++half) near_fragments |= find_near(s, w, stage, half);
    if (ptx::vote_ballot(near_fragments != 0) == 0) return false;
    bool any = false;
#pragma unroll 1
    for (int m = 0; m < kRowTiles; ++m) {
      if (ptx::vote_ballot((near_fragments >> m & 1) != 0) != 0) any |= visit_fragment(s, w, tile, stage, m);
    }
    return any;
  }

  // Bit m: one of this lane's products of sixteen codes and rows 16 m to 16 m + 15 is near.
  __device__ uint32_t find_near(const Scan& s, const Warp& w, uint32_t stage, int half) const {
    const int32_t* const limits = numbers(s, w) + w.lane / 4;
    uint32_t common[kRowTiles][kEights][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t start = 0u - static_cast<uint32_t>(limits[16 * m + 8 * i] >> 1);
#pragma unroll
        for (int n = 0; n < kEights; ++n) common[m][n][2 * i] = common[m][n][2 * i + 1] = start;
      }
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (step > 0 && step * 32 >= s.row_bytes) break;
      uint32_t codes[4];
      load_codes(s, w, stage, half, step, codes);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        ptx::multiply_bits(common[m][0], queries[m][step], codes[0], codes[1]);
        ptx::multiply_bits(common[m][1], queries[m][step], codes[2], codes[3]);
      }
    }
    int32_t half_ones[kEights][2];
    ones_of_codes(w, common[0], half_ones);
    uint32_t near = 0;
#pragma unroll
    for (int n = 0; n < kEights; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) half_ones[n][i] = (half_ones[n][i] + (kNever >> 1) + 1) >> 1;
    }
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      bool is_near = false;
#pragma unroll
      for (int n = 0; n < kEights; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) is_near |= static_cast<int32_t>(common[m][n][i]) >= half_ones[n][i % 2];
      }
      near |= static_cast<uint32_t>(is_near) << m;
    }
    return near;
  }

  __device__ void multiply_fragment(const Scan& s, const Warp& w, uint32_t stage, int m,
                                    uint32_t (&common)[kColumns][4]) const {
    for (int step = 0; step * 32 < s.row_bytes; ++step) {
      uint32_t rows_of_queries[4];
      load_queries(s, w, 0, m, step, rows_of_queries);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t codes[4];
        load_codes(s, w, stage, half, step, codes);
        ptx::multiply_bits(common[2 * half], rows_of_queries, codes[0], codes[1]);
        ptx::multiply_bits(common[2 * half + 1], rows_of_queries, codes[2], codes[3]);
      }
    }
  }

  // Seldom, so that the products are formed again rather than kept.
  __device__ bool visit_fragment(const Scan& s, const Warp& w, uint32_t tile, uint32_t stage, int m) const {
    uint32_t with_ones[kColumns][4] = {}, common[kColumns][4] = {};
    multiply_fragment(s, w, stage, 0, with_ones);
    int32_t code_ones[kColumns][2];
    ones_of_codes(w, with_ones, code_ones);
    multiply_fragment(s, w, stage, m, common);
    return visit_rows(s, w, tile, m, common, code_ones);
  }
};

// Longer codes: queries come from shared memory with each chunk, and the products stay.
struct ProductOfChunks : QueryRows {
  static constexpr bool kOneChunk = false, kShared = true;

  uint32_t common[kFragments][kColumns][4];

  __device__ ProductOfChunks(const Scan& s, const Warp& w) : QueryRows(s, w) {}

  __device__ void clear() {
#pragma unroll
    for (int m = 0; m < kFragments; ++m) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) common[m][n][i] = 0;
      }
    }
  }

  __device__ void add(const Scan& s, const Warp& w, uint32_t stage, int chunk) {
    for (int step = 0; step < kSteps; ++step) {  // a chunk of several is whole
      uint32_t codes[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) load_codes(s, w, stage, half, step, codes[half]);
#pragma unroll
      for (int m = 0; m < kFragments; ++m) {
        if (m >= s.row_tiles) break;
        uint32_t queries[4];
        load_queries(s, w, chunk, m, step, queries);
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
          ptx::multiply_bits(common[m][n], queries, codes[n / 2][n % 2 * 2], codes[n / 2][n % 2 * 2 + 1]);
        }
      }
    }
  }

  __device__ bool finish(const Scan& s, const Warp& w, uint32_t tile, uint32_t) {
    int32_t code_ones[kColumns][2];
    ones_of_codes(w, common[0], code_ones);
    const int32_t* const limits = numbers(s, w) + w.lane / 4;
    bool any = false;
#pragma unroll
    for (int m = 0; m < kFragments; ++m) {
      if (m >= s.row_tiles) break;
      if (is_near(common[m], code_ones, limits[16 * m], limits[16 * m + 8])) {
        any |= visit_rows(s, w, tile, m, common[m], code_ones);
      }
    }
    return any;
  }
};

}  // namespace
}  // namespace embedding_kernels::cuda

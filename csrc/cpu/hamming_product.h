// For hamming_loops.cpp only: many queries on the tile unit. Bits become bytes, and distances a product of integers.
//
// With bits a of the query and c of the code, distance = sum a + sum c (1 - 2a): the product of codes in {0, 1} and
// queries in {1, -1}, added to the ones of the query. A word becomes 16 rows of 4 bytes: row 8 d + j holds bit j of the
// bytes 4 d to 4 d + 3, the order in which codes can be taken apart without moving bits. A tile of codes has 16 codes
// side by side, [row][code][4]; one of queries has them one below the other, [query][row][4].
#pragma once

#include "hamming_words.h"
#include "tiles.h"

namespace embedding_kernels {
namespace {

constexpr int64_t kBlockQueries = 32, kManyQueries = 8;
constexpr int64_t kTile = 1024;  // bytes
// Words multiplied at once: so much of a group of codes stays in the first cache, past which the queries stream.
constexpr int64_t kChunkWords = 12;
constexpr int64_t kGroupBytes = 2 * kChunkWords * kTile;

int64_t block_bytes(int64_t words) { return 2 * (words + 1) * kTile; }
int64_t scratch_bytes(int64_t) { return kGroupBytes; }

// Byte i of a laid out word stands for bit i / 4 % 8 of its byte i / 32 * 4 + i % 4.
inline void lay_query(const uint8_t* query, int64_t bytes, int64_t row, uint8_t* tiles, int32_t* ones) {
  const __m512i byte_of =
      _mm512_set_epi32(0x07060504, 0x07060504, 0x07060504, 0x07060504, 0x07060504, 0x07060504, 0x07060504, 0x07060504,
                       0x03020100, 0x03020100, 0x03020100, 0x03020100, 0x03020100, 0x03020100, 0x03020100, 0x03020100);
  const __m256i bits = _mm256_setr_epi32(0x01010101, 0x02020202, 0x04040404, 0x08080808, 0x10101010, 0x20202020,
                                         0x40404040, static_cast<int>(0x80808080));
  const __m512i bit_of = _mm512_broadcast_i64x4(bits);
  int32_t count = 0;
  for (int64_t w = 0; 8 * w < bytes; ++w) {
    const uint64_t word = bytes - 8 * w < 8 ? load_tail(query + 8 * w, bytes - 8 * w) : load_word(query + 8 * w);
    count += __builtin_popcountll(word);
    const __m512i spread = _mm512_shuffle_epi8(_mm512_set1_epi64(static_cast<int64_t>(word)), byte_of);
    const __mmask64 set = _mm512_test_epi8_mask(spread, bit_of);
    _mm512_store_si512(tiles + w * kTile + row * 64,
                       _mm512_mask_blend_epi8(set, _mm512_set1_epi8(1), _mm512_set1_epi8(-1)));
  }
  _mm512_store_si512(ones + row * 16, _mm512_set1_epi32(count));
}

// Two tiles for each word, of 16 queries each: all words of the first 16, all of the others, then how many ones each
// query has, in 16 places.
void lay_queries(const uint8_t* queries, int64_t stride, int64_t count, int64_t bytes, void* block) {
  const int64_t words = (bytes + 7) / 8;
  auto* const tiles = static_cast<uint8_t*>(block);
  __builtin_memset(tiles, 0, block_bytes(words));
  for (int64_t q = 0; q < count; ++q) {
    uint8_t* const ones = tiles + 2 * words * kTile + q / 16 * kTile;
    lay_query(queries + q * stride, bytes, q % 16, tiles + q / 16 * words * kTile, reinterpret_cast<int32_t*>(ones));
  }
}

// Rows of 16 four-byte units, transposed.
inline void transpose_units(__m512i (&x)[16]) {
  __m512i y[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    y[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
    y[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
    y[i + 8] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
    y[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88);
    x[i + 4] = _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0x88);
    x[i + 8] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0xdd);
    x[i + 12] = _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0xdd);
  }
}

// Up to 64 bytes of each of up to 16 codes; zeros for the others.
inline void lay_codes(const uint8_t* codes, int64_t stride, int64_t count, int64_t bytes, uint8_t* tiles) {
  const __mmask64 inside = ~uint64_t{0} >> (64 - bytes);
  __m512i units[16];
#pragma GCC unroll 16
  for (int c = 0; c < 16; ++c) {
    units[c] = c < count ? _mm512_maskz_loadu_epi8(inside, codes + c * stride) : _mm512_setzero_si512();
  }
  transpose_units(units);
#pragma GCC unroll 16
  for (int u = 0; u < 16; ++u) {
    if (8 * (u / 2) >= bytes) break;
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      // a matrix of bits whose last row takes bit j: the result is 0 or 1
      const __m512i bit = _mm512_set1_epi64(static_cast<int64_t>(uint64_t{1} << (56 + j)));
      _mm512_store_si512(tiles + u / 2 * kTile + (u % 2 * 8 + j) * 64, _mm512_gf2p8affine_epi64_epi8(units[u], bit, 0));
    }
  }
}

// many_distances goes over its codes by groups, and over a group's words by chunks.
struct Step {
  const uint8_t* codes;  // of the group, at the chunk
  int64_t count, bytes;
  int64_t first_word, words;  // of the chunk
  int64_t first_code;
  bool last_chunk;
};

inline void lay_step(const Step& step, int64_t stride, uint8_t* group) {
  for (int64_t half = 0; half < 2; ++half) {
    const int64_t left = step.count - 16 * half;
    for (int64_t byte = 0; byte < step.bytes; byte += 64) {
      lay_codes(left > 0 ? step.codes + 16 * half * stride + byte : nullptr, stride, left,
                step.bytes - byte < 64 ? step.bytes - byte : 64, group + (half * kChunkWords + byte / 8) * kTile);
    }
  }
}

// What will be read a group later, fetched line by line while this step is multiplied.
struct Ahead {
  const uint8_t* row;
  int64_t stride, bytes, rows;
  int64_t byte = 0;

  inline void fetch(int64_t lines) {
    for (; lines > 0 && rows > 0; --lines) {
      __builtin_prefetch(row + byte);
      byte += 64;
      if (byte < bytes) continue;
      byte = 0;
      row += stride;
      --rows;
    }
  }
};

// One block of 16 or 32 (`both`) queries and one group of codes; the first chunk starts from the ones.
template <bool both>
inline void multiply_block(const uint8_t* queries, int64_t all_words, const uint8_t* group, const Step& step,
                           int32_t* out, int64_t out_stride, Ahead& ahead) {
  const int64_t out_bytes = 4 * out_stride;
  const uint8_t* const ones = queries + 2 * all_words * kTile;
  int32_t* const below = out + 16 * out_stride;
  if (step.first_word == 0) {
    _tile_loadd(0, ones, 64);
    _tile_loadd(1, ones, 64);
    if constexpr (both) {
      _tile_loadd(2, ones + kTile, 64);
      _tile_loadd(3, ones + kTile, 64);
    }
  } else {
    _tile_loadd(0, out, out_bytes);
    _tile_loadd(1, out + 16, out_bytes);
    if constexpr (both) {
      _tile_loadd(2, below, out_bytes);
      _tile_loadd(3, below + 16, out_bytes);
    }
  }
  const uint8_t* const first = queries + step.first_word * kTile;
  const uint8_t* const second = first + all_words * kTile;
  for (int64_t w = 0; w < step.words * kTile; w += kTile) {
    // queries stream past the group, which stays in the first cache
    _tile_loadd(6, group + w, 64);
    _tile_stream_loadd(4, first + w, 64);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, group + kChunkWords * kTile + w, 64);
    _tile_dpbssd(1, 4, 7);
    if constexpr (both) {
      _tile_stream_loadd(5, second + w, 64);
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    }
    ahead.fetch(4);
  }
  _tile_stored(0, out, out_bytes);
  _tile_stored(1, out + 16, out_bytes);
  if constexpr (both) {
    _tile_stored(2, below, out_bytes);
    _tile_stored(3, below + 16, out_bytes);
  }
}

// Distances of up to a block of queries to a group of codes that are still to be held against the bounds.
struct Unseen {
  const int32_t* distances;
  const int32_t* bounds;
  uint32_t* near;
  int64_t queries, codes;
};

inline void look(const Unseen& unseen, int64_t out_stride, int64_t near_stride) {
  const uint32_t inside = unseen.codes < kGroupCodes ? (uint32_t{1} << unseen.codes) - 1 : ~uint32_t{0};
  for (int64_t q = 0; q < unseen.queries; ++q) {
    const int32_t* const row = unseen.distances + q * out_stride;
    const __m512i bound = _mm512_set1_epi32(unseen.bounds[q]);
    const uint32_t low = _mm512_cmplt_epi32_mask(_mm512_load_si512(row), bound);
    const uint32_t high = _mm512_cmplt_epi32_mask(_mm512_load_si512(row + 16), bound);
    unseen.near[q * near_stride] = (low | high << 16) & inside;
  }
}

// The step against all queries. A block's distances are looked at once the next block is under way: by then they have
// arrived in the cache.
inline void multiply_step(const Comparison& c, const Step& step, Ahead& ahead, Unseen& unseen) {
  const int64_t words = (c.bytes + 7) / 8;
  for (int64_t q = 0; q < c.query_count; q += kBlockQueries) {
    const uint8_t* const block = c.queries + q / kBlockQueries * block_bytes(words);
    const int64_t here = c.query_count - q < kBlockQueries ? c.query_count - q : kBlockQueries;
    int32_t* const out = c.out + q * c.out_stride + step.first_code;
    memory_is_used();
    if (here > 16) {
      multiply_block<true>(block, words, c.scratch, step, out, c.out_stride, ahead);
    } else {
      multiply_block<false>(block, words, c.scratch, step, out, c.out_stride, ahead);
    }
    memory_is_used();
    if (!step.last_chunk) continue;
    look(unseen, c.out_stride, c.near_stride);
    unseen = {out, c.bounds + q, c.near + q * c.near_stride + step.first_code / kGroupCodes, here, step.count};
  }
}

void many_distances(const Comparison& c) {
  const int64_t words = (c.bytes + 7) / 8;
  // chunks of nearly equal length; codes without a bit have one of none
  const int64_t chunks = words == 0 ? 1 : (words + kChunkWords - 1) / kChunkWords;
  const auto step_at = [&](int64_t i) {
    const int64_t code = i / chunks * kGroupCodes, word = words * (i % chunks) / chunks;
    const int64_t end = words * (i % chunks + 1) / chunks;
    const int64_t bytes = (8 * end < c.bytes ? 8 * end : c.bytes) - 8 * word;
    return Step{
        c.codes + code * c.stride + 8 * word, c.count - code, bytes, word, end - word, code, i % chunks == chunks - 1};
  };
  Unseen unseen = {};
  configure_tiles();
  const int64_t steps = (c.count + kGroupCodes - 1) / kGroupCodes * chunks;
  for (int64_t i = 0; i < steps; ++i) {
    const Step step = step_at(i), next = step_at(i + chunks);
    const int64_t left = next.count + c.following;
    Ahead ahead = {next.codes, c.stride, next.bytes, left < kGroupCodes ? left : kGroupCodes};
    lay_step(step, c.stride, c.scratch);
    multiply_step(c, step, ahead, unseen);
  }
  _tile_release();
  look(unseen, c.out_stride, c.near_stride);
}

}  // namespace
}  // namespace embedding_kernels

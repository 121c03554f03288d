// For hamming_loops.cpp only: many queries at once. Without a tile unit, codes are interleaved word by word and every
// lane counts its own code; with one, bits become bytes and the distances a product of integers.
#pragma once

#include "hamming.h"
#include "level.h"
#include "tiles.h"

namespace embedding_kernels {
namespace {

inline uint64_t load_word(const uint8_t* from) {
  uint64_t word;
  __builtin_memcpy(&word, from, 8);
  return word;
}

// The last 1 to 7 bytes of a code, zero above.
inline uint64_t load_tail(const uint8_t* from, int64_t bytes) {
  uint64_t word = 0;
  for (int64_t i = 0; i < bytes; ++i) word |= static_cast<uint64_t>(from[i]) << (8 * i);
  return word;
}

#if defined(EK_ISA_AVX2)
// Ones in each byte of x, by table look-up of its halves.
inline __m256i count_bytes(__m256i x) {
  const __m256i table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4,  //
                                         0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
  const __m256i low = _mm256_set1_epi8(0x0f);
  return _mm256_add_epi8(_mm256_shuffle_epi8(table, _mm256_and_si256(x, low)),
                         _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(x, 4), low)));
}

// Counts of up to eight ones a byte may be added this often before a byte overflows.
constexpr int64_t kByteAdds = 31;
#endif

#if defined(EK_ISA_AMX)

// ---- a product of bytes ----
//
// With bits a of the query and c of the code, distance = sum a + sum c (1 - 2a): the product of codes in {0, 1} and
// queries in {1, -1}, added to the ones of the query. A word becomes 16 rows of 4 bytes: row 8 d + j holds bit j of the
// bytes 4 d to 4 d + 3, the order in which codes can be taken apart without moving bits. A tile of codes has 16 codes
// side by side, [row][code][4]; one of queries has them one below the other, [query][row][4].

constexpr int64_t kTileCodes = 32, kTileQueries = 32, kWordBytes = 64, kQueryBytes = 64;
constexpr int64_t kTileFrom = 8, kTileBytes = 128 * 1024;
constexpr int64_t kTile = 1024;  // bytes

inline void lay_query(const uint8_t* query, int64_t bytes, int64_t row, uint8_t* tiles, int32_t* ones) {
  int32_t count = 0;
  for (int64_t w = 0; 8 * w < bytes; ++w) {
    const uint64_t word = bytes - 8 * w < 8 ? load_tail(query + 8 * w, bytes - 8 * w) : load_word(query + 8 * w);
    count += __builtin_popcountll(word);
    uint8_t* to = tiles + w * kTile + row * 64;
    for (int64_t i = 0; i < 64; ++i) {
      const int64_t byte = i / 32 * 4 + i % 4, bit = i / 4 % 8;
      to[i] = (word >> (8 * byte + bit) & 1) != 0 ? 0xff : 1;
    }
  }
  for (int64_t i = 0; i < 16; ++i) ones[row * 16 + i] = count;
}

// Two tiles for each word, of 16 queries each: all words of the first 16, all of the others, then how many ones each
// query has, in 16 places.
void lay_queries(const uint8_t* queries, int64_t stride, int64_t count, int64_t bytes, void* block) {
  const int64_t words = (bytes + 7) / 8;
  auto* const tiles = static_cast<uint8_t*>(block);
  __builtin_memset(tiles, 0, kTileQueries * (words * kWordBytes + kQueryBytes));
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

// Up to 64 bytes of each of 16 codes.
inline void lay_chunk(const uint8_t* codes, int64_t stride, int64_t count, int64_t bytes, uint8_t* tiles) {
  const __mmask64 inside = ~uint64_t{0} >> (64 - bytes);
  __m512i units[16];
#pragma GCC unroll 16
  for (int c = 0; c < 16; ++c) units[c] = _mm512_maskz_loadu_epi8(c < count ? inside : 0, codes + c * stride);
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

void lay_codes(const uint8_t* codes, int64_t stride, int64_t count, int64_t bytes, void* tiles) {
  const int64_t words = (bytes + 7) / 8;
  const int64_t padded = (count + kTileCodes - 1) / kTileCodes * kTileCodes;
  for (int64_t n = 0; n < padded; n += 16) {
    auto* const to = static_cast<uint8_t*>(tiles) + n * words * kWordBytes;
    for (int64_t byte = 0; byte < bytes; byte += 64) {
      const int64_t left = count - n < 0 ? 0 : count - n;
      // nothing past the last code is read, nor is an address formed
      lay_chunk(left > 0 ? codes + n * stride + byte : codes, left > 0 ? stride : 0, left,
                bytes - byte < 64 ? bytes - byte : 64, to + byte / 8 * kTile);
    }
  }
}

// 16 or 32 queries (`both`) and 32 codes.
template <bool both>
inline void multiply_tiles(const uint8_t* queries, const uint8_t* ones, const uint8_t* codes, int64_t words,
                           int32_t* out, int64_t out_stride) {
  const uint8_t* const other_codes = codes + words * kTile;
  const uint8_t* const other_queries = queries + words * kTile;
  _tile_loadd(0, ones, 64);
  _tile_loadd(1, ones, 64);
  if constexpr (both) {
    _tile_loadd(2, ones + kTile, 64);
    _tile_loadd(3, ones + kTile, 64);
  }
  for (int64_t w = 0; w < words * kTile; w += kTile) {
    _tile_loadd(6, codes + w, 64);
    _tile_loadd(4, queries + w, 64);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, other_codes + w, 64);
    _tile_dpbssd(1, 4, 7);
    if constexpr (both) {
      _tile_loadd(5, other_queries + w, 64);
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    }
  }
  _tile_stored(0, out, 4 * out_stride);
  _tile_stored(1, out + 16, 4 * out_stride);
  if constexpr (both) {
    _tile_stored(2, out + 16 * out_stride, 4 * out_stride);
    _tile_stored(3, out + 16 * out_stride + 16, 4 * out_stride);
  }
}

void tile_distances(const void* block, int64_t queries, const void* tiles, int64_t codes, int64_t words, int32_t* out,
                    int64_t out_stride) {
  const auto* const from = static_cast<const uint8_t*>(block);
  const uint8_t* const ones = from + 2 * words * kTile;
  memory_is_used();
  configure_tiles();
  for (int64_t n = 0; n < codes; n += kTileCodes) {
    const uint8_t* const group = static_cast<const uint8_t*>(tiles) + n * words * kWordBytes;
    if (queries > 16) {
      multiply_tiles<true>(from, ones, group, words, out + n, out_stride);
    } else {
      multiply_tiles<false>(from, ones, group, words, out + n, out_stride);
    }
  }
  _tile_release();
  memory_is_used();
}

#else

// ---- lane-wise counts over interleaved codes ----

#if defined(EK_ISA_AVX512)
constexpr int64_t kLanes = 8;
struct Lanes {
  __m512i sum = _mm512_setzero_si512();
  static __m512i load(const uint64_t* from) { return _mm512_loadu_si512(from); }
  static __m512i broadcast(uint64_t word) { return _mm512_set1_epi64(static_cast<int64_t>(word)); }
  void add(__m512i a, __m512i b) { sum = _mm512_add_epi64(sum, _mm512_popcnt_epi64(_mm512_xor_si512(a, b))); }
  void flush() {}
  void store(int32_t* out) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi64_epi32(sum)); }
};
constexpr int64_t kFlush = int64_t{1} << 62;
#elif defined(EK_ISA_AVX2)
constexpr int64_t kLanes = 4;
struct Lanes {
  __m256i sum = _mm256_setzero_si256();
  __m256i ones = _mm256_setzero_si256();
  static __m256i load(const uint64_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
  static __m256i broadcast(uint64_t word) { return _mm256_set1_epi64x(static_cast<int64_t>(word)); }
  void add(__m256i a, __m256i b) { ones = _mm256_add_epi8(ones, count_bytes(_mm256_xor_si256(a, b))); }
  void flush() {
    sum = _mm256_add_epi64(sum, _mm256_sad_epu8(ones, _mm256_setzero_si256()));
    ones = _mm256_setzero_si256();
  }
  void store(int32_t* out) const {
    alignas(32) int64_t lanes[4];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sum);
    for (int i = 0; i < 4; ++i) out[i] = static_cast<int32_t>(lanes[i]);
  }
};
constexpr int64_t kFlush = kByteAdds;
#else
constexpr int64_t kLanes = 1;
struct Lanes {
  int64_t sum = 0;
  static uint64_t load(const uint64_t* from) { return *from; }
  static uint64_t broadcast(uint64_t word) { return word; }
  void add(uint64_t a, uint64_t b) { sum += __builtin_popcountll(a ^ b); }
  void flush() {}
  void store(int32_t* out) const { *out = static_cast<int32_t>(sum); }
};
constexpr int64_t kFlush = int64_t{1} << 62;
#endif

// Vectors of codes worked on at once: with two queries, as many sums as fit in registers.
constexpr int64_t kVectors = kLanes == 8 ? 4 : 2;

constexpr int64_t kTileCodes = kLanes * kVectors, kTileQueries = 2, kWordBytes = 8, kQueryBytes = 0;
constexpr int64_t kTileFrom = 4, kTileBytes = 32 * 1024;

// One query after the other.
void lay_queries(const uint8_t* queries, int64_t stride, int64_t count, int64_t bytes, void* block) {
  const int64_t words = (bytes + 7) / 8;
  auto* const to = static_cast<uint8_t*>(block);
  __builtin_memset(to, 0, kTileQueries * words * 8);
  for (int64_t q = 0; q < count; ++q) __builtin_memcpy(to + q * words * 8, queries + q * stride, bytes);
}

// tile[word][lane]
void lay_codes(const uint8_t* codes, int64_t stride, int64_t count, int64_t bytes, void* tiles) {
  const int64_t words = (bytes + 7) / 8, whole = bytes / 8;
  const int64_t padded = (count + kTileCodes - 1) / kTileCodes * kTileCodes;
  for (int64_t n = 0; n < padded; ++n) {
    uint64_t* lane = static_cast<uint64_t*>(tiles) + n / kLanes * words * kLanes + n % kLanes;
    if (n >= count) {
      for (int64_t w = 0; w < words; ++w) lane[w * kLanes] = 0;
      continue;
    }
    const uint8_t* code = codes + n * stride;
    for (int64_t w = 0; w < whole; ++w) lane[w * kLanes] = load_word(code + 8 * w);
    if (whole < words) lane[whole * kLanes] = load_tail(code + 8 * whole, bytes % 8);
  }
}

void tile_distances(const void* block, int64_t, const void* tiles, int64_t codes, int64_t words, int32_t* out,
                    int64_t out_stride) {
  const auto* const first = static_cast<const uint64_t*>(block);
  const uint64_t* const second = first + words;
  for (int64_t n = 0; n < codes; n += kTileCodes) {
    Lanes first_sums[kVectors], second_sums[kVectors];
    const uint64_t* group = static_cast<const uint64_t*>(tiles) + n * words;
    for (int64_t start = 0; start < words; start += kFlush) {
      const int64_t end = words - start < kFlush ? words : start + kFlush;
      for (int64_t w = start; w < end; ++w) {
        const auto a = Lanes::broadcast(first[w]), b = Lanes::broadcast(second[w]);
        for (int64_t v = 0; v < kVectors; ++v) {
          const auto x = Lanes::load(group + (v * words + w) * kLanes);
          first_sums[v].add(a, x);
          second_sums[v].add(b, x);
        }
      }
      for (int64_t v = 0; v < kVectors; ++v) {
        first_sums[v].flush();
        second_sums[v].flush();
      }
    }
    for (int64_t v = 0; v < kVectors; ++v) {
      first_sums[v].store(out + n + v * kLanes);
      second_sums[v].store(out + out_stride + n + v * kLanes);
    }
  }
}

#endif

}  // namespace
}  // namespace embedding_kernels

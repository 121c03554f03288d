// For hamming_loops.cpp only: many queries without a tile unit. Codes are interleaved word by word, and every lane
// counts its own code.
#pragma once

#include "hamming_words.h"

namespace embedding_kernels {
namespace {

#if defined(EK_ISA_AVX512)
constexpr int64_t kLanes = 8;
struct Lanes {
  __m512i sum = _mm512_setzero_si512();
  static __m512i load(const uint64_t* from) { return _mm512_loadu_si512(from); }
  static __m512i broadcast(uint64_t word) { return _mm512_set1_epi64(static_cast<int64_t>(word)); }
  void add(__m512i a, __m512i b) { sum = _mm512_add_epi64(sum, _mm512_popcnt_epi64(_mm512_xor_si512(a, b))); }
  void flush() {}
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
};
constexpr int64_t kFlush = int64_t{1} << 62;
#endif

// Vectors of codes worked on at once: with two queries, as many sums as fit in registers.
constexpr int64_t kVectors = kLanes == 8 ? 4 : 2;
constexpr int64_t kSideBySide = kLanes * kVectors;  // codes
constexpr int64_t kBlockQueries = 2, kManyQueries = 4;

// Stores kSideBySide distances; bit n of the answer is set where the n-th is below the bound.
#if defined(EK_ISA_AVX512)
inline uint32_t store_sums(const Lanes (&x)[kVectors], int32_t bound, int32_t* out) {
  const __m512i limit = _mm512_set1_epi32(bound);
  uint32_t near = 0;
  for (int v = 0; v < kVectors; v += 2) {
    // the lower halves of sixteen lanes
    const __m512i places = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i distances = _mm512_permutex2var_epi32(x[v].sum, places, x[v + 1].sum);
    _mm512_store_si512(out + v * kLanes, distances);
    near |= static_cast<uint32_t>(_mm512_cmplt_epi32_mask(distances, limit)) << (v * kLanes);
  }
  return near;
}
#elif defined(EK_ISA_AVX2)
inline uint32_t store_sums(const Lanes (&x)[kVectors], int32_t bound, int32_t* out) {
  static_assert(kVectors == 2);
  const __m256 even = _mm256_shuffle_ps(_mm256_castsi256_ps(x[0].sum), _mm256_castsi256_ps(x[1].sum), 0x88);
  const __m256i distances = _mm256_permute4x64_epi64(_mm256_castps_si256(even), 0xd8);
  _mm256_store_si256(reinterpret_cast<__m256i*>(out), distances);
  const __m256i near = _mm256_cmpgt_epi32(_mm256_set1_epi32(bound), distances);
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(near)));
}
#else
inline uint32_t store_sums(const Lanes (&x)[kVectors], int32_t bound, int32_t* out) {
  uint32_t near = 0;
  for (int v = 0; v < kVectors; ++v) {
    out[v] = static_cast<int32_t>(x[v].sum);
    near |= static_cast<uint32_t>(out[v] < bound) << v;
  }
  return near;
}
#endif

// Interleaved codes stay in the first cache for all queries.
constexpr int64_t kScratchBytes = 32 * 1024;

int64_t block_bytes(int64_t words) { return kBlockQueries * words * 8; }
int64_t groups_at_once(int64_t words) {
  const int64_t fit = words == 0 ? 1 : kScratchBytes / (kGroupCodes * words * 8);
  return fit > 1 ? fit : 1;
}
int64_t scratch_bytes(int64_t words) { return groups_at_once(words) * kGroupCodes * words * 8; }

// One query after the other.
void lay_queries(const uint8_t* queries, int64_t stride, int64_t count, int64_t bytes, void* block) {
  const int64_t words = (bytes + 7) / 8;
  auto* const to = static_cast<uint8_t*>(block);
  __builtin_memset(to, 0, block_bytes(words));
  for (int64_t q = 0; q < count; ++q) __builtin_memcpy(to + q * words * 8, queries + q * stride, bytes);
}

// Words [word, words) of `count` codes, word by word: tiles[word][lane]; other lanes are 0.
inline void lay_words(const uint8_t* codes, int64_t stride, int64_t count, int64_t bytes, int64_t word,
                      uint64_t* tiles) {
  const int64_t words = (bytes + 7) / 8, whole = bytes / 8;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    uint64_t* const to = tiles + lane;
    if (lane >= count) {
      for (int64_t w = word; w < words; ++w) to[w * kLanes] = 0;
      continue;
    }
    const uint8_t* code = codes + lane * stride;
    for (int64_t w = word; w < whole; ++w) to[w * kLanes] = load_word(code + 8 * w);
    if (whole < words) to[whole * kLanes] = load_tail(code + 8 * whole, bytes % 8);
  }
}

#if defined(EK_ISA_AVX512)
// Codes are fetched so many ahead.
constexpr int64_t kFetchCodes = 32;

// Eight words of eight codes at once.
inline void lay_square(const uint8_t* codes, int64_t stride, uint64_t* tiles) {
  __m512i x[8], y[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    x[i] = _mm512_loadu_si512(codes + i * stride);
    __builtin_prefetch(codes + (i + kFetchCodes) * stride);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    y[i] = _mm512_unpacklo_epi64(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi64(x[i], x[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    x[i] = _mm512_shuffle_i64x2(y[i], y[i + 2], 0x88);
    x[i + 2] = _mm512_shuffle_i64x2(y[i], y[i + 2], 0xdd);
    x[i + 4] = _mm512_shuffle_i64x2(y[i + 4], y[i + 6], 0x88);
    x[i + 6] = _mm512_shuffle_i64x2(y[i + 4], y[i + 6], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    y[i] = _mm512_shuffle_i64x2(x[i], x[i + 4], 0x88);
    y[i + 4] = _mm512_shuffle_i64x2(x[i], x[i + 4], 0xdd);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) _mm512_storeu_si512(tiles + i * kLanes, y[i]);
}
#endif

inline void lay_codes(const uint8_t* codes, int64_t stride, int64_t count, int64_t bytes, uint64_t* tiles) {
  const int64_t words = (bytes + 7) / 8;
  for (int64_t n = 0; n < count; n += kLanes, tiles += kLanes * words) {
    const uint8_t* from = codes + n * stride;
    int64_t word = 0;
#if defined(EK_ISA_AVX512)
    for (; count - n >= kLanes && 8 * (word + 8) <= bytes; word += 8) {
      lay_square(from + 8 * word, stride, tiles + word * kLanes);
    }
#endif
    lay_words(from, stride, count - n, bytes, word, tiles);
  }
}

// Two queries, kSideBySide interleaved codes.
__attribute__((always_inline)) inline void count_pair(const uint64_t* first, const uint64_t* tiles, int64_t words,
                                                      const int32_t* bounds, int32_t* out, int64_t out_stride,
                                                      uint32_t (&near)[2]) {
  const uint64_t* const second = first + words;
  Lanes first_sums[kVectors], second_sums[kVectors];
  for (int64_t start = 0; start < words; start += kFlush) {
    const int64_t end = words - start < kFlush ? words : start + kFlush;
    for (int64_t w = start; w < end; ++w) {
      const auto a = Lanes::broadcast(first[w]), b = Lanes::broadcast(second[w]);
      for (int64_t v = 0; v < kVectors; ++v) {
        const auto x = Lanes::load(tiles + (v * words + w) * kLanes);
        first_sums[v].add(a, x);
        second_sums[v].add(b, x);
      }
    }
    for (int64_t v = 0; v < kVectors; ++v) {
      first_sums[v].flush();
      second_sums[v].flush();
    }
  }
  near[0] = store_sums(first_sums, bounds[0], out);
  near[1] = store_sums(second_sums, bounds[1], out + out_stride);
}

// The interleaved groups from code `first` on against all queries.
inline void count_groups(const Comparison& c, int64_t first, int64_t groups, int64_t words) {
  const auto* const tiles = reinterpret_cast<const uint64_t*>(c.scratch);
  for (int64_t q = 0; q < c.query_count; q += kBlockQueries) {
    const auto* const block = reinterpret_cast<const uint64_t*>(c.queries) + q * words;
    const bool both = q + 1 < c.query_count;
    const int32_t bounds[2] = {c.bounds[q], both ? c.bounds[q + 1] : 0};
    for (int64_t group = 0; group < groups; ++group) {
      uint32_t found[2] = {};
      for (int64_t n = 0; n < kGroupCodes; n += kSideBySide) {
        const int64_t code = group * kGroupCodes + n;
        uint32_t near[2];
        count_pair(block, tiles + code * words, words, bounds, c.out + q * c.out_stride + first + code, c.out_stride,
                   near);
        found[0] |= near[0] << n;
        found[1] |= near[1] << n;
      }
      const int64_t left = c.count - first - group * kGroupCodes;
      const uint32_t inside = left < kGroupCodes ? (uint32_t{1} << left) - 1 : ~uint32_t{0};
      uint32_t* const near = c.near + q * c.near_stride + first / kGroupCodes + group;
      near[0] = found[0] & inside;
      if (both) near[c.near_stride] = found[1] & inside;
    }
  }
}

void many_distances(const Comparison& c) {
  const int64_t words = (c.bytes + 7) / 8, at_once = groups_at_once(words) * kGroupCodes;
  auto* const tiles = reinterpret_cast<uint64_t*>(c.scratch);
  for (int64_t n = 0; n < c.count; n += at_once) {
    const int64_t here = c.count - n < at_once ? c.count - n : at_once;
    const int64_t groups = (here + kGroupCodes - 1) / kGroupCodes;
    lay_codes(c.codes + n * c.stride, c.stride, here, c.bytes, tiles);
    const int64_t laid = (here + kLanes - 1) / kLanes * kLanes * words;
    __builtin_memset(tiles + laid, 0, (groups * kGroupCodes * words - laid) * 8);
    count_groups(c, n, groups, words);
  }
}

}  // namespace
}  // namespace embedding_kernels

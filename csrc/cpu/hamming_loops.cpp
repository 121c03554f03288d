// Compiled once for each level of instruction set. No torch, no STL, no threads: a weak symbol from a header, compiled
// here with AVX-512, could be the copy that the linker gives to everybody.
#if defined(EK_ISA_AMX)
#include "hamming_product.h"
#else
#include "hamming_lanes.h"
#endif

namespace embedding_kernels {
namespace {

inline uint64_t reverse_bits_in_bytes(uint64_t x) {
  x = (x & 0x5555555555555555u) << 1 | (x >> 1 & 0x5555555555555555u);
  x = (x & 0x3333333333333333u) << 2 | (x >> 2 & 0x3333333333333333u);
  return (x & 0x0f0f0f0f0f0f0f0fu) << 4 | (x >> 4 & 0x0f0f0f0f0f0f0f0fu);
}

// A float is > 0 exactly where its bits, as an unsigned number less one, are below those of infinity: zero wraps
// around, NaN and negative numbers lie above.
constexpr uint32_t kInfinity32 = 0x7f800000u;
template <Dtype dtype>
constexpr uint16_t kInfinity16 = dtype == kBFloat16 ? 0x7f80u : 0x7c00u;

template <Dtype dtype>
inline bool is_positive(const void* x, int64_t i) {
  if constexpr (dtype == kFloat32) {
    uint32_t bits;
    __builtin_memcpy(&bits, static_cast<const uint8_t*>(x) + 4 * i, 4);
    return bits - 1u < kInfinity32;
  } else {
    uint16_t bits;
    __builtin_memcpy(&bits, static_cast<const uint8_t*>(x) + 2 * i, 2);
    return static_cast<uint16_t>(bits - 1u) < kInfinity16<dtype>;
  }
}

// `positive_mask` of 64 values, bit i for value i, is the vector part.
template <Dtype dtype>
inline uint64_t positive_mask(const void* x) {
#if defined(EK_ISA_AVX512)
  uint64_t mask = 0;
  if constexpr (dtype == kFloat32) {
    for (int part = 0; part < 4; ++part) {
      const __m512i bits = _mm512_loadu_si512(static_cast<const uint8_t*>(x) + 64 * part);
      const __m512i less = _mm512_sub_epi32(bits, _mm512_set1_epi32(1));
      mask |= static_cast<uint64_t>(_mm512_cmplt_epu32_mask(less, _mm512_set1_epi32(kInfinity32))) << (16 * part);
    }
  } else {
    for (int part = 0; part < 2; ++part) {
      const __m512i bits = _mm512_loadu_si512(static_cast<const uint8_t*>(x) + 64 * part);
      const __m512i less = _mm512_sub_epi16(bits, _mm512_set1_epi16(1));
      mask |= static_cast<uint64_t>(_mm512_cmplt_epu16_mask(less, _mm512_set1_epi16(kInfinity16<dtype>)))
              << (32 * part);
    }
  }
  return mask;
#elif defined(EK_ISA_AVX2)
  uint64_t mask = 0;
  if constexpr (dtype == kFloat32) {
    for (int part = 0; part < 8; ++part) {
      const __m256 values = _mm256_loadu_ps(static_cast<const float*>(x) + 8 * part);
      const __m256 positive = _mm256_cmp_ps(values, _mm256_setzero_ps(), _CMP_GT_OQ);
      mask |= static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_ps(positive))) << (8 * part);
    }
  } else {
    for (int part = 0; part < 2; ++part) {
      const uint8_t* from = static_cast<const uint8_t*>(x) + 64 * part;
      const __m256i limit = _mm256_set1_epi16(static_cast<int16_t>(kInfinity16<dtype> + 1));
      const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
      const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 32));
      // as signed numbers: 0 < bits < infinity + 1
      const __m256i zero = _mm256_setzero_si256();
      const __m256i low_set = _mm256_and_si256(_mm256_cmpgt_epi16(low, zero), _mm256_cmpgt_epi16(limit, low));
      const __m256i high_set = _mm256_and_si256(_mm256_cmpgt_epi16(high, zero), _mm256_cmpgt_epi16(limit, high));
      const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(low_set, high_set), 0xd8);
      mask |= static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_epi8(bytes))) << (32 * part);
    }
  }
  return mask;
#else
  uint64_t mask = 0;
  for (int i = 0; i < 64; ++i) mask |= static_cast<uint64_t>(is_positive<dtype>(x, i)) << i;
  return mask;
#endif
}

template <Dtype dtype>
void pack_bits(const void* x, int64_t dim, uint8_t* out) {
  constexpr int64_t size = dtype == kFloat32 ? 4 : 2;
  int64_t i = 0;
  for (; i + 64 <= dim; i += 64) {
    const uint64_t bits = reverse_bits_in_bytes(positive_mask<dtype>(static_cast<const uint8_t*>(x) + size * i));
    __builtin_memcpy(out + i / 8, &bits, 8);
  }
  for (; i < dim; i += 8) {
    unsigned byte = 0;
    for (int64_t j = i; j < i + 8; ++j) byte = byte << 1 | (j < dim && is_positive<dtype>(x, j));
    out[i / 8] = static_cast<uint8_t>(byte);
  }
}

// ---- one query ----

#if defined(EK_ISA_AVX512)

// Sums of the eight lanes of each of eight vectors, in the order of the vectors.
inline __m512i sum_lanes(const __m512i (&x)[8]) {
  __m512i pairs[4];
  for (int i = 0; i < 4; ++i) {
    pairs[i] =
        _mm512_add_epi64(_mm512_unpacklo_epi64(x[2 * i], x[2 * i + 1]), _mm512_unpackhi_epi64(x[2 * i], x[2 * i + 1]));
  }
  __m512i quads[2];
  for (int i = 0; i < 2; ++i) {
    quads[i] = _mm512_add_epi64(_mm512_shuffle_i64x2(pairs[2 * i], pairs[2 * i + 1], 0x88),
                                _mm512_shuffle_i64x2(pairs[2 * i], pairs[2 * i + 1], 0xdd));
  }
  return _mm512_add_epi64(_mm512_shuffle_i64x2(quads[0], quads[1], 0x88),
                          _mm512_shuffle_i64x2(quads[0], quads[1], 0xdd));
}

inline __m512i count_difference(const uint8_t* query, const uint8_t* code, int64_t bytes) {
  __m512i sum = _mm512_setzero_si512();
  int64_t i = 0;
  for (; i + 64 <= bytes; i += 64) {
    const __m512i differ = _mm512_xor_si512(_mm512_loadu_si512(query + i), _mm512_loadu_si512(code + i));
    sum = _mm512_add_epi64(sum, _mm512_popcnt_epi64(differ));
  }
  if (i < bytes) {
    const __mmask64 rest = ~uint64_t{0} >> (64 - (bytes - i));
    const __m512i differ =
        _mm512_xor_si512(_mm512_maskz_loadu_epi8(rest, query + i), _mm512_maskz_loadu_epi8(rest, code + i));
    sum = _mm512_add_epi64(sum, _mm512_popcnt_epi64(differ));
  }
  return sum;
}

// How codes lie: apart, each in one or two vectors so that the query stays in registers; or several to a vector.
enum class Lie { anyhow, one_vector, two_vectors, four_a_vector, two_a_vector };

struct Query {
  __m512i first, second;
  __mmask64 last;  // the bytes of its last vector
};

inline __m512i ones_of_difference(const uint8_t* code, __m512i query) {
  return _mm512_popcnt_epi64(_mm512_xor_si512(query, _mm512_loadu_si512(code)));
}
inline __m512i ones_of_last(const uint8_t* code, __m512i query, __mmask64 last) {
  return _mm512_popcnt_epi64(_mm512_xor_si512(query, _mm512_maskz_loadu_epi8(last, code)));
}
inline __m512i add_neighbours(__m512i a, __m512i b) {
  return _mm512_add_epi64(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}

// Distances to eight codes; `query` is repeated where several codes share a vector.
template <Lie lie>
inline __m256i eight_distances(const Comparison& c, const uint8_t* codes, const Query& query) {
  if constexpr (lie == Lie::four_a_vector) {
    // codes 0, 4, 1, 5, 2, 6, 3, 7
    const __m512i sums =
        add_neighbours(ones_of_difference(codes, query.first), ones_of_difference(codes + 64, query.first));
    const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    return _mm512_cvtepi64_epi32(_mm512_permutexvar_epi64(order, sums));
  } else if constexpr (lie == Lie::two_a_vector) {
    const __m512i low =
        add_neighbours(ones_of_difference(codes, query.first), ones_of_difference(codes + 64, query.first));
    const __m512i high =
        add_neighbours(ones_of_difference(codes + 128, query.first), ones_of_difference(codes + 192, query.first));
    // in both, lanes 0 and 2 belong to the first code, 4 and 6 to the second, the odd ones to the next two
    const __m512i first = _mm512_setr_epi64(0, 4, 1, 5, 8, 12, 9, 13),
                  second = _mm512_setr_epi64(2, 6, 3, 7, 10, 14, 11, 15);
    return _mm512_cvtepi64_epi32(
        _mm512_add_epi64(_mm512_permutex2var_epi64(low, first, high), _mm512_permutex2var_epi64(low, second, high)));
  } else {
    __m512i sums[8];
    for (int lane = 0; lane < 8; ++lane) {
      const uint8_t* code = codes + lane * c.stride;
      if constexpr (lie == Lie::one_vector) {
        sums[lane] = ones_of_last(code, query.first, query.last);
      } else if constexpr (lie == Lie::two_vectors) {
        sums[lane] =
            _mm512_add_epi64(ones_of_difference(code, query.first), ones_of_last(code + 64, query.second, query.last));
      } else {
        sums[lane] = count_difference(c.queries, code, c.bytes);
      }
    }
    return _mm512_cvtepi64_epi32(sum_lanes(sums));
  }
}

// So many bytes ahead of the codes that are read: across the next page's start into the second cache, which the
// processor itself does not do, and then into the first.
constexpr int64_t kFetchFar = 4096, kFetchNear = 1024;

// Up to 32 codes; bit n of the answer is set where code n is nearer than the bound.
template <Lie lie>
inline uint32_t compare_group(const Comparison& c, const uint8_t* codes, int64_t count, const Query& query,
                              int32_t* out) {
  const __m256i bound = _mm256_set1_epi32(c.bounds[0]);
  uint32_t near = 0;
  int64_t n = 0;
  for (; n + 8 <= count; n += 8) {
    const uint8_t* eight = codes + n * c.stride;
    for (int64_t byte = 0; byte < 8 * c.stride; byte += 64) {
      __builtin_prefetch(eight + kFetchFar + byte, 0, 2);
      __builtin_prefetch(eight + kFetchNear + byte);
    }
    const __m256i sums = eight_distances<lie>(c, eight, query);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + n), sums);
    near |= static_cast<uint32_t>(_mm256_cmplt_epi32_mask(sums, bound)) << n;
  }
  for (; n < count; ++n) {
    out[n] = static_cast<int32_t>(_mm512_reduce_add_epi64(count_difference(c.queries, codes + n * c.stride, c.bytes)));
    near |= static_cast<uint32_t>(out[n] < c.bounds[0]) << n;
  }
  return near;
}

template <Lie lie>
void compare(const Comparison& c, const Query& query) {
  for (int64_t n = 0; n < c.count; n += kGroupCodes) {
    const int64_t here = c.count - n < kGroupCodes ? c.count - n : kGroupCodes;
    c.near[n / kGroupCodes] = compare_group<lie>(c, c.codes + n * c.stride, here, query, c.out + n);
  }
}

void distances(const Comparison& c) {
  const int64_t last_bytes = c.bytes % 64 == 0 ? 64 : c.bytes % 64;
  const bool dense = c.stride == c.bytes;
  Query query = {_mm512_setzero_si512(), _mm512_setzero_si512(), ~uint64_t{0} >> (64 - last_bytes)};
  if (dense && c.bytes == 16) {
    query.first = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(c.queries)));
    compare<Lie::four_a_vector>(c, query);
  } else if (dense && c.bytes == 32) {
    query.first = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(c.queries)));
    compare<Lie::two_a_vector>(c, query);
  } else if (c.bytes > 0 && c.bytes <= 64) {
    query.first = _mm512_maskz_loadu_epi8(query.last, c.queries);
    compare<Lie::one_vector>(c, query);
  } else if (c.bytes > 64 && c.bytes <= 128) {
    query.first = _mm512_loadu_si512(c.queries);
    query.second = _mm512_maskz_loadu_epi8(query.last, c.queries + 64);
    compare<Lie::two_vectors>(c, query);
  } else {
    compare<Lie::anyhow>(c, query);
  }
}

#else

inline int32_t code_distance(const uint8_t* query, const uint8_t* code, int64_t bytes) {
  int64_t sum = 0;
  int64_t i = 0;
#if defined(EK_ISA_AVX2)
  __m256i total = _mm256_setzero_si256();
  while (i + 32 <= bytes) {
    __m256i ones = _mm256_setzero_si256();
    for (int64_t adds = 0; adds < kByteAdds && i + 32 <= bytes; ++adds, i += 32) {
      const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(query + i));
      const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(code + i));
      ones = _mm256_add_epi8(ones, count_bytes(_mm256_xor_si256(a, b)));
    }
    total = _mm256_add_epi64(total, _mm256_sad_epu8(ones, _mm256_setzero_si256()));
  }
  if (i > 0) {
    const __m128i half = _mm_add_epi64(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
    sum = _mm_cvtsi128_si64(half) + _mm_extract_epi64(half, 1);
  }
#endif
  for (; i + 8 <= bytes; i += 8) sum += __builtin_popcountll(load_word(query + i) ^ load_word(code + i));
  if (i < bytes) sum += __builtin_popcountll(load_tail(query + i, bytes - i) ^ load_tail(code + i, bytes - i));
  return static_cast<int32_t>(sum);
}

void distances(const Comparison& c) {
  for (int64_t group = 0; group * kGroupCodes < c.count; ++group) {
    uint32_t near = 0;
    for (int64_t i = 0, n = group * kGroupCodes; i < kGroupCodes && n < c.count; ++i, ++n) {
      c.out[n] = code_distance(c.queries, c.codes + n * c.stride, c.bytes);
      near |= static_cast<uint32_t>(c.out[n] < c.bounds[0]) << i;
    }
    c.near[group] = near;
  }
}

#endif

}  // namespace

extern const HammingLoops EK_LEVEL_NAME(hamming_loops) = {
    {pack_bits<kFloat32>, pack_bits<kBFloat16>, pack_bits<kFloat16>},
    distances,
    kBlockQueries,
    block_bytes,
    lay_queries,
    kManyQueries,
    scratch_bytes,
    many_distances,
};

}  // namespace embedding_kernels

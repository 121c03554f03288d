// For hamming_loops.cpp only: words of codes, and ones in them.
#pragma once

#include "hamming.h"
#include "level.h"

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

}  // namespace
}  // namespace embedding_kernels

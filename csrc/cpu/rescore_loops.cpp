// Compiled once for each level of instruction set; see hamming_loops.cpp.
#include "floats_math.h"
#include "rescore.h"

namespace embedding_kernels {
namespace {

// Several sums at once: one alone would wait for its own additions.
constexpr int64_t kSums = 4;

// Rows of numbers: values(column) gives kWidth of them, part(column, count) the last ones.
template <class Row>
inline float dot_values(const float* query, const Row& row, int64_t dim) {
  Floats sums[kSums] = {};
  int64_t d = 0;
  for (; d + kSums * kWidth <= dim; d += kSums * kWidth) {
    for (int64_t s = 0; s < kSums; ++s) {
      const int64_t column = d + s * kWidth;
      sums[s] = multiply_add(Element<kFloat32>::load(query + column), row.values(column), sums[s]);
    }
  }
  for (; d + kWidth <= dim; d += kWidth) {
    sums[0] = multiply_add(Element<kFloat32>::load(query + d), row.values(d), sums[0]);
  }
  if (d < dim) sums[1] = multiply_add(Element<kFloat32>::load(query + d), row.part(d, dim - d), sums[1]);
  return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <Dtype dtype>
struct FloatRow {
  const void* data;
  Floats values(int64_t column) const { return Element<dtype>::load(at<dtype>(data, column)); }
  Floats part(int64_t column, int64_t count) const { return load_part<dtype>(at<dtype>(data, column), count); }
};

struct Int8Row {
  const int8_t* data;
  static Floats widen(const int8_t* from) {
#if defined(EK_ISA_AVX512)
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(EK_ISA_AVX2)
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
    Floats value;
    for (int64_t i = 0; i < kWidth; ++i) value[i] = from[i];
    return value;
#endif
  }
  Floats values(int64_t column) const { return widen(data + column); }
  Floats part(int64_t column, int64_t count) const {
    int8_t buffer[kWidth] = {};
    for (int64_t i = 0; i < count; ++i) buffer[i] = data[column + i];
    return widen(buffer);
  }
};

template <Dtype dtype>
float dot_floats(const float* query, const void* row, int64_t dim) {
  return dot_values(query, FloatRow<dtype>{row}, dim);
}

float dot_int8(const float* query, const void* row, int64_t dim) {
  return dot_values(query, Int8Row{static_cast<const int8_t*>(row)}, dim);
}

// kWidth values of the query where the bit is 1, else 0; the first bit is the lowest.
inline Floats where_set(const float* query, uint32_t bits) {
#if defined(EK_ISA_AVX512)
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>(bits), query);
#else
  Ints select;
  for (int i = 0; i < kWidth; ++i) select[i] = 1 << i;
  const Ints set = ((static_cast<int32_t>(bits) - Ints{}) & select) == select;
  return reinterpret_cast<Floats>(set & reinterpret_cast<Ints>(Element<kFloat32>::load(query)));
#endif
}

float dot_bits(const float* query, const void* row, int64_t dim) {
  const auto* codes = static_cast<const uint8_t*>(row);
  const int64_t bytes = (dim + 7) / 8;
  Floats sums[kSums] = {};
  int64_t byte = 0;
  for (; byte + 8 <= bytes; byte += 8) {
    uint64_t word;
    __builtin_memcpy(&word, codes + byte, 8);
    for (int64_t i = 0; i < 64; i += kWidth) {
      sums[i / kWidth % kSums] += where_set(query + 8 * byte + i, static_cast<uint32_t>(word >> i));
    }
  }
  for (; byte < bytes; ++byte) {
    const uint32_t bits = codes[byte];
    for (int64_t i = 0; i < 8; i += kWidth) sums[0] += where_set(query + 8 * byte + i, bits >> i);
  }
  return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <Dtype dtype>
void lay_query(const void* query, const float* scale, int64_t dim, bool bits, float* out) {
  for (int64_t d = 0; d < (dim + 15) / 16 * 16; ++d) out[d] = 0;
  for (int64_t d = 0; d < dim; d += kWidth) {
    const int64_t count = dim - d < kWidth ? dim - d : kWidth;
    Floats values = load_part<dtype>(at<dtype>(query, d), count);
    if (scale != nullptr) values *= load_part<kFloat32>(scale + d, count);
    for (int64_t i = 0; i < count; ++i) {
      // bit 0 of a code is the top bit of its byte
      out[bits ? (d + i) ^ 7 : d + i] = values[i];
    }
  }
}

}  // namespace

extern const RescoreLoops EK_LEVEL_NAME(rescore_loops) = {
    {lay_query<kFloat32>, lay_query<kBFloat16>, lay_query<kFloat16>},
    {dot_floats<kFloat32>, dot_floats<kBFloat16>, dot_floats<kFloat16>, dot_int8, dot_bits},
};

}  // namespace embedding_kernels

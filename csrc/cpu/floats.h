// For *_loops.cpp only: vectors of floats by the compiler's vector extension, as wide as the level's registers, with
// loads from and stores to every activation dtype. Everything has internal linkage.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "level.h"

namespace embedding_kernels {
namespace {

#if defined(EK_ISA_AVX512)
constexpr int64_t kWidth = 16;
#elif defined(EK_ISA_AVX2)
constexpr int64_t kWidth = 8;
#else
constexpr int64_t kWidth = 4;
#endif

typedef float Floats __attribute__((vector_size(kWidth * 4)));
typedef int32_t Ints __attribute__((vector_size(kWidth * 4)));
typedef uint32_t Words __attribute__((vector_size(kWidth * 4)));
typedef uint16_t Halves __attribute__((vector_size(kWidth * 2)));

// less zero, which the compiler drops; plus zero it keeps, for the sake of -0
inline Floats broadcast(float value) { return value - Floats{}; }

// a * b + c, rounded once where the level can: contraction by the compiler is off
inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(EK_ISA_AVX512)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(EK_ISA_AVX2)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// a cast between vectors of one size keeps the bits
inline Floats float_of_bits(Words bits) { return reinterpret_cast<Floats>(bits); }
inline Words bits_of_float(Floats value) { return reinterpret_cast<Words>(value); }

#if !defined(EK_ISA_AVX512) && !defined(EK_ISA_AVX2)

// float16 by arithmetic on the bits: shifting exponent and mantissa into place leaves the exponent 112 too small, which
// a product by 2^112 mends, subnormals included; infinity and NaN keep the largest exponent.
inline Floats widen_float16(Words half) {
  const Words sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  const Floats scaled = float_of_bits(magnitude << 13) * 0x1p112f;
  const Words special = magnitude >= 0x7c00u;
  return float_of_bits((bits_of_float(scaled) | (special & 0x7f800000u)) | sign);
}

// Rounds to nearest even. Adding a number whose last place is the last place kept does the rounding.
inline uint16_t narrow_float16(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  const uint32_t sign = bits >> 16 & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (bits >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (bits < 0x38800000u) {  // subnormal: the last place kept is 2^-24, that of 0.5 in float32
    float magnitude;
    __builtin_memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    __builtin_memcpy(&bits, &magnitude, 4);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
  }
  const uint32_t rounded = bits + 0xfffu + (bits >> 13 & 1u);
  return static_cast<uint16_t>(sign | (rounded - 0x38000000u) >> 13);
}

#endif

template <Dtype dtype>
struct Element;

template <>
struct Element<kFloat32> {
  typedef float Stored;
  static Floats load(const void* from) {
    Floats value;
    __builtin_memcpy(&value, from, sizeof(value));
    return value;
  }
  static void store(Floats value, void* to) { __builtin_memcpy(to, &value, sizeof(value)); }
};

template <>
struct Element<kBFloat16> {
  typedef uint16_t Stored;
  static Floats load(const void* from) {
    Halves halves;
    __builtin_memcpy(&halves, from, sizeof(halves));
    return float_of_bits(__builtin_convertvector(halves, Words) << 16);
  }
  static void store(Floats value, void* to) {
    const Words bits = bits_of_float(value);
    const Words is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    const Words rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    // a NaN keeps its sign and is made quiet: rounding could carry it to infinity
    const Halves halves = __builtin_convertvector(is_nan ? (bits >> 16 | 0x40u) : rounded, Halves);
    __builtin_memcpy(to, &halves, sizeof(halves));
  }
};

template <>
struct Element<kFloat16> {
  typedef uint16_t Stored;
#if defined(EK_ISA_AVX512)
  static Floats load(const void* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
  }
  static void store(Floats value, void* to) {
    _mm256_storeu_si256(static_cast<__m256i*>(to), _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }
#elif defined(EK_ISA_AVX2)
  static Floats load(const void* from) { return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(from))); }
  static void store(Floats value, void* to) {
    _mm_storeu_si128(static_cast<__m128i*>(to), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }
#else
  static Floats load(const void* from) {
    Halves halves;
    __builtin_memcpy(&halves, from, sizeof(halves));
    return widen_float16(__builtin_convertvector(halves, Words));
  }
  static void store(Floats value, void* to) {
    Halves halves;
    for (int64_t i = 0; i < kWidth; ++i) halves[i] = narrow_float16(value[i]);
    __builtin_memcpy(to, &halves, sizeof(halves));
  }
#endif
};

// The last 1 to kWidth - 1 values of a row, through a buffer so that nothing past the row is touched.
template <Dtype dtype>
inline Floats load_part(const void* from, int64_t count) {
  typename Element<dtype>::Stored buffer[kWidth] = {};
  for (int64_t i = 0; i < count; ++i) {
    buffer[i] = static_cast<const typename Element<dtype>::Stored*>(from)[i];
  }
  return Element<dtype>::load(buffer);
}

template <Dtype dtype>
inline void store_part(Floats value, void* to, int64_t count) {
  typename Element<dtype>::Stored buffer[kWidth];
  Element<dtype>::store(value, buffer);
  for (int64_t i = 0; i < count; ++i) static_cast<typename Element<dtype>::Stored*>(to)[i] = buffer[i];
}

template <Dtype dtype>
inline const void* at(const void* row, int64_t column) {
  return static_cast<const typename Element<dtype>::Stored*>(row) + column;
}
template <Dtype dtype>
inline void* at(void* row, int64_t column) {
  return static_cast<typename Element<dtype>::Stored*>(row) + column;
}

// A vector at `column`: whole, or (`partial`) its first `part` values. Which one is known when compiled: a branch at
// every load would keep sums out of registers.
template <Dtype dtype, bool partial>
inline Floats load_at(const void* row, int64_t column, int64_t part) {
  if constexpr (partial) {
    return load_part<dtype>(at<dtype>(row, column), part);
  } else {
    return Element<dtype>::load(at<dtype>(row, column));
  }
}
template <Dtype dtype, bool partial>
inline void store_at(Floats value, void* row, int64_t column, int64_t part) {
  if constexpr (partial) {
    store_part<dtype>(value, at<dtype>(row, column), part);
  } else {
    Element<dtype>::store(value, at<dtype>(row, column));
  }
}

// Calls body.template operator()<partial>(column, part) for whole vectors of `columns`, then for the rest.
template <class Body>
inline void for_vectors(int64_t columns, const Body& body) {
  int64_t c = 0;
  for (; c + kWidth <= columns; c += kWidth) body.template operator()<false>(c, int64_t{0});
  if (c < columns) body.template operator()<true>(c, columns - c);
}

// ---- choice by comparison; the compiler's own `?:` on vectors goes through memory at some levels ----

#if defined(EK_ISA_AVX512)

typedef __mmask16 Mask;
// Lanes where `best` stays the greatest once x has come: it is at least x, or NaN.
inline Mask stays_greatest(Floats best, Floats x) {
  return _mm512_cmp_ps_mask(best, x, _CMP_GE_OQ) | _mm512_cmp_ps_mask(best, best, _CMP_UNORD_Q);
}
inline Floats choose(Mask mask, Floats a, Floats b) { return _mm512_mask_blend_ps(mask, b, a); }
inline Ints choose(Mask mask, Ints a, Ints b) {
  return reinterpret_cast<Ints>(
      _mm512_mask_blend_epi32(mask, reinterpret_cast<__m512i>(b), reinterpret_cast<__m512i>(a)));
}
inline Floats zero_if_nan(Floats x) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, x, _CMP_ORD_Q), x); }

#else

typedef Ints Mask;
inline Mask stays_greatest(Floats best, Floats x) { return (best >= x) | (best != best); }
inline Ints choose(Mask mask, Ints a, Ints b) { return (mask & a) | (~mask & b); }
inline Floats choose(Mask mask, Floats a, Floats b) {
  return reinterpret_cast<Floats>(choose(mask, reinterpret_cast<Ints>(a), reinterpret_cast<Ints>(b)));
}
inline Floats zero_if_nan(Floats x) { return reinterpret_cast<Floats>((x == x) & reinterpret_cast<Ints>(x)); }

#endif

}  // namespace
}  // namespace embedding_kernels

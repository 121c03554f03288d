// For *_loops.cpp only: elementary functions of vectors of floats, and the transposition of blocks of words.
#pragma once

#include "floats.h"

namespace embedding_kernels {
namespace {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;
constexpr float kInfinity = __builtin_inff();

inline Floats maximum(Floats a, Floats b) {
#if defined(EK_ISA_AVX512)
  return _mm512_max_ps(a, b);
#elif defined(EK_ISA_AVX2)
  return _mm256_max_ps(a, b);
#else
  return choose(a > b, a, b);
#endif
}

inline Mask less(Floats a, Floats b) {
#if defined(EK_ISA_AVX512)
  return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ);
#else
  return a < b;
#endif
}
inline Mask equal(Floats a, Floats b) {
#if defined(EK_ISA_AVX512)
  return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ);
#else
  return a == b;
#endif
}
// Lanes where low <= x <= high.
inline Mask between(Ints x, Ints low, Ints high) {
#if defined(EK_ISA_AVX512)
  const __m512i value = reinterpret_cast<__m512i>(x);
  return _mm512_cmp_epi32_mask(value, reinterpret_cast<__m512i>(low), _MM_CMPINT_NLT) &
         _mm512_cmp_epi32_mask(value, reinterpret_cast<__m512i>(high), _MM_CMPINT_LE);
#else
  return (x >= low) & (x <= high);
#endif
}

// Polynomials of least relative error for 2^f on [0, 1), with 1 and 2 exact at the ends.
template <int degree>
inline Floats exp2_polynomial(Floats f) {
  static_assert(degree == 4 || degree == 6);
  if constexpr (degree == 4) {  // 3.4e-6
    Floats sum = broadcast(0x1.bc31dap-7f);
    sum = multiply_add(sum, f, broadcast(0x1.aa3fcap-5f));
    sum = multiply_add(sum, f, broadcast(0x1.ee5884p-3f));
    sum = multiply_add(sum, f, broadcast(0x1.62d51cp-1f));
    return multiply_add(sum, f, broadcast(1.0f));
  } else {  // 2.3e-9
    Floats sum = broadcast(0x1.c765a8p-13f);
    sum = multiply_add(sum, f, broadcast(0x1.462150p-10f));
    sum = multiply_add(sum, f, broadcast(0x1.3d217cp-7f));
    sum = multiply_add(sum, f, broadcast(0x1.c686b4p-5f));
    sum = multiply_add(sum, f, broadcast(0x1.ebfd74p-3f));
    sum = multiply_add(sum, f, broadcast(0x1.62e42ap-1f));
    return multiply_add(sum, f, broadcast(1.0f));
  }
}

// 2^x; 0 for -infinity, NaN for NaN. The degree sets the precision.
template <int degree>
inline Floats exp2(Floats x) {
#if defined(EK_ISA_AVX512)
  // the fraction above the floor, which for infinities is 0; scalef takes the floor itself
  const Floats fraction = _mm512_reduce_ps(x, 0x09);
  return _mm512_scalef_ps(exp2_polynomial<degree>(fraction), x);
#else
  const Floats inside = choose(less(x, broadcast(-127.0f)), broadcast(-127.0f), x);
  const Floats bounded = choose(less(broadcast(127.5f), inside), broadcast(127.5f), inside);
  const Ints truncated = __builtin_convertvector(bounded, Ints);
  const Floats back = __builtin_convertvector(truncated, Floats);
  const Ints floor = truncated + (back > bounded);  // true is -1
  const Floats fraction = bounded - __builtin_convertvector(floor, Floats);
  // an exponent of -127 makes the factor 0
  const Floats power = float_of_bits(reinterpret_cast<Words>(floor + 127) << 23);
  return exp2_polynomial<degree>(fraction) * power;
#endif
}

// ln x for normal x > 0; NaN for NaN. By the series of the area tangent.
inline Floats log_of(Floats x) {
  const Words bits = bits_of_float(x);
  // the mantissa lies between the square roots of 1/2 and of 2
  const Ints exponent = reinterpret_cast<Ints>((bits + (0x3f800000u - 0x3f3504f3u)) >> 23) - 127;
  const Floats mantissa = float_of_bits(bits - (reinterpret_cast<Words>(exponent) << 23));
  const Floats s = (mantissa - 1.0f) / (mantissa + 1.0f), square = s * s;
  Floats sum = broadcast(1.0f / 9.0f);
  sum = multiply_add(sum, square, broadcast(1.0f / 7.0f));
  sum = multiply_add(sum, square, broadcast(1.0f / 5.0f));
  sum = multiply_add(sum, square, broadcast(1.0f / 3.0f));
  sum = multiply_add(sum, square, broadcast(1.0f));
  const Floats result = multiply_add(__builtin_convertvector(exponent, Floats), broadcast(kLn2), 2.0f * s * sum);
  return choose(equal(x, x), result, x);
}

// tanh x: a polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel.
inline Floats tanh_of(Floats x) {
  const Floats magnitude = float_of_bits(bits_of_float(x) & 0x7fffffffu);
  const Floats square = x * x;
  Floats sum = broadcast(-5.70498872745e-3f);
  sum = multiply_add(sum, square, broadcast(2.06390887954e-2f));
  sum = multiply_add(sum, square, broadcast(-5.37397155531e-2f));
  sum = multiply_add(sum, square, broadcast(1.33314422036e-1f));
  sum = multiply_add(sum, square, broadcast(-3.33332819422e-1f));
  const Floats near = multiply_add(sum * square, x, x);
  const Floats far = 1.0f - 2.0f / (exp2<6>(magnitude * (2.0f * kLog2E)) + 1.0f);
  const Floats signed_far = float_of_bits(bits_of_float(far) | (bits_of_float(x) & 0x80000000u));
  return choose(less(magnitude, broadcast(0.625f)), near, signed_far);
}

inline float sum_of(Floats x) {
#if defined(EK_ISA_AVX512)
  return _mm512_reduce_add_ps(x);
#else
  float total = 0;
  for (int64_t i = 0; i < kWidth; ++i) total += x[i];
  return total;
#endif
}

// ---- transposition of kWidth x kWidth words, by swaps of ever larger squares ----

template <int... lanes>
struct Lanes {};

template <int step, int... lane>
inline void swap_squares(Words& a, Words& b, Lanes<lane...>) {
  constexpr int width = kWidth;
  const Words low = __builtin_shuffle(a, b, Ints{((lane & step) ? width + lane - step : lane)...});
  b = __builtin_shuffle(a, b, Ints{((lane & step) ? width + lane : lane + step)...});
  a = low;
}

template <int step = 1>
inline void transpose(Words (&rows)[kWidth]) {
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) {
    if (!(i & step)) swap_squares<step>(rows[i], rows[i + step], Lanes<__integer_pack(kWidth)...>());
  }
  if constexpr (2 * step < kWidth) transpose<2 * step>(rows);
}

}  // namespace
}  // namespace embedding_kernels

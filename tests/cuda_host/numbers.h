// Narrow floating-point numbers, to nearest even.
#pragma once

#include <bit>
#include <cstdint>

namespace emulation {

inline uint16_t to_bfloat16(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float from_bfloat16(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }
inline uint16_t to_float16(float x) { return std::bit_cast<uint16_t>(static_cast<_Float16>(x)); }
inline float from_float16(uint16_t bits) { return static_cast<float>(std::bit_cast<_Float16>(bits)); }
// ten bits of mantissa, ties away from zero
inline uint32_t to_tf32(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  return x != x ? bits : (bits + 0x1000) & ~0x1fffu;
}

}  // namespace emulation

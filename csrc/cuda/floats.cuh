// Element types of the kernels and their way to float32 and back, by one value or by 16 bytes.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

#include "ptx.cuh"

namespace embedding_kernels::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

__device__ inline float widen(float value) { return value; }
__device__ inline float widen(BFloat16 value) { return ptx::float_of(static_cast<uint32_t>(value.bits) << 16); }
__device__ inline float widen(Float16 value) { return ptx::widen_float16(value.bits); }

// float32 to T, to nearest even.
template <class T>
__device__ inline T round_to(float value);
template <>
__device__ inline float round_to<float>(float value) {
  return value;
}
template <>
__device__ inline BFloat16 round_to<BFloat16>(float value) {
  return {ptx::round_bfloat16(value)};
}
template <>
__device__ inline Float16 round_to<Float16>(float value) {
  return {ptx::round_float16(value)};
}

// Two neighbours as one word, the first in the low half: what fragments of 16-bit values are made of.
template <class T>
__device__ inline uint32_t pack_pair(float first, float second);
template <>
__device__ inline uint32_t pack_pair<BFloat16>(float first, float second) {
  return ptx::pack_bfloat16(first, second);
}
template <>
__device__ inline uint32_t pack_pair<Float16>(float first, float second) {
  return ptx::pack_float16(first, second);
}
template <class T>
__device__ inline void unpack_pair(uint32_t pair, float& first, float& second) {
  first = widen(T{static_cast<uint16_t>(pair & 0xffffu)});
  second = widen(T{static_cast<uint16_t>(pair >> 16)});
}

// Values of 16 bytes: the widest access of a thread.
template <class T>
constexpr int kWide = 16 / static_cast<int>(sizeof(T));

// N values from `from` as float32: N is 1, or kWide<T> where `from` is a multiple of 16 bytes.
template <class T, int N>
__device__ inline void load(const T* from, float (&values)[N]) {
  static_assert(N == 1 || N == kWide<T>);
  if constexpr (N == 1) {
    values[0] = widen(*from);
  } else {
    const ptx::Words4 w = ptx::load_words4(from);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        values[i] = ptx::float_of(w.word[i]);
      } else {
        unpack_pair<T>(w.word[i], values[2 * i], values[2 * i + 1]);
      }
    }
  }
}
template <class T, int N>
__device__ inline void store(T* to, const float (&values)[N]) {
  static_assert(N == 1 || N == kWide<T>);
  if constexpr (N == 1) {
    *to = round_to<T>(values[0]);
  } else {
    ptx::Words4 w;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        w.word[i] = ptx::bits_of(values[i]);
      } else {
        w.word[i] = pack_pair<T>(values[2 * i], values[2 * i + 1]);
      }
    }
    ptx::store_words4(to, w);
  }
}

// Sum and largest value over a warp; every lane gets it. The order of additions is fixed.
__device__ inline float warp_sum(float value) {
#pragma unroll
  for (uint32_t lanes = 16; lanes > 0; lanes /= 2) value += ptx::shuffle_xor(value, lanes);
  return value;
}
__device__ inline float warp_max(float value) {
#pragma unroll
  for (uint32_t lanes = 16; lanes > 0; lanes /= 2) value = fmaxf(value, ptx::shuffle_xor(value, lanes));
  return value;
}

// Calls `body(T{})` with the element type of a dtype.
template <class Body>
void with_float_type(torch::headeronly::ScalarType dtype, const Body& body) {
  using torch::headeronly::ScalarType;
  if (dtype == ScalarType::Float) {
    body(float{});
  } else if (dtype == ScalarType::BFloat16) {
    body(BFloat16{});
  } else {
    body(Float16{});
  }
}

// Whether rows at `data`, `stride` elements apart and `width` long, may be read 16 bytes at a time.
template <class T>
bool rows_are_wide(const T* data, int64_t stride, int64_t width) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % kWide<T> == 0 && width % kWide<T> == 0;
}

}  // namespace embedding_kernels::cuda

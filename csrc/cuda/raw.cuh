// Values as they lie in memory: loaded first and widened where they are used, so that a thread has several loads under
// way at a time; and values whose type is known at run time.
#pragma once

#include <type_traits>

#include "floats.cuh"

namespace embedding_kernels::cuda {

// N is 1, or kWide<T>: then addresses are multiples of 16 bytes.
template <class T, int N>
struct Raw {
  static_assert(N == kWide<T>);
  ptx::Words4 words;
};
template <class T>
struct Raw<T, 1> {
  T value;
};

template <class T, int N>
__device__ inline Raw<T, N> load_raw(const T* from) {
  if constexpr (N == 1) {
    return {*from};
  } else {
    return {ptx::load_constant_words4(from)};
  }
}

template <class T, int N>
__device__ inline void widen(const Raw<T, N>& raw, float (&values)[N]) {
  if constexpr (N == 1) {
    values[0] = widen(raw.value);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        values[i] = ptx::float_of(raw.words.word[i]);
      } else {
        unpack_pair<T>(raw.words.word[i], values[2 * i], values[2 * i + 1]);
      }
    }
  }
}

// Calls `body` with the values of an access as a constant.
template <class T, class Body>
void with_access(bool wide, const Body& body) {
  if (wide) {
    body(std::integral_constant<int, kWide<T>>());
  } else {
    body(std::integral_constant<int, 1>());
  }
}

// N floats, in steps of 16 bytes where N is not 1.
template <int N>
__device__ inline void load_floats(const float* from, float (&values)[N]) {
  if constexpr (N == 1) {
    values[0] = *from;
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const ptx::Words4 w = ptx::load_constant_words4(from + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) values[i + j] = ptx::float_of(w.word[j]);
    }
  }
}
template <int N>
__device__ inline void store_floats(float* to, const float (&values)[N]) {
  if constexpr (N == 1) {
    *to = values[0];
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      ptx::Words4 w;
#pragma unroll
      for (int j = 0; j < 4; ++j) w.word[j] = ptx::bits_of(values[i + j]);
      ptx::store_words4(to + i, w);
    }
  }
}

// An element type as a value.
enum class Element : int { kFloat32, kBFloat16, kFloat16 };

inline Element element_of(torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  return dtype == ScalarType::Float      ? Element::kFloat32
         : dtype == ScalarType::BFloat16 ? Element::kBFloat16
                                         : Element::kFloat16;
}

__device__ inline float load_as(Element element, const void* from, int64_t at) {
  if (element == Element::kFloat32) return static_cast<const float*>(from)[at];
  const uint16_t bits = static_cast<const uint16_t*>(from)[at];
  return element == Element::kBFloat16 ? widen(BFloat16{bits}) : widen(Float16{bits});
}
__device__ inline void store_as(Element element, void* to, int64_t at, float value) {
  if (element == Element::kFloat32) {
    static_cast<float*>(to)[at] = value;
  } else {
    const bool wide_range = element == Element::kBFloat16;
    static_cast<uint16_t*>(to)[at] = wide_range ? ptx::round_bfloat16(value) : ptx::round_float16(value);
  }
}

}  // namespace embedding_kernels::cuda

// Compiled once for each level of instruction set. No torch, no STL, no threads (see hamming_loops.cpp).
#include "floats_math.h"
#include "paragraph_vector.h"

namespace embedding_kernels {
namespace {

// Vectors of columns that stay in registers while the rows go by.
constexpr int64_t kStrip = kWidth == 16 ? 8 : 4;
// Words lie anywhere in memory: their rows are asked for this many rows ahead.
constexpr int64_t kPrefetchRows = 8;
constexpr int64_t kPrefetchColumns = 256;
constexpr int64_t kLine = 16;  // floats

template <bool partial = false>
inline Floats load(const float* from, int64_t part = 0) {
  return load_at<kFloat32, partial>(from, 0, part);
}
template <bool partial = false>
inline void store(Floats value, float* to, int64_t part = 0) {
  store_at<kFloat32, partial>(value, to, 0, part);
}

inline void prefetch(const float* row, int64_t columns) {
  const int64_t end = columns < kPrefetchColumns ? columns : kPrefetchColumns;
  for (int64_t c = 0; c < end; c += kLine) __builtin_prefetch(row + c);
}

void code(const float* z, int64_t columns, float* codes, float* slopes) {
  for (int64_t c = 0; c < columns; c += kWidth) {
    const int64_t part = columns - c;
    const bool whole = part >= kWidth;
    const Floats x = whole ? load(z + c) : load<true>(z + c, part);
    // y (1 - y) is even in z: e = exp(-|z|) cannot overflow
    const Floats magnitude = float_of_bits(bits_of_float(x) & 0x7fffffffu);
    const Floats e = exp2<6>(magnitude * -kLog2E);
    const Floats slope = 2.0f * e / ((1.0f + e) * (1.0f + e));
    const Floats bits = choose(less(Floats{}, x), broadcast(1.0f), broadcast(-1.0f));
    if (whole) {
      store(bits, codes + c), store(slope, slopes + c);
    } else {
      store<true>(bits, codes + c, part), store<true>(slope, slopes + c, part);
    }
  }
}

template <int64_t vectors, bool partial>
inline void add_strip(const float* rows, int64_t stride, const int32_t* indices, const float* weights, int64_t count,
                      int64_t part, float* out) {
  Floats sums[vectors];
#pragma GCC unroll 8
  for (int64_t v = 0; v < vectors; ++v) sums[v] = load<partial>(out + v * kWidth, part);
  for (int64_t i = 0; i < count; ++i) {
    const float* row = rows + (indices ? indices[i] : i) * stride;
    const Floats weight = broadcast(weights[i]);
#pragma GCC unroll 8
    for (int64_t v = 0; v < vectors; ++v) {
      sums[v] = multiply_add(weight, load<partial>(row + v * kWidth, part), sums[v]);
    }
  }
#pragma GCC unroll 8
  for (int64_t v = 0; v < vectors; ++v) store<partial>(sums[v], out + v * kWidth, part);
}

void add_rows(const float* rows, int64_t stride, const int32_t* indices, const float* weights, int64_t count,
              int64_t columns, float* out) {
  int64_t c = 0;
  const auto run = [&]<int64_t vectors>() {
    for (; c + vectors * kWidth <= columns; c += vectors * kWidth) {
      add_strip<vectors, false>(rows + c, stride, indices, weights, count, 0, out + c);
    }
  };
  run.template operator()<kStrip>();
  run.template operator()<4>();
  run.template operator()<2>();
  run.template operator()<1>();
  if (c < columns) add_strip<1, true>(rows + c, stride, indices, weights, count, columns - c, out + c);
}

// Several rows at a time, so that one's additions do not wait for another's.
template <int64_t together>
inline void dots_together(const float* const* rows, const float* vector, int64_t columns, float* out) {
  Floats sums[together] = {};
  int64_t c = 0;
  for (; c + kWidth <= columns; c += kWidth) {
    const Floats x = load(vector + c);
#pragma GCC unroll 4
    for (int64_t i = 0; i < together; ++i) sums[i] = multiply_add(x, load(rows[i] + c), sums[i]);
  }
  if (c < columns) {
    const Floats x = load<true>(vector + c, columns - c);
    for (int64_t i = 0; i < together; ++i) sums[i] = multiply_add(x, load<true>(rows[i] + c, columns - c), sums[i]);
  }
  for (int64_t i = 0; i < together; ++i) out[i] = sum_of(sums[i]);
}

void dots(const float* rows, int64_t stride, const int32_t* indices, int64_t count, const float* vector,
          int64_t columns, float* out) {
  const auto row = [&](int64_t i) { return rows + (indices ? indices[i] : i) * stride; };
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    for (int64_t ahead = i + kPrefetchRows; indices && ahead < i + kPrefetchRows + 4 && ahead < count; ++ahead) {
      prefetch(row(ahead), columns);
    }
    const float* const four[4] = {row(i), row(i + 1), row(i + 2), row(i + 3)};
    dots_together<4>(four, vector, columns, out + i);
  }
  for (; i < count; ++i) {
    const float* const one = row(i);
    dots_together<1>(&one, vector, columns, out + i);
  }
}

float exponentials(float* values, int64_t count, float* sum) {
  float largest = values[0];
  for (int64_t i = 1; i < count; ++i) largest = values[i] > largest ? values[i] : largest;
  Floats sums = {};
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    const Floats e = exp2<6>((load(values + i) - largest) * kLog2E);
    store(e, values + i);
    sums += e;
  }
  float total = sum_of(sums);
  if (i < count) {
    const Floats e = exp2<6>((load<true>(values + i, count - i) - largest) * kLog2E);
    store<true>(e, values + i, count - i);
    for (int64_t lane = 0; lane < count - i; ++lane) total += e[lane];
  }
  *sum = total;
  return largest;
}

float token_terms(float* logits, float* sums, int64_t count) {
  float loss = 0;
  for (int64_t i = 0; i < count; i += kWidth) {
    const int64_t part = count - i;
    const bool whole = part >= kWidth;
    const Floats d = whole ? load(logits + i) : load<true>(logits + i, part);
    const Floats sum = whole ? load(sums + i) : load<true>(sums + i, part);
    // divided by e^d where that is large: nothing overflows
    const Mask large = less(Floats{}, d);
    const Floats magnitude = float_of_bits(bits_of_float(d) & 0x7fffffffu);
    const Floats e = exp2<6>(magnitude * -kLog2E);
    const Floats scaled = choose(large, sum * e, sum), unit = choose(large, broadcast(1.0f), e);
    const Floats below = scaled + unit;
    const Floats missing = scaled / below;
    const Floats inverse = choose(large, e, broadcast(1.0f)) / below;
    const Floats lost = log_of(below) - choose(large, Floats{}, d);
    if (whole) {
      store(missing, logits + i), store(inverse, sums + i);
    } else {
      store<true>(missing, logits + i, part), store<true>(inverse, sums + i, part);
    }
    for (int64_t lane = 0; lane < (whole ? kWidth : part); ++lane) loss += lost[lane];
  }
  return loss;
}

}  // namespace

extern const ParagraphVectorLoops EK_LEVEL_NAME(paragraph_vector_loops) = {
    code, add_rows, dots, exponentials, token_terms,
};

}  // namespace embedding_kernels

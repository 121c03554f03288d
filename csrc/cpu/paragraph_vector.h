// Inner loops of the paragraph-vector family: one table a level of instruction set, filled by
// paragraph_vector_loops.cpp. Rows lie `stride` floats apart; row(i) is rows + indices[i] * stride, or, where indices
// is null, rows + i * stride.
#pragma once

#include <cstdint>

namespace embedding_kernels {

struct ParagraphVectorLoops {
  // codes[c] = 1 where z[c] > 0, else -1; slopes[c] = 2 y (1 - y) with y = sigmoid(z[c]). In place is fine.
  void (*code)(const float* z, int64_t columns, float* codes, float* slopes);

  // out[c] += sum over i of weights[i] * row(i)[c].
  void (*add_rows)(const float* rows, int64_t stride, const int32_t* indices, const float* weights, int64_t count,
                   int64_t columns, float* out);

  // out[i] = row(i) . vector.
  void (*dots)(const float* rows, int64_t stride, const int32_t* indices, int64_t count, const float* vector,
               int64_t columns, float* out);

  // values[i] = exp(values[i] - largest) for the largest of count >= 1 values; returns it, and their sum.
  float (*exponentials)(float* values, int64_t count, float* sum);

  // For tokens with logit d and sum S of the negatives' exponentials (both less the same shift): inverse = 1 / (S +
  // e^d) into `sums`, missing = S / (S + e^d) into `logits`; returns the sum of log(S + e^d) - d.
  float (*token_terms)(float* logits, float* sums, int64_t count);
};

extern const ParagraphVectorLoops paragraph_vector_loops_portable;
extern const ParagraphVectorLoops paragraph_vector_loops_avx2;
extern const ParagraphVectorLoops paragraph_vector_loops_avx512;

const ParagraphVectorLoops& paragraph_vector_loops();

}  // namespace embedding_kernels

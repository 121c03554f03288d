// Splitting for rescoring. Knows no torch and no threads; see hamming_driver.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "rescore.h"
#include "selection.h"

namespace embedding_kernels {

struct Rescoring {
  const uint8_t* queries;  // [count, dim]
  int64_t count, query_stride, dim;
  Dtype query_dtype;
  const int64_t* candidates;  // [count, candidate_count]
  int64_t candidate_count, candidate_stride;
  const uint8_t* rows;  // strides in bytes
  int64_t row_stride;
  int row_kind;
  const float* scale;  // [dim] or null
  int64_t k;
  float* scores;     // [count, k]
  int64_t* indices;  // [count, k]
};

// Rows are fetched from anywhere in memory: so many candidates ahead.
constexpr int64_t kFetchAhead = 6;
constexpr int64_t kCandidatesATask = 256;
constexpr int64_t kScoresAtOnce = int64_t{1} << 22;

inline void fetch(const Rescoring& r, const int64_t* candidates, int64_t place, int64_t row_bytes) {
  if (place >= r.candidate_count || candidates[place] < 0) return;
  const uint8_t* row = r.rows + candidates[place] * r.row_stride;
  for (int64_t byte = 0; byte < row_bytes; byte += 64) __builtin_prefetch(row + byte);
}

// Scores of candidates [begin, end) of one query.
inline void score_part(const RescoreLoops& loops, const Rescoring& r, int64_t query, int64_t begin, int64_t end,
                       std::vector<float>& laid_out, Scored* out) {
  constexpr int64_t kRowBits[kRowKinds] = {32, 16, 16, 8, 1};
  const int64_t query_bytes = r.query_stride * (r.query_dtype == kFloat32 ? 4 : 2);
  loops.lay_query[r.query_dtype](r.queries + query * query_bytes, r.scale, r.dim, r.row_kind == kBitRows,
                                 laid_out.data());
  const int64_t* candidates = r.candidates + query * r.candidate_stride;
  const int64_t row_bytes = r.dim * kRowBits[r.row_kind] / 8;
  const auto dot = loops.dot[r.row_kind];
  for (int64_t c = begin; c < begin + kFetchAhead; ++c) fetch(r, candidates, c, row_bytes);
  for (int64_t c = begin; c < end; ++c) {
    fetch(r, candidates, c + kFetchAhead, row_bytes);
    const int64_t index = candidates[c];
    const float absent = -std::numeric_limits<float>::infinity();
    out[c] = index < 0 ? Scored{absent, -1} : Scored{dot(laid_out.data(), r.rows + index * r.row_stride, r.dim), index};
  }
}

template <class ParallelFor>
void rescore_topk(const RescoreLoops& loops, const Rescoring& r, int64_t threads, const ParallelFor& parallel_for) {
  const int64_t width = (r.dim + 15) / 16 * 16;
  const int64_t at_once = std::max<int64_t>(kScoresAtOnce / std::max<int64_t>(r.candidate_count, 1), threads);
  std::vector<Scored> scored(std::min(r.count, at_once) * r.candidate_count);
  for (int64_t first = 0; first < r.count; first += at_once) {
    const int64_t queries = std::min(at_once, r.count - first);
    // few queries: their candidates are shared out
    const int64_t parts = queries >= 2 * threads ? 1 : r.candidate_count / kCandidatesATask + 1;
    parallel_for(queries * parts, [&](int64_t task) {
      const int64_t query = task / parts, part = task % parts;
      std::vector<float> laid_out(width);
      score_part(loops, r, first + query, r.candidate_count * part / parts, r.candidate_count * (part + 1) / parts,
                 laid_out, scored.data() + query * r.candidate_count);
    });
    parallel_for(queries, [&](int64_t query) {
      select_best(scored.data() + query * r.candidate_count, r.candidate_count, r.k, r.scores + (first + query) * r.k,
                  r.indices + (first + query) * r.k);
    });
  }
}

}  // namespace embedding_kernels

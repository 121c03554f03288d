// The best of scored candidates, for every top-k of scores.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace embedding_kernels {

struct Scored {
  float score;
  int64_t index;
};

// A score that is not a number comes after every number, an absent candidate after everything.
inline bool comes_before(const Scored& a, const Scored& b) {
  const bool a_absent = a.index < 0, b_absent = b.index < 0;
  if (a_absent || b_absent) return !a_absent && b_absent;
  const float least = -std::numeric_limits<float>::infinity();
  const float left = std::isnan(a.score) ? least : a.score, right = std::isnan(b.score) ? least : b.score;
  return left != right ? left > right : a.index < b.index;
}

// The k best of `count` candidates, which are put into another order; past them -infinity and -1.
inline void select_best(Scored* scored, int64_t count, int64_t k, float* scores, int64_t* indices) {
  const int64_t kept = std::min(k, count);
  if (kept < count) std::nth_element(scored, scored + kept, scored + count, comes_before);
  std::sort(scored, scored + kept, comes_before);
  for (int64_t i = 0; i < k; ++i) {
    scores[i] = i < kept ? scored[i].score : -std::numeric_limits<float>::infinity();
    indices[i] = i < kept ? scored[i].index : -1;
  }
}

}  // namespace embedding_kernels

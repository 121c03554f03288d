// Splitting for the anchor scores family. Knows no torch and no threads: `parallel_for(count, task)` is given, and runs
// task(0) ... task(count - 1), each once. Results do not depend on the threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "anchor_scores.h"
#include "attention_driver.h"
#include "selection.h"

namespace embedding_kernels {

// Strides of a tensor, in bytes; the last dimension is dense.
struct AnchorTensor {
  const uint8_t* data;
  int64_t strides[3];

  AnchorRows rows(int64_t first, int64_t view, int64_t count) const {
    return {data + first * strides[0] + view * strides[1], strides[0], count};
  }
  // of [Q, m, H, D]: the heads of one query and view
  AnchorRows heads(int64_t query, int64_t view, int64_t count) const {
    return {data + query * strides[0] + view * strides[1], strides[2], count};
  }
};

// Views of passages, and what meets them: queries [Q, m, H, D], or anchors [Q, m, D] with `heads` of 1.
struct Anchoring {
  Dtype dtype;
  AnchorTensor views, queries;
  const int32_t* offsets;  // [count + 1]
  int64_t count, view_count, heads, dim;

  int64_t passages(int64_t query) const { return offsets[query + 1] - offsets[query]; }
  AnchorRows own_views(int64_t query, int64_t view) const { return views.rows(offsets[query], view, passages(query)); }
  int64_t row_bytes() const { return dim * dtype_bytes(dtype); }
};

constexpr int64_t kRowsAtOnce = 8;

inline int64_t in_whole_vectors(int64_t count) { return (count + 15) / 16 * 16; }

// Rows as floats, dense.
inline std::vector<float> floats_of(const AnchorScoresLoops& loops, const Anchoring& a, const AnchorRows& rows) {
  std::vector<float> values(rows.count * a.dim);
  for (int64_t r = 0; r < rows.count; ++r) {
    loops.load[a.dtype](rows.data + r * rows.stride, a.dim, values.data() + r * a.dim);
  }
  return values;
}

// out += weights times rows, block by block.
inline void mix_in_blocks(const AnchorScoresLoops& loops, const Anchoring& a, const AnchorWeights& weights,
                          int64_t out_rows, const AnchorRows& rows, float* out) {
  for (int64_t first = 0; first < rows.count; first += kPassagesAtOnce) {
    const AnchorWeights part = {weights.data + first * weights.column_step, weights.row_step, weights.column_step};
    loops.mix[a.dtype](part, out_rows, rows.part(first, std::min(kPassagesAtOnce, rows.count - first)), a.dim, out);
  }
}

// Products of heads, as floats, and passages of one query and view: [heads, room] in rows of whole vectors.
inline std::vector<float> anchor_dots(const AnchorScoresLoops& loops, const Anchoring& a,
                                      const std::vector<float>& heads, int64_t count, const AnchorRows& rows) {
  const int64_t room = in_whole_vectors(rows.count);
  std::vector<float> products(count * room);
  loops.dots[a.dtype](heads.data(), a.dim, count, rows, a.dim, products.data(), room);
  return products;
}

// Their softmax over the passages.
inline std::vector<float> anchor_weights(const AnchorScoresLoops& loops, const Anchoring& a,
                                         const std::vector<float>& heads, int64_t count, const AnchorRows& rows) {
  const int64_t room = in_whole_vectors(rows.count);
  std::vector<float> weights = anchor_dots(loops, a, heads, count, rows);
  for (float* row = weights.data(); row < weights.data() + weights.size(); row += room) loops.softmax(row, rows.count);
  return weights;
}

class AnchorWork {
 public:
  explicit AnchorWork(int64_t dim)
      : scratch_(std::make_unique_for_overwrite<AnchorScratch>()), rows_(4 * kRows * padded_dim(dim)) {
    float* next = reinterpret_cast<float*>(rows_.data());
    const auto take = [&](int64_t rows) { return std::exchange(next, next + rows * padded_dim(dim)); };
    scratch_->head_rows = take(kQueryTile);
    scratch_->head_columns = take(kQueryTile);
    scratch_->out = take(kQueryTile);
    scratch_->views = take(kPassagesAtOnce);
    scratch_->pairs = take(kPassagesAtOnce / 2);
  }
  AnchorScratch* get() const { return scratch_.get(); }

 private:
  static constexpr int64_t kRows = 3 * kQueryTile + kPassagesAtOnce + kPassagesAtOnce / 2;
  std::unique_ptr<AnchorScratch> scratch_;
  WorkMemory rows_;
};

// out: [Q, m, H, D], dense, of the dtype of the views.
template <class ParallelFor>
void anchor_attention(const AnchorAttentionLoops& loops, const Anchoring& a, uint8_t* out, int64_t threads,
                      const ParallelFor& parallel_for) {
  if (a.dim == 0) return;  // rows without values need not have an address
  const int64_t lists = a.count * a.view_count, tile = lists < threads ? kQueryTile / 2 : kQueryTile;
  const int64_t parts = (a.heads + tile - 1) / tile;
  const bool worth = a.offsets[a.count] * a.view_count * a.heads * 2 * a.dim >= kSerialProducts;
  share_out(lists * parts, worth ? threads : 1, parallel_for, [&](const auto& for_parts) {
    const AnchorWork work(a.dim);
    loops.enter();
    for_parts([&](int64_t part) {
      const int64_t place = part / parts, first = part % parts * tile;
      const int64_t query = place / a.view_count, view = place % a.view_count;
      const AnchorRows heads = a.queries.heads(query, view, a.heads).part(first, std::min(tile, a.heads - first));
      uint8_t* const to = out + (place * a.heads + first) * a.row_bytes();
      loops.attend[a.dtype]({heads, a.own_views(query, view), a.dim, to, work.get()});
    });
    loops.leave();
  });
}

struct AnchorGradients {
  AnchorTensor grad;  // like the queries
  uint8_t* views;     // dense, like the inputs
  uint8_t* queries;
};

// Gradients of one query and view; with p the weights and ds the gradients of the scores, those of the views are
// p^T grad + ds^T queries.
inline void anchor_attention_backward_at(const AnchorScoresLoops& loops, const Anchoring& a, const AnchorGradients& out,
                                         int64_t query, int64_t view) {
  const AnchorRows rows = a.own_views(query, view);
  const int64_t room = in_whole_vectors(rows.count), heads = a.heads;
  std::vector<float> mixed(heads * a.dim);
  uint8_t* const to = out.queries + (query * a.view_count + view) * heads * a.row_bytes();
  if (rows.count == 0) return loops.store[a.dtype](mixed.data(), heads * a.dim, to);
  const std::vector<float> own = floats_of(loops, a, a.queries.heads(query, view, heads));
  const std::vector<float> grad = floats_of(loops, a, out.grad.heads(query, view, heads));
  const std::vector<float> weights = anchor_weights(loops, a, own, heads, rows);
  std::vector<float> slopes = anchor_dots(loops, a, grad, heads, rows);
  for (int64_t h = 0; h < heads; ++h) {
    loops.softmax_backward(slopes.data() + h * room, weights.data() + h * room, rows.count);
  }
  mix_in_blocks(loops, a, {slopes.data(), room, 1}, heads, rows, mixed.data());
  loops.store[a.dtype](mixed.data(), heads * a.dim, to);
  const int64_t stride = a.dim * static_cast<int64_t>(sizeof(float));
  const AnchorRows own_rows = {reinterpret_cast<const uint8_t*>(own.data()), stride, heads};
  const AnchorRows grad_rows = {reinterpret_cast<const uint8_t*>(grad.data()), stride, heads};
  std::vector<float> sums(kRowsAtOnce * a.dim);
  for (int64_t first = 0; first < rows.count; first += kRowsAtOnce) {
    const int64_t count = std::min(kRowsAtOnce, rows.count - first);
    std::fill(sums.begin(), sums.end(), 0.0f);
    loops.mix[kFloat32]({weights.data() + first, 1, room}, count, grad_rows, a.dim, sums.data());
    loops.mix[kFloat32]({slopes.data() + first, 1, room}, count, own_rows, a.dim, sums.data());
    for (int64_t i = 0; i < count; ++i) {
      const int64_t passage = a.offsets[query] + first + i;
      loops.store[a.dtype](sums.data() + i * a.dim, a.dim, out.views + (passage * a.view_count + view) * a.row_bytes());
    }
  }
}

template <class ParallelFor>
void anchor_attention_backward(const AnchorScoresLoops& loops, const Anchoring& a, const AnchorGradients& out,
                               const ParallelFor& parallel_for) {
  parallel_for(a.count * a.view_count, [&](int64_t task) {
    anchor_attention_backward_at(loops, a, out, task / a.view_count, task % a.view_count);
  });
}

// store(passage, view, products, count) takes the products of passages [passage, passage + count) with one view's
// anchor; all views of a passage are stored by one task, in order.
template <class ParallelFor, class Store>
void anchor_products(const AnchorScoresLoops& loops, const Anchoring& a, const ParallelFor& parallel_for,
                     const Store& store) {
  const int64_t total = a.offsets[a.count];
  parallel_for((total + kPassagesAtOnce - 1) / kPassagesAtOnce, [&](int64_t task) {
    const int64_t begin = task * kPassagesAtOnce, end = std::min(total, begin + kPassagesAtOnce);
    // the query of the first passage: the last whose passages begin at or before it
    int64_t query = std::upper_bound(a.offsets, a.offsets + a.count + 1, begin) - a.offsets - 1;
    float products[kPassagesAtOnce];
    std::vector<float> anchor(a.dim);
    for (int64_t passage = begin; passage < end; ++query) {
      const int64_t count = std::min<int64_t>(end, a.offsets[query + 1]) - passage;
      for (int64_t view = 0; count > 0 && view < a.view_count; ++view) {
        loops.load[a.dtype](a.queries.rows(query, view, 1).data, a.dim, anchor.data());
        loops.dots[a.dtype](anchor.data(), a.dim, 1, a.views.rows(passage, view, count), a.dim, products,
                            kPassagesAtOnce);
        store(passage, view, products, count);
      }
      passage += count;
    }
  });
}

// scores: [P], or [P, m] with per_view.
template <class ParallelFor>
void anchor_scores(const AnchorScoresLoops& loops, const Anchoring& a, bool per_view, float* scores,
                   const ParallelFor& parallel_for) {
  const float last = static_cast<float>(a.view_count);
  anchor_products(loops, a, parallel_for, [&](int64_t passage, int64_t view, const float* products, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      if (per_view) {
        scores[(passage + i) * a.view_count + view] = products[i];
        continue;
      }
      float& score = scores[passage + i];
      score = view == 0 ? products[i] : score + products[i];
      if (view + 1 == a.view_count) score /= last;
    }
  });
}

struct AnchorScoreGradients {
  const float* grad;  // [P], or [P, m] with per_view
  bool per_view;
  uint8_t* views;  // dense, like the inputs
  uint8_t* anchors;
};

template <class ParallelFor>
void anchor_scores_backward(const AnchorScoresLoops& loops, const Anchoring& a, const AnchorScoreGradients& out,
                            const ParallelFor& parallel_for) {
  const float share = out.per_view ? 1.0f : 1.0f / static_cast<float>(a.view_count);
  parallel_for(a.count * a.view_count, [&](int64_t task) {
    const int64_t query = task / a.view_count, view = task % a.view_count, first = a.offsets[query];
    const AnchorRows rows = a.own_views(query, view), anchor = a.queries.rows(query, view, 1);
    std::vector<float> weights(rows.count), sum(a.dim);
    for (int64_t i = 0; i < rows.count; ++i) {
      weights[i] = share * (out.per_view ? out.grad[(first + i) * a.view_count + view] : out.grad[first + i]);
    }
    mix_in_blocks(loops, a, {weights.data(), 0, 1}, 1, rows, sum.data());
    loops.store[a.dtype](sum.data(), a.dim, out.anchors + task * a.row_bytes());
    for (int64_t i = 0; i < rows.count; ++i) {
      std::fill(sum.begin(), sum.end(), 0.0f);
      loops.mix[a.dtype]({weights.data() + i, 0, 0}, 1, anchor, a.dim, sum.data());
      loops.store[a.dtype](sum.data(), a.dim, out.views + ((first + i) * a.view_count + view) * a.row_bytes());
    }
  });
}

// best, places: [Q, k].
template <class ParallelFor>
void anchor_topk(const AnchorScoresLoops& loops, const Anchoring& a, int64_t k, float* best, int64_t* places,
                 const ParallelFor& parallel_for) {
  std::vector<float> scores(a.offsets[a.count]);
  anchor_scores(loops, a, false, scores.data(), parallel_for);
  parallel_for(a.count, [&](int64_t query) {
    std::vector<Scored> scored(a.passages(query));
    for (int64_t i = 0; i < a.passages(query); ++i) scored[i] = {scores[a.offsets[query] + i], i};
    select_best(scored.data(), a.passages(query), k, best + query * k, places + query * k);
  });
}

}  // namespace embedding_kernels

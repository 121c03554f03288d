// Splitting for the attention family. Knows no torch and no threads: `parallel_for(count, task)` is given, and runs
// task(0) ... task(count - 1), each once. A tile's values depend on its own sequence and head alone, so results depend
// neither on threads nor on the order of sequences.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "attention.h"

namespace embedding_kernels {

// Packed rows of all heads: row t of head h begins at data + t * row_stride + h * head_stride elements.
struct Heads {
  const void* data;
  int64_t row_stride, head_stride;
  int64_t heads, dim;
};

struct Attention {
  Dtype dtype;
  Heads q, k, v;
  const int32_t *offsets_q, *offsets_k;
  int64_t sequences;
  const int32_t *positions_q, *positions_k;  // or null: from 0 in each sequence
  const int32_t* seqused_k;                  // or null
  ScoreRule rule;
  Rotation rotation;
  const float* bias_table;  // [heads of q, 2 reach + 1], or null

  int64_t tokens_q() const { return offsets_q[sequences]; }
  int64_t queries(int64_t s) const { return offsets_q[s + 1] - offsets_q[s]; }
  int64_t keys(int64_t s) const { return seqused_k ? seqused_k[s] : offsets_k[s + 1] - offsets_k[s]; }
  int64_t group() const { return q.heads / k.heads; }
  int64_t table_size() const { return 2 * rule.reach + 1; }
};

constexpr int64_t kSerialProducts = int64_t{1} << 20;  // fewer multiplications are not worth a second thread
constexpr int64_t kTilesAPart = 8;                     // fewer tiles are not worth laying out the keys again
constexpr int64_t kPartsAThread = 8;

// ---- what all tiles share ----

// Bias tables as the loops read them, and positions where none are given.
class AttentionTables {
 public:
  explicit AttentionTables(const Attention& attention) : attention_(attention) {
    int64_t longest = 0;
    for (int64_t s = 0; s < attention.sequences; ++s) {
      longest = std::max({longest, attention.queries(s), attention.keys(s)});
    }
    places_.resize(longest);
    for (int64_t i = 0; i < longest; ++i) places_[i] = static_cast<int32_t>(i);
    if (attention.bias_table != nullptr) spread_biases();
  }

  const float* bias(int64_t head) const { return biases_.empty() ? nullptr : biases_.data() + head * spread_; }

  // Rows `first` to `first + count` of a head of a sequence that begins at row `start`.
  HeadRows rows(const Heads& heads, int64_t head, int64_t start, const int32_t* positions, int64_t first,
                int64_t count) const {
    const int64_t offset = (start + first) * heads.row_stride + head * heads.head_stride;
    const void* data = static_cast<const uint8_t*>(heads.data) + offset * dtype_bytes(attention_.dtype);
    const int32_t* at = positions == nullptr ? places_.data() + first : positions + start + first;
    return {data, heads.row_stride, count, heads.dim, at, positions == nullptr || consecutive(at, count)};
  }

 private:
  static bool consecutive(const int32_t* positions, int64_t count) {
    for (int64_t i = 1; i < count; ++i) {
      if (positions[i] != positions[i - 1] + 1) return false;
    }
    return true;
  }

  // entry e + reach + kBiasMargin is for query - key = e, in base 2
  void spread_biases() {
    const int64_t reach = attention_.rule.reach, margin = reach + kBiasMargin;
    spread_ = 2 * margin;
    biases_.resize(attention_.q.heads * spread_);
    for (int64_t h = 0; h < attention_.q.heads; ++h) {
      const float* const middle = attention_.bias_table + h * attention_.table_size() + reach;
      for (int64_t e = -margin; e < margin; ++e) {
        biases_[h * spread_ + e + margin] = middle[std::clamp(-e, -reach, reach)] * 1.44269504088896341f;
      }
    }
  }

  const Attention& attention_;
  std::vector<int32_t> places_;
  std::vector<float> biases_;
  int64_t spread_ = 0;
};

// ---- work ----

// Tiles `begin` to `end` of the queries of all heads that share a head of keys; tiles are counted head by head.
struct AttentionPart {
  int64_t sequence, head, begin, end;
};

inline int64_t tiles_of(int64_t queries) { return (queries + kQueryTile - 1) / kQueryTile; }

inline std::vector<AttentionPart> attention_parts(const Attention& attention, int64_t threads, bool split) {
  int64_t total = 0;
  for (int64_t s = 0; s < attention.sequences; ++s) total += attention.queries(s) * (attention.keys(s) + 1);
  const int64_t most = total * attention.group() / (threads * kPartsAThread) * attention.k.heads + 1;
  std::vector<AttentionPart> parts;
  for (int64_t s = 0; s < attention.sequences; ++s) {
    const int64_t tiles = tiles_of(attention.queries(s)) * attention.group();
    const int64_t work = attention.queries(s) * (attention.keys(s) + 1) * attention.group();
    const int64_t wanted = split && threads > 1 ? std::min(work / most + 1, tiles / kTilesAPart) : 1;
    const int64_t count = std::max<int64_t>(wanted, 1);
    for (int64_t h = 0; h < attention.k.heads && tiles > 0; ++h) {
      for (int64_t i = 0; i < count; ++i) parts.push_back({s, h, tiles * i / count, tiles * (i + 1) / count});
    }
  }
  return parts;
}

inline bool worth_threads(const Attention& attention) {
  int64_t products = 0;
  for (int64_t s = 0; s < attention.sequences; ++s) products += attention.queries(s) * attention.keys(s);
  return products * attention.q.heads * (attention.q.dim + attention.v.dim) >= kSerialProducts;
}

// Runs worker(for_parts) on each thread; its for_parts(work) calls work(i) for one of `count` parts after the other,
// the next few whenever it is free.
template <class Worker, class ParallelFor>
void share_out(int64_t count, int64_t threads, const ParallelFor& parallel_for, const Worker& worker) {
  const int64_t grain = std::max<int64_t>(1, count / (threads * 4 * kPartsAThread));
  std::atomic<int64_t> next{0};
  parallel_for(std::min(threads, count), [&](int64_t) {
    worker([&](const auto& work) {
      for (int64_t first; (first = next.fetch_add(grain)) < count;) {
        for (int64_t i = first; i < std::min(first + grain, count); ++i) work(i);
      }
    });
  });
}

// Memory of one worker, aligned for whole vectors and not cleared.
class WorkMemory {
 public:
  explicit WorkMemory(int64_t bytes) : data_(static_cast<uint8_t*>(::operator new(bytes, kAlignment))) {}
  ~WorkMemory() { ::operator delete(data_, kAlignment); }
  WorkMemory(const WorkMemory&) = delete;
  WorkMemory& operator=(const WorkMemory&) = delete;
  uint8_t* data() const { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  uint8_t* data_;
};

inline int64_t most_keys(const Attention& attention) {
  int64_t most = 0;
  for (int64_t s = 0; s < attention.sequences; ++s) most = std::max(most, attention.keys(s));
  return most;
}

// The rows of the next short sequence are brought near while this one is worked on, a share of them with each head:
// rows are whole there, where one head's would be scattered.
inline void look_ahead(const Attention& attention, const Heads& heads, const int32_t* offsets, int64_t sequence,
                       int64_t share, int64_t shares, Ahead* ahead) {
  constexpr int64_t kMostRows = 64;
  const int64_t item = dtype_bytes(attention.dtype), first = offsets[sequence], count = offsets[sequence + 1] - first;
  const int64_t begin = first + count * share / shares, end = first + count * (share + 1) / shares;
  if (count > kMostRows || begin == end || heads.head_stride != heads.dim) return;
  ahead->rows[ahead->lists++] = {static_cast<const char*>(heads.data) + begin * heads.row_stride * item,
                                 heads.row_stride * item, heads.heads * heads.dim * item, end - begin};
}

inline void look_ahead(const Attention& attention, const AttentionPart& part, Ahead* ahead) {
  ahead->lists = ahead->list = ahead->row = ahead->byte = 0;
  if (part.sequence + 1 == attention.sequences) return;
  const int64_t next = part.sequence + 1, shares = attention.k.heads;
  look_ahead(attention, attention.q, attention.offsets_q, next, part.head, shares, ahead);
  look_ahead(attention, attention.k, attention.offsets_k, next, part.head, shares, ahead);
  look_ahead(attention, attention.v, attention.offsets_k, next, part.head, shares, ahead);
}

// ---- forward ----

struct AttentionOutput {
  void* out;   // [tokens, heads, value dim]
  float* lse;  // [heads, tokens]
};

inline AttentionTile forward_tile(const Attention& attention, const AttentionTables& tables, const PreparedKeys& keys,
                                  const AttentionOutput& output, int64_t sequence, int64_t head, int64_t tile,
                                  AttentionScratch* scratch) {
  const int64_t first = tile * kQueryTile, start = attention.offsets_q[sequence];
  const int64_t count = std::min(kQueryTile, attention.queries(sequence) - first);
  const int64_t dim = attention.v.dim, stride = attention.q.heads * dim;
  return {tables.rows(attention.q, head, start, attention.positions_q, first, count),
          &keys,
          attention.rotation,
          &attention.rule,
          tables.bias(head),
          static_cast<uint8_t*>(output.out) + ((start + first) * stride + head * dim) * dtype_bytes(attention.dtype),
          stride,
          output.lse + head * attention.tokens_q() + start + first,
          scratch};
}

template <class ParallelFor>
void attention_forward(const AttentionLoops& loops, const Attention& attention, const AttentionOutput& output,
                       int64_t threads, const ParallelFor& parallel_for) {
  const AttentionTables tables(attention);
  threads = worth_threads(attention) ? threads : 1;
  const int64_t bytes = prepared_bytes(most_keys(attention), attention.q.dim, attention.v.dim);
  const std::vector<AttentionPart> parts = attention_parts(attention, threads, true);
  share_out(parts.size(), threads, parallel_for, [&](const auto& for_parts) {
    const auto scratch = std::make_unique_for_overwrite<AttentionScratch>();
    const WorkMemory memory(bytes);
    loops.enter();
    for_parts([&](int64_t index) {
      const AttentionPart& part = parts[index];
      look_ahead(attention, part, &scratch->ahead);
      const int64_t s = part.sequence, start = attention.offsets_k[s], count = attention.keys(s);
      PreparedKeys keys;
      loops.prepare[attention.dtype](tables.rows(attention.k, part.head, start, attention.positions_k, 0, count),
                                     tables.rows(attention.v, part.head, start, nullptr, 0, count), attention.rotation,
                                     memory.data(), &keys);
      const int64_t tiles = tiles_of(attention.queries(s));
      for (int64_t t = part.begin; t < part.end; ++t) {
        const int64_t head = part.head * attention.group() + t / tiles;
        loops.attend[attention.dtype](forward_tile(attention, tables, keys, output, s, head, t % tiles, scratch.get()));
      }
    });
    loops.leave();
  });
}

// ---- backward ----

struct AttentionGradient {
  Heads grad_out, out;    // of the heads of q
  const float* lse;       // [heads, tokens]
  const float* grad_lse;  // the same, or null
  void *q, *k, *v;        // contiguous
  float* bias_table;      // [heads, 2 reach + 1], or null
};

// Gradients of keys, values and biases of one head of keys in one sequence; a worker's memory for them.
struct KeyGradients {
  float *keys, *values;
  int64_t key_stride, value_stride;
};

template <class ParallelFor>
void sum_bias_gradients(const Attention& attention, const std::vector<float>& parts, float* out,
                        const ParallelFor& parallel_for) {
  const int64_t size = attention.table_size();
  parallel_for(attention.q.heads, [&](int64_t h) {
    std::vector<double> sums(size);
    for (int64_t s = 0; s < attention.sequences; ++s) {
      const float* part = parts.data() + (s * attention.q.heads + h) * size;
      for (int64_t i = 0; i < size; ++i) sums[i] += part[i];
    }
    for (int64_t i = 0; i < size; ++i) out[h * size + i] = static_cast<float>(sums[i]);
  });
}

inline void backward_head(const AttentionBackwardLoops& loops, const Attention& attention,
                          const AttentionGradient& gradient, const AttentionTables& tables, const PreparedKeys& keys,
                          const KeyGradients& sums, int64_t sequence, int64_t head, float* bias,
                          AttentionScratch* scratch) {
  const int64_t start = attention.offsets_q[sequence], queries = attention.queries(sequence);
  const int64_t stride = attention.q.heads * attention.q.dim;
  for (int64_t first = 0; first < queries; first += kQueryTile) {
    const int64_t count = std::min(kQueryTile, queries - first), row = head * attention.tokens_q() + start + first;
    AttentionGradientTile tile;
    tile.queries = tables.rows(attention.q, head, start, attention.positions_q, first, count);
    tile.keys = &keys;
    tile.rotation = attention.rotation;
    tile.rule = &attention.rule;
    tile.bias = tables.bias(head);
    tile.out = tables.rows(gradient.out, head, start, nullptr, first, count);
    tile.grad_out = tables.rows(gradient.grad_out, head, start, nullptr, first, count);
    tile.lse = gradient.lse + row;
    tile.grad_lse = gradient.grad_lse == nullptr ? nullptr : gradient.grad_lse + row;
    tile.grad_queries = static_cast<uint8_t*>(gradient.q) +
                        ((start + first) * stride + head * attention.q.dim) * dtype_bytes(attention.dtype);
    tile.grad_stride = stride;
    tile.grad_keys = sums.keys;
    tile.grad_values = sums.values;
    tile.grad_bias = bias;
    tile.scratch = scratch;
    loops.attend[attention.dtype](tile);
  }
}

// Rounds a head's gradients of keys or values into rows of `out`; rows of the sequence that were not used get 0.
inline void store_keys(const AttentionBackwardLoops& loops, const Attention& attention, const Heads& like,
                       const HeadRows& rows, const float* sums, int64_t stride, float scale, const Rotation& rotation,
                       int64_t sequence, int64_t head, void* out) {
  const int64_t bytes = dtype_bytes(attention.dtype), row = like.heads * like.dim;
  uint8_t* const to = static_cast<uint8_t*>(out) + (attention.offsets_k[sequence] * row + head * like.dim) * bytes;
  loops.store[attention.dtype](sums, stride, rows, scale, rotation, to, row);
  const int64_t length = attention.offsets_k[sequence + 1] - attention.offsets_k[sequence];
  for (int64_t r = rows.count; r < length; ++r) std::memset(to + r * row * bytes, 0, like.dim * bytes);
}

template <class ParallelFor>
void attention_backward(const AttentionBackwardLoops& loops, const Attention& attention,
                        const AttentionGradient& gradient, int64_t threads, const ParallelFor& parallel_for) {
  const AttentionTables tables(attention);
  threads = worth_threads(attention) ? threads : 1;
  // one for each (sequence, head), summed in the order of the sequences
  const int64_t size = attention.table_size(), group = attention.group();
  std::vector<float> biases(gradient.bias_table == nullptr ? 0 : attention.sequences * attention.q.heads * size);
  const int64_t most = most_keys(attention);
  const int64_t bytes = prepared_bytes(most, attention.q.dim, attention.v.dim);
  const KeyGradients shape = {nullptr, nullptr, gradient_stride(attention.q.dim), gradient_stride(attention.v.dim)};
  std::vector<AttentionPart> parts;
  for (int64_t s = 0; s < attention.sequences; ++s) {
    for (int64_t h = 0; h < attention.k.heads; ++h) parts.push_back({s, h, 0, 0});
  }
  share_out(parts.size(), threads, parallel_for, [&](const auto& for_parts) {
    const auto scratch = std::make_unique_for_overwrite<AttentionScratch>();
    const WorkMemory memory(bytes), sums_memory(4 * most * (shape.key_stride + shape.value_stride));
    for_parts([&](int64_t index) {
      const AttentionPart& part = parts[index];
      look_ahead(attention, part, &scratch->ahead);
      if (part.sequence + 1 < attention.sequences) {
        for (const Heads* heads : {&gradient.out, &gradient.grad_out}) {
          look_ahead(attention, *heads, attention.offsets_q, part.sequence + 1, part.head, attention.k.heads,
                     &scratch->ahead);
        }
      }
      const int64_t s = part.sequence, start = attention.offsets_k[s], count = attention.keys(s);
      const HeadRows key_rows = tables.rows(attention.k, part.head, start, attention.positions_k, 0, count);
      const HeadRows value_rows = tables.rows(attention.v, part.head, start, nullptr, 0, count);
      KeyGradients sums = shape;
      sums.keys = reinterpret_cast<float*>(sums_memory.data());
      sums.values = sums.keys + count * sums.key_stride;
      std::memset(sums.keys, 0, 4 * count * (sums.key_stride + sums.value_stride));
      PreparedKeys keys;
      loops.prepare[attention.dtype](key_rows, value_rows, attention.rotation, memory.data(), &keys);
      for (int64_t head = part.head * group; head < (part.head + 1) * group; ++head) {
        float* const bias = biases.empty() ? nullptr : biases.data() + (s * attention.q.heads + head) * size;
        backward_head(loops, attention, gradient, tables, keys, sums, s, head, bias, scratch.get());
      }
      store_keys(loops, attention, attention.k, key_rows, sums.keys, sums.key_stride, attention.rule.scale,
                 attention.rotation, s, part.head, gradient.k);
      store_keys(loops, attention, attention.v, value_rows, sums.values, sums.value_stride, 1.0f, Rotation{}, s,
                 part.head, gradient.v);
    });
  });
  if (gradient.bias_table != nullptr) sum_bias_gradients(attention, biases, gradient.bias_table, parallel_for);
}

}  // namespace embedding_kernels

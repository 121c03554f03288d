// One training step of paragraph vectors. Knows no torch and no threads: `parallel_for(count, task)` is given, and runs
// task(0) ... task(count - 1), each once.
//
// First every document is worked on alone: its code, its examples' losses and gradients. Then every word's row, then
// every document's row is changed once, by the sum of its gradients in the order of the tokens. So results do not
// depend on threads.
//
// An example is a row of features with the tokens it predicts: a document with all its tokens (PV-DBOW), or a token
// with its context (PV-DM).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "paragraph_vector.h"

namespace embedding_kernels {

// Rows that learn, `stride` floats apart, with the sum of squares by which AdaGrad scales each.
struct LearnedRows {
  float* data;
  int64_t stride;
  int64_t columns;
  float* squares;  // a row each

  float* row(int64_t index) const { return data + index * stride; }
};

struct ParagraphVectorStep {
  LearnedRows documents, words, projection, context;  // the last two without data where there are none
  float* bias;                                        // a word each
  const float* log_expected;                          // a word each
  const int64_t* rows;
  const int32_t* tokens;
  const int32_t* offsets;
  const int32_t* negatives;
  int64_t batch, negative_count, vocabulary, window;
  float learning_rate;
  bool binary, update_words;
  float* loss;  // a document each

  bool has_context() const { return context.data != nullptr; }
  int64_t total() const { return offsets[batch]; }
  int64_t features() const { return words.columns; }
  int64_t bits() const { return words.columns - context.columns; }
  int64_t examples() const { return has_context() ? total() : batch; }
};

constexpr float kSquaresFloor = 1e-12f;  // keeps AdaGrad from dividing by 0
constexpr int64_t kDocumentCost = 8;     // cost of a document beside its tokens, in tokens
constexpr int64_t kExampleBlock = 64;    // examples whose features stay in a cache while the negatives go by
constexpr int64_t kNegativeBlock = 16;   // a cache line of their coefficients

// AdaGrad with one rate a row; a word's bias is one more column of its row.
inline void update_row(const ParagraphVectorLoops& loops, const LearnedRows& rows, int64_t index, const float* gradient,
                       float learning_rate, float* bias = nullptr, float bias_gradient = 0.0f) {
  float square;
  loops.dots(gradient, 0, nullptr, 1, gradient, rows.columns, &square);
  const int64_t columns = rows.columns + (bias != nullptr);
  rows.squares[index] += (square + bias_gradient * bias_gradient) / static_cast<float>(columns);
  const float step = -learning_rate / std::sqrt(rows.squares[index] + kSquaresFloor);
  loops.add_rows(gradient, 0, nullptr, &step, 1, rows.columns, rows.row(index));
  if (bias != nullptr) bias[index] += step * bias_gradient;
}

// Places of a word among the negatives: first(word), then next(place), -1 past the last.
class NegativePlaces {
 public:
  NegativePlaces(const int32_t* negatives, int64_t count) : negatives_(negatives), next_(count, -1) {
    while ((int64_t{1} << bits_) < 4 * count) ++bits_;
    heads_.assign(int64_t{1} << bits_, -1);
    for (int64_t place = count - 1; place >= 0; --place) {
      int32_t& head = heads_[slot(negatives[place])];
      if (head >= 0) next_[place] = head;
      head = static_cast<int32_t>(place);
    }
  }
  int32_t first(int32_t word) const { return heads_.empty() ? -1 : heads_[slot(word)]; }
  int32_t next(int32_t place) const { return next_[place]; }

 private:
  // the slot of the word, or the empty one where it belongs
  int64_t slot(int32_t word) const {
    const int64_t mask = (int64_t{1} << bits_) - 1;
    int64_t at = (static_cast<uint32_t>(word) * 2654435769u) >> (32 - bits_);
    while (heads_[at] >= 0 && negatives_[heads_[at]] != word) at = (at + 1) & mask;
    return at;
  }
  const int32_t* negatives_;
  std::vector<int32_t> next_, heads_;
  int bits_ = 2;
};

// Entries 0 ... total - 1 are the tokens, the rest the negatives: sorted by word, in order within a word.
class WordGroups {
 public:
  explicit WordGroups(const ParagraphVectorStep& step) : step_(step), entries_(step.total() + step.negative_count) {
    std::vector<int32_t> sorted(entries_.size());
    for (size_t i = 0; i < entries_.size(); ++i) entries_[i] = static_cast<int32_t>(i);
    for (int shift = 0; (step.vocabulary - 1) >> shift > 0; shift += kDigitBits) {
      std::vector<int64_t> starts((1 << kDigitBits) + 1);
      const auto digit = [&](int32_t entry) { return word(entry) >> shift & ((1 << kDigitBits) - 1); };
      for (int32_t entry : entries_) ++starts[digit(entry) + 1];
      for (size_t d = 1; d < starts.size(); ++d) starts[d] += starts[d - 1];
      for (int32_t entry : entries_) sorted[starts[digit(entry)]++] = entry;
      entries_.swap(sorted);
    }
    for (size_t i = 0; i < entries_.size(); ++i) {
      if (i == 0 || word(entries_[i]) != word(entries_[i - 1])) starts_.push_back(static_cast<int64_t>(i));
    }
    starts_.push_back(static_cast<int64_t>(entries_.size()));
  }
  int32_t word(int32_t entry) const {
    return entry < step_.total() ? step_.tokens[entry] : step_.negatives[entry - step_.total()];
  }
  const int32_t* begin(int64_t group) const { return entries_.data() + starts_[group]; }
  const int32_t* end(int64_t group) const { return entries_.data() + starts_[group + 1]; }
  // First group of a part; parts hold about as many entries each.
  int64_t part_begin(int64_t part, int64_t parts) const {
    const int64_t target = static_cast<int64_t>(entries_.size()) * part / parts;
    return std::lower_bound(starts_.begin(), starts_.end() - 1, target) - starts_.begin();
  }
  int64_t part_end(int64_t part, int64_t parts) const {
    return part + 1 == parts ? static_cast<int64_t>(starts_.size()) - 1 : part_begin(part + 1, parts);
  }

 private:
  static constexpr int kDigitBits = 11;
  const ParagraphVectorStep& step_;
  std::vector<int32_t> entries_;
  std::vector<int64_t> starts_;
};

template <class ParallelFor>
class ParagraphVectorStepper {
 public:
  ParagraphVectorStepper(const ParagraphVectorLoops& loops, const ParagraphVectorStep& step, int64_t threads,
                         const ParallelFor& parallel_for)
      : loops_(loops),
        step_(step),
        parts_(threads),
        parallel_for_(parallel_for),
        places_(step.negatives, step.negative_count),
        panel_(step.features() * step.negative_count),
        shifts_(step.negative_count),
        features_(step.examples() * step.features()),
        slopes_(step.batch * step.bits()),
        gradients_(step.examples() * step.features()),
        code_gradients_(step.batch * step.bits()),
        document_gradients_(step.projection.data ? step.batch * step.documents.columns : 0),
        missing_(step.total()),
        coefficients_(step.examples() * step.negative_count),
        example_of_(step.total()) {}

  void run() {
    gather_negatives();
    const auto parts = [&](const auto& task) { parallel_for_(parts_, task); };
    parts([&](int64_t part) {
      Scratch scratch;
      for (int64_t d = document_begin(part); d < document_begin(part + 1); ++d) document(d, scratch);
    });
    if (step_.update_words) {
      if (step_.projection.data) parts([&](int64_t part) { update_projection(part); });
      const int64_t blocks = (step_.negative_count + kNegativeBlock - 1) / kNegativeBlock;
      negative_gradients_.assign(step_.negative_count * step_.features(), 0.0f);
      negative_bias_.assign(step_.negative_count, 0.0f);
      parallel_for_(blocks, [&](int64_t block) { sum_negatives(block * kNegativeBlock); });
      const WordGroups groups(step_);
      parts([&](int64_t part) { update_words(groups, part); });
    }
    parts([&](int64_t part) {
      for (int64_t d = document_begin(part); d < document_begin(part + 1); ++d) {
        const float* gradient =
            step_.projection.data ? document_gradients_.data() + d * step_.documents.columns : code_gradient(d);
        update_row(loops_, step_.documents, step_.rows[d], gradient, step_.learning_rate);
      }
    });
  }

 private:
  struct Scratch {
    std::vector<float> logits, sums, weights, gradient;
    std::vector<int32_t> indices;
  };

  float* features(int64_t example) { return features_.data() + example * step_.features(); }
  float* gradient(int64_t example) { return gradients_.data() + example * step_.features(); }
  float* code_gradient(int64_t document) { return code_gradients_.data() + document * step_.bits(); }
  float* coefficients(int64_t example) { return coefficients_.data() + example * step_.negative_count; }

  // First document of a part; parts cost about the same.
  int64_t document_begin(int64_t part) const {
    const auto cost = [&](int64_t d) { return step_.offsets[d] + d * kDocumentCost; };
    const int64_t target = cost(step_.batch) * part / parts_;
    int64_t low = 0, high = step_.batch;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (cost(middle) < target)
        low = middle + 1;
      else
        high = middle;
    }
    return part == parts_ ? step_.batch : low;
  }

  // The negatives' rows transposed, so that an example's logits are sums of rows.
  void gather_negatives() {
    const int64_t count = step_.negative_count;
    for (int64_t k = 0; k < count; ++k) {
      const int32_t word = step_.negatives[k];
      const float* row = step_.words.row(word);
      for (int64_t c = 0; c < step_.features(); ++c) panel_[c * count + k] = row[c];
      shifts_[k] = step_.bias[word] - step_.log_expected[word];
    }
  }

  void document(int64_t d, Scratch& scratch) {
    const int64_t bits = step_.bits(), begin = step_.offsets[d], end = step_.offsets[d + 1];
    scratch.gradient.assign(bits, 0.0f);  // first the code, then its gradient
    float* const code = scratch.gradient.data();
    float* const slopes = slopes_.data() + d * bits;
    const float* row = step_.documents.row(step_.rows[d]);
    if (step_.projection.data) {
      const LearnedRows& projection = step_.projection;
      loops_.add_rows(projection.data, projection.stride, nullptr, row, step_.documents.columns, bits, code);
    } else {
      std::copy_n(row, bits, code);
    }
    if (step_.binary) {
      loops_.code(code, bits, code, slopes);
    } else {
      std::fill_n(slopes, bits, 1.0f);
    }
    step_.loss[d] = 0.0f;
    if (step_.has_context()) {
      for (int64_t t = begin; t < end; ++t) {
        std::copy_n(code, bits, features(t));
        average_context(d, t, features(t) + bits, scratch);
        step_.loss[d] += example(t, t, t + 1, scratch);
      }
      std::fill_n(code, bits, 0.0f);
      for (int64_t t = begin; t < end; ++t) {
        for (int64_t c = 0; c < bits; ++c) code[c] += gradient(t)[c];
      }
    } else {
      std::copy_n(code, bits, features(d));
      step_.loss[d] = example(d, begin, end, scratch);
      std::copy_n(gradient(d), bits, code);
    }
    for (int64_t c = 0; c < bits; ++c) code_gradient(d)[c] = code[c] * slopes[c];
    if (step_.projection.data) {
      loops_.dots(step_.projection.data, step_.projection.stride, nullptr, step_.documents.columns, code_gradient(d),
                  bits, document_gradients_.data() + d * step_.documents.columns);
    }
  }

  // Tokens of document d within the window around t, but t itself: [low, t) and (t, high).
  int64_t window_low(int64_t d, int64_t t) const { return std::max<int64_t>(step_.offsets[d], t - step_.window); }
  int64_t window_high(int64_t d, int64_t t) const {
    return std::min<int64_t>(step_.offsets[d + 1], t + step_.window + 1);
  }

  void average_context(int64_t d, int64_t t, float* out, Scratch& scratch) {
    const LearnedRows& context = step_.context;
    const int64_t low = window_low(d, t), high = window_high(d, t), count = high - low - 1;
    std::fill_n(out, context.columns, 0.0f);
    scratch.weights.assign(count, count ? 1.0f / static_cast<float>(count) : 0.0f);
    const float* weights = scratch.weights.data();
    loops_.add_rows(context.data, context.stride, step_.tokens + low, weights, t - low, context.columns, out);
    loops_.add_rows(context.data, context.stride, step_.tokens + t + 1, weights, high - t - 1, context.columns, out);
  }

  // Loss of an example that predicts tokens [begin, end); its gradient and coefficients.
  float example(int64_t e, int64_t begin, int64_t end, Scratch& scratch) {
    const int64_t count = end - begin, negatives = step_.negative_count, columns = step_.features();
    const int32_t* tokens = step_.tokens + begin;
    float* const terms = coefficients(e);
    std::copy_n(shifts_.data(), negatives, terms);
    loops_.add_rows(panel_.data(), negatives, nullptr, features(e), columns, negatives, terms);
    float sum;
    const float largest = loops_.exponentials(terms, negatives, &sum);
    scratch.logits.resize(count);
    scratch.sums.assign(count, sum);
    loops_.dots(step_.words.data, step_.words.stride, tokens, count, features(e), columns, scratch.logits.data());
    std::vector<int32_t>& hits = scratch.indices;  // tokens that are negatives too
    hits.clear();
    for (int64_t i = 0; i < count; ++i) {
      scratch.logits[i] += step_.bias[tokens[i]] - step_.log_expected[tokens[i]] - largest;
      if (places_.first(tokens[i]) >= 0) {
        hits.push_back(static_cast<int32_t>(i));
        scratch.sums[i] = sum_without(terms, tokens[i]);
      }
    }
    const float loss = loops_.token_terms(scratch.logits.data(), scratch.sums.data(), count);
    share_out(terms, tokens, count, scratch);
    float* const missing = missing_.data() + begin;
    for (int64_t i = 0; i < count; ++i) {
      missing[i] = -scratch.logits[i];
      example_of_[begin + i] = static_cast<int32_t>(e);
    }
    float* const out = gradient(e);
    std::fill_n(out, columns, 0.0f);
    loops_.add_rows(step_.words.data, step_.words.stride, tokens, missing, count, columns, out);
    loops_.add_rows(step_.words.data, step_.words.stride, step_.negatives, terms, negatives, columns, out);
    return loss;
  }

  // Sum of the negatives' exponentials but those of `word`, which must not count against itself.
  float sum_without(const float* terms, int32_t word) const {
    float sum = 0;
    for (int64_t k = 0; k < step_.negative_count; ++k) sum += step_.negatives[k] == word ? 0.0f : terms[k];
    return sum;
  }

  // Turns a negative's exponential into its probability summed over the tokens that it is no accidental hit of.
  // scratch.sums holds 1 / normaliser of each token, scratch.indices the tokens with hits.
  void share_out(float* terms, const int32_t* tokens, int64_t count, Scratch& scratch) {
    const std::vector<int32_t>& hits = scratch.indices;
    float plain = 0;
    size_t hit = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (hit < hits.size() && hits[hit] == i)
        ++hit;
      else
        plain += scratch.sums[i];
    }
    std::vector<float>& shares = scratch.weights;
    shares.assign(step_.negative_count, plain);
    for (int32_t i : hits) {
      for (int64_t k = 0; k < step_.negative_count; ++k) {
        shares[k] += step_.negatives[k] == tokens[i] ? 0.0f : scratch.sums[i];
      }
    }
    for (int64_t k = 0; k < step_.negative_count; ++k) terms[k] *= shares[k];
  }

  // Gradients of a block of negatives' rows: every example's features by its coefficient.
  void sum_negatives(int64_t first) {
    const int64_t last = std::min(first + kNegativeBlock, step_.negative_count), examples = step_.examples();
    std::vector<float> weights(kNegativeBlock * kExampleBlock);
    for (int64_t begin = 0; begin < examples; begin += kExampleBlock) {
      const int64_t count = std::min(kExampleBlock, examples - begin);
      for (int64_t e = 0; e < count; ++e) {
        for (int64_t k = first; k < last; ++k) {
          const float weight = coefficients(begin + e)[k];
          weights[(k - first) * kExampleBlock + e] = weight;
          negative_bias_[k] += weight;
        }
      }
      for (int64_t k = first; k < last; ++k) {
        loops_.add_rows(features(begin), step_.features(), nullptr, weights.data() + (k - first) * kExampleBlock, count,
                        step_.features(), negative_gradients_.data() + k * step_.features());
      }
    }
  }

  void update_words(const WordGroups& groups, int64_t part) {
    Scratch scratch;
    const int64_t columns = step_.features();
    for (int64_t g = groups.part_begin(part, parts_); g < groups.part_end(part, parts_); ++g) {
      const int32_t *entry = groups.begin(g), *const end = groups.end(g);
      const int32_t word = groups.word(*entry);
      float bias_gradient = 0;
      scratch.gradient.assign(columns, 0.0f);
      scratch.indices.clear(), scratch.weights.clear();
      const int32_t* const tokens = entry;
      for (; entry < end && *entry < step_.total(); ++entry) {
        scratch.indices.push_back(example_of_[*entry]);
        scratch.weights.push_back(missing_[*entry]);
        bias_gradient += missing_[*entry];
      }
      loops_.add_rows(features_.data(), columns, scratch.indices.data(), scratch.weights.data(), entry - tokens,
                      columns, scratch.gradient.data());
      if (step_.has_context()) update_context(word, tokens, entry, scratch);
      for (; entry < end; ++entry) {
        const int64_t k = *entry - step_.total();
        const float* const negative = negative_gradients_.data() + k * columns;
        for (int64_t c = 0; c < columns; ++c) scratch.gradient[c] += negative[c];
        bias_gradient += negative_bias_[k];
      }
      update_row(loops_, step_.words, word, scratch.gradient.data(), step_.learning_rate, step_.bias, bias_gradient);
    }
  }

  // A word's input vector, from the examples in whose windows its tokens [begin, end) lie.
  void update_context(int32_t word, const int32_t* begin, const int32_t* end, Scratch& scratch) {
    if (begin == end) return;
    scratch.indices.clear(), scratch.weights.clear();
    for (const int32_t* token = begin; token < end; ++token) {
      const int64_t d = std::upper_bound(step_.offsets, step_.offsets + step_.batch + 1, *token) - step_.offsets - 1;
      for (int64_t t = window_low(d, *token); t < window_high(d, *token); ++t) {
        if (t == *token) continue;
        scratch.indices.push_back(static_cast<int32_t>(t));
        scratch.weights.push_back(1.0f / static_cast<float>(window_high(d, t) - window_low(d, t) - 1));
      }
    }
    std::vector<float>& sum = scratch.sums;
    sum.assign(step_.context.columns, 0.0f);
    loops_.add_rows(gradients_.data() + step_.bits(), step_.features(), scratch.indices.data(), scratch.weights.data(),
                    static_cast<int64_t>(scratch.indices.size()), step_.context.columns, sum.data());
    update_row(loops_, step_.context, word, sum.data(), step_.learning_rate);
  }

  void update_projection(int64_t part) {
    const int64_t rows = step_.documents.columns, bits = step_.bits();
    std::vector<float> weights(step_.batch), sum;
    for (int64_t i = rows * part / parts_; i < rows * (part + 1) / parts_; ++i) {
      for (int64_t d = 0; d < step_.batch; ++d) weights[d] = step_.documents.row(step_.rows[d])[i];
      sum.assign(bits, 0.0f);
      loops_.add_rows(code_gradients_.data(), bits, nullptr, weights.data(), step_.batch, bits, sum.data());
      update_row(loops_, step_.projection, i, sum.data(), step_.learning_rate);
    }
  }

  const ParagraphVectorLoops& loops_;
  const ParagraphVectorStep& step_;
  const int64_t parts_;
  const ParallelFor& parallel_for_;
  const NegativePlaces places_;
  std::vector<float> panel_;   // [features, negatives]
  std::vector<float> shifts_;  // bias less log_expected of each negative
  std::vector<float> features_, slopes_, gradients_, code_gradients_, document_gradients_;
  std::vector<float> missing_;       // of each token: its probability less 1
  std::vector<float> coefficients_;  // [examples, negatives]: probabilities summed over an example's tokens
  std::vector<int32_t> example_of_;  // of each token
  std::vector<float> negative_gradients_, negative_bias_;
};

}  // namespace embedding_kernels

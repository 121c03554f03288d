// Checks and dispatch of the paragraph-vector family on torch tensors.
#include "paragraph_vector.h"

#include <cmath>

#include "../checks.h"
#include "../kernels.h"
#include "paragraph_vector_driver.h"
#include "torch_support.h"

namespace embedding_kernels::cpu {
namespace {

const char* const kOp = "paragraph_vector_step";
const char* const kOffsets = "an int32 tensor [rows + 1]";

// A tensor that is written to, dense while the step runs; `put_back` copies it to where it came from.
class Written {
 public:
  explicit Written(const Tensor& tensor) : own_(tensor), dense_(tensor) {
    bool dense = tensor.dim() == 0 || tensor.size(tensor.dim() - 1) <= 1 || tensor.stride(tensor.dim() - 1) == 1;
    if (!dense) dense_ = torch::stable::contiguous(tensor);
    copied_ = !dense;
  }
  float* data() const { return static_cast<float*>(dense_.mutable_data_ptr()); }
  int64_t stride() const { return dense_.stride(0); }
  void put_back() {
    if (copied_) torch::stable::copy_(own_, dense_);
  }

 private:
  Tensor own_, dense_;
  bool copied_;
};

void check_squares(const char* name, const Tensor& squares, const char* of, const Tensor& rows) {
  check_tensor(kOp, name, squares, "a float32 tensor [rows]", {ScalarType::Float}, 1);
  check_size(kOp, name, squares, 0, rows.size(0), (std::string("the rows of ") + of).c_str());
}

void check_pair(const char* name, const std::optional<Tensor>& rows, const char* squares_name,
                const std::optional<Tensor>& squares) {
  if (squares && !rows) refuse(kOp, squares_name, std::string("None without ") + name, describe(*squares));
  if (!rows) return;
  check_tensor(kOp, name, *rows, "a float32 tensor of rank 2", {ScalarType::Float}, 2);
  if (!squares) refuse(kOp, squares_name, std::string("given with ") + name, "None");
  check_squares(squares_name, *squares, name, *rows);
}

void check_rows(std::vector<int64_t> rows, int64_t documents) {
  for (int64_t row : rows) {
    if (row < 0 || row >= documents) {
      refuse(kOp, "rows", "from 0 to " + std::to_string(documents - 1) + " (the rows of documents)",
             std::to_string(row));
    }
  }
  std::sort(rows.begin(), rows.end());
  const auto twice = std::adjacent_find(rows.begin(), rows.end());
  if (twice != rows.end()) refuse(kOp, "rows", "distinct", std::to_string(*twice) + " twice");
}

void check_words(const char* name, const int32_t* words, int64_t count, int64_t vocabulary) {
  for (int64_t i = 0; i < count; ++i) {
    if (words[i] < 0 || words[i] >= vocabulary) {
      refuse(kOp, name, "from 0 to " + std::to_string(vocabulary - 1) + " (the rows of words)",
             std::to_string(words[i]));
    }
  }
}

// What a number looks like in a message, as in Python's '%g'.
std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g", value);
  return text;
}

}  // namespace

Tensor paragraph_vector_step(Tensor documents, Tensor document_squares, Tensor words, Tensor bias, Tensor word_squares,
                             Tensor rows, Tensor tokens, Tensor cu_seqlens, Tensor negatives, Tensor log_expected,
                             double learning_rate, bool binary, bool update_words, std::optional<Tensor> projection,
                             std::optional<Tensor> projection_squares, std::optional<Tensor> context,
                             std::optional<Tensor> context_squares, int64_t window) {
  check_tensor(kOp, "documents", documents, "a float32 tensor [N, D] (float64 runs with backend=\"reference\")",
               {ScalarType::Float}, 2);
  check_squares("document_squares", document_squares, "documents", documents);
  check_tensor(kOp, "words", words, "a float32 tensor [V, F]", {ScalarType::Float}, 2);
  check_tensor(kOp, "bias", bias, "a float32 tensor [V]", {ScalarType::Float}, 1);
  check_size(kOp, "bias", bias, 0, words.size(0), "the rows of words");
  check_squares("word_squares", word_squares, "words", words);
  check_tensor(kOp, "rows", rows, "an int64 tensor [B]", {ScalarType::Long}, 1);
  check_tensor(kOp, "tokens", tokens, "an int32 tensor [T]", {ScalarType::Int}, 1);
  check_tensor(kOp, "cu_seqlens", cu_seqlens, kOffsets, {ScalarType::Int}, 1);
  check_size(kOp, "cu_seqlens", cu_seqlens, 0, rows.size(0) + 1, "one more than rows");
  check_tensor(kOp, "negatives", negatives, "an int32 tensor [K]", {ScalarType::Int}, 1);
  check_at_least(kOp, "the size of negatives", negatives.size(0), 1);
  check_tensor(kOp, "log_expected", log_expected, "a float32 tensor [V]", {ScalarType::Float}, 1);
  check_size(kOp, "log_expected", log_expected, 0, words.size(0), "the rows of words");
  if (!(learning_rate >= 0 && std::isfinite(learning_rate))) {
    refuse(kOp, "learning_rate", "a finite number of at least 0", number(learning_rate));
  }
  check_pair("projection", projection, "projection_squares", projection_squares);
  check_pair("context", context, "context_squares", context_squares);
  if (projection) check_size(kOp, "projection", *projection, 0, documents.size(1), "the width of documents");
  if (context) check_size(kOp, "context", *context, 0, words.size(0), "the rows of words");
  const int64_t bits = projection ? projection->size(1) : documents.size(1);
  const int64_t context_dim = context ? context->size(1) : 0;
  check_at_least(kOp, "the width of the code", bits, 1);
  check_size(kOp, "words", words, 1, bits + context_dim, "the widths of code and context together");
  if (context) {
    check_at_least(kOp, "window", window, 1);
  } else {
    check_range(kOp, "window", window, 0, 0);
  }
  const std::pair<const char*, const std::optional<Tensor>> others[] = {{"document_squares", document_squares},
                                                                        {"words", words},
                                                                        {"bias", bias},
                                                                        {"word_squares", word_squares},
                                                                        {"rows", rows},
                                                                        {"tokens", tokens},
                                                                        {"cu_seqlens", cu_seqlens},
                                                                        {"negatives", negatives},
                                                                        {"log_expected", log_expected},
                                                                        {"projection", projection},
                                                                        {"projection_squares", projection_squares},
                                                                        {"context", context},
                                                                        {"context_squares", context_squares}};
  for (const auto& [name, tensor] : others) {
    if (tensor) check_same_device(kOp, "documents", documents, name, *tensor);
  }

  rows = torch::stable::contiguous(rows);
  tokens = torch::stable::contiguous(tokens);
  cu_seqlens = torch::stable::contiguous(cu_seqlens);
  negatives = torch::stable::contiguous(negatives);
  log_expected = torch::stable::contiguous(log_expected);
  const int64_t batch = rows.size(0), total = tokens.size(0), vocabulary = words.size(0);
  const auto* row_values = static_cast<const int64_t*>(rows.const_data_ptr());
  const auto* token_values = static_cast<const int32_t*>(tokens.const_data_ptr());
  const auto* offsets = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
  const auto* negative_values = static_cast<const int32_t*>(negatives.const_data_ptr());
  check_offsets(kOp, "cu_seqlens", offsets, batch + 1, total);
  check_rows(std::vector<int64_t>(row_values, row_values + batch), documents.size(0));
  check_words("tokens", token_values, total, vocabulary);
  check_words("negatives", negative_values, negatives.size(0), vocabulary);

  std::vector<Written> written;
  for (const Tensor& tensor : {documents, document_squares, words, bias, word_squares}) written.emplace_back(tensor);
  const auto learned = [&](const std::optional<Tensor>& table, const std::optional<Tensor>& squares) {
    if (!table) return LearnedRows{nullptr, 0, 0, nullptr};
    const Written& data = written.emplace_back(*table);
    return LearnedRows{data.data(), data.stride(), table->size(1), written.emplace_back(*squares).data()};
  };
  written.reserve(9);
  Tensor loss = torch::stable::empty({batch}, ScalarType::Float);
  const ParagraphVectorStep step = {
      .documents = {written[0].data(), written[0].stride(), documents.size(1), written[1].data()},
      .words = {written[2].data(), written[2].stride(), words.size(1), written[4].data()},
      .projection = learned(projection, projection_squares),
      .context = learned(context, context_squares),
      .bias = written[3].data(),
      .log_expected = static_cast<const float*>(log_expected.const_data_ptr()),
      .rows = row_values,
      .tokens = token_values,
      .offsets = offsets,
      .negatives = negative_values,
      .batch = batch,
      .negative_count = negatives.size(0),
      .vocabulary = vocabulary,
      .window = window,
      .learning_rate = static_cast<float>(learning_rate),
      .binary = binary,
      .update_words = update_words,
      .loss = static_cast<float*>(loss.mutable_data_ptr())};
  const TorchParallelFor parallel_for;
  ParagraphVectorStepper(paragraph_vector_loops(), step, torch_threads(), parallel_for).run();
  for (Written& tensor : written) tensor.put_back();
  return loss;
}

}  // namespace embedding_kernels::cpu

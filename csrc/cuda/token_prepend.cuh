// Copies of rows over others, as token prepending has them. Rows are data: they are not read on the host, and a copy
// from or to a row that does not exist is left out.
#pragma once

#include "../norm_checks.h"
#include "launch.cuh"

namespace embedding_kernels::cuda {

// Refuses in the words of norm_checks.h; rows that do not exist only where values are looked at.
void check_copies(const char* op, const Tensor& sources, const Tensor& targets, const Tensor& rows, const char* name);

// int64 [rows]: how far from row r the row stands that is copied over it, 0 where none is; null without copies.
std::optional<Tensor> shifts_of(const char* op, const Tensor& sources, const Tensor& targets, int64_t rows);

// The copies as each row needs them for its gradient.
struct CopiesOfRows {
  const int64_t *targets, *order;  // [copies]; order: the copies by source, those of one as they came
  const int64_t *begin, *end;      // [rows]: the copies of row r are order[begin[r]] to order[end[r]]
  const int64_t* over;             // [rows]: 1 + the copy that row r was overwritten by, 0 for none
};

// The same as tensors.
class CopyTables {
 public:
  CopyTables(const char* op, const Tensor& sources, const Tensor& targets, int64_t rows);
  int64_t copies() const { return targets_.size(0); }
  CopiesOfRows of_rows() const;

 private:
  Tensor targets_, order_, tables_;
};

// Turns the gradient after the copies into that before them. A row gets its own, unless it was overwritten, and that of
// its copies, added in float32 and rounded once.
//
// `copied` is float32 [copies, D], the gradient of each copy's target. Then only rows that have to do with a copy are
// written, and `grad` may be `out`. Without it the targets' gradients are in `grad`, and every row is written.
void return_gradients(const char* op, const CopyTables& tables, const Tensor& grad, const std::optional<Tensor>& copied,
                      Tensor& out);

}  // namespace embedding_kernels::cuda

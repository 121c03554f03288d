// Copies of rows over others, as the norm family's token prepending has them: checked arguments, and both directions.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "../norm_checks.h"

namespace embedding_kernels::cpu {

// Checked, in the words of norm_checks.h.
RowCopies copies_of(const char* op, const torch::stable::Tensor& sources, const torch::stable::Tensor& targets,
                    const torch::stable::Tensor& rows, const char* name);

// Of each row after the copies, where it stood before.
std::vector<int64_t> places_of(const RowCopies& copies, int64_t rows);

// The rows at `places`, in a tensor of their own.
torch::stable::Tensor take_rows(torch::stable::Tensor rows, const std::vector<int64_t>& places);

// The gradient of the rows before the copies in the place of that after them: a source gets what its targets got, added
// in float32, and a target nothing of its own. `grad` is dense.
void return_gradients(RowCopies copies, torch::stable::Tensor& grad);

}  // namespace embedding_kernels::cpu

// pack_padded and unpack_padded (family pooling) on torch tensors: copies of whole rows, of any dtype.
#include <cstring>
#include <vector>

#include "../checks.h"
#include "../kernels.h"
#include "torch_support.h"

namespace embedding_kernels::cpu {
namespace {

// A mask as bytes (0 or not), with the place of each sequence's first kept row.
struct Mask {
  Tensor tensor;
  const uint8_t* data;
  int64_t batch, length, item;
  std::vector<int64_t> starts;

  bool keeps(int64_t b, int64_t s) const {
    const uint8_t* at = data + (b * length + s) * item;
    for (int64_t i = 0; i < item; ++i) {
      if (at[i] != 0) return true;
    }
    return false;
  }
};

void check_mask(const char* op, const Tensor& mask) {
  check_tensor(op, "mask", mask, "a bool, uint8, int32 or int64 tensor [B, S]",
               {ScalarType::Bool, ScalarType::Byte, ScalarType::Int, ScalarType::Long}, 2);
}

Mask read_mask(const Tensor& tensor) {
  Mask mask{torch::stable::contiguous(tensor),           nullptr, tensor.size(0), tensor.size(1),
            static_cast<int64_t>(tensor.element_size()), {0}};
  mask.data = static_cast<const uint8_t*>(mask.tensor.const_data_ptr());
  for (int64_t b = 0; b < mask.batch; ++b) {
    int64_t kept = 0;
    for (int64_t s = 0; s < mask.length; ++s) kept += mask.keeps(b, s);
    mask.starts.push_back(mask.starts.back() + kept);
  }
  return mask;
}

void check_count(const char* op, const char* argument, int64_t value, const Mask& mask) {
  if (value != mask.starts.back()) {
    refuse(op, argument, std::to_string(mask.starts.back()) + " (the mask entries that are not 0)",
           std::to_string(value));
  }
}

// Bytes of one row of a tensor whose rows are indexed by its first `leading` dimensions.
int64_t row_bytes(const Tensor& tensor, int64_t leading) {
  int64_t bytes = static_cast<int64_t>(tensor.element_size());
  for (int64_t d = leading; d < tensor.dim(); ++d) bytes *= tensor.size(d);
  return bytes;
}

// The tensor itself where each row is dense in memory, else a copy.
Tensor with_dense_rows(const Tensor& tensor, int64_t leading) {
  int64_t expected = 1;
  for (int64_t d = tensor.dim() - 1; d >= leading; --d) {
    if (tensor.size(d) > 1 && tensor.stride(d) != expected) return torch::stable::contiguous(tensor);
    expected *= tensor.size(d);
  }
  return tensor;
}

constexpr int64_t kGrainBytes = int64_t{1} << 17;

// Sequences a thread should take at least, so that it copies enough to be worth its start.
int64_t grain(const Mask& mask, int64_t bytes) {
  return std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(mask.length * bytes, 1));
}

}  // namespace

Tensor pack_padded(Tensor padded, Tensor mask, int64_t total_tokens) {
  const char* const op = "pack_padded";
  if (padded.dim() < 2) refuse(op, "padded", "a tensor [B, S, ...]", describe(padded));
  check_mask(op, mask);
  check_size(op, "mask", mask, 0, padded.size(0), "the batch of padded");
  check_size(op, "mask", mask, 1, padded.size(1), "the length of padded");
  check_at_least(op, "total_tokens", total_tokens, 0);
  check_same_device(op, "padded", padded, "mask", mask);
  const Mask kept = read_mask(mask);
  check_count(op, "total_tokens", total_tokens, kept);

  padded = with_dense_rows(padded, 2);
  std::vector<int64_t> shape = {total_tokens};
  for (int64_t d = 2; d < padded.dim(); ++d) shape.push_back(padded.size(d));
  Tensor out = torch::stable::empty(shape, padded.scalar_type());
  if (out.numel() == 0) return out;
  const int64_t bytes = row_bytes(padded, 2), item = static_cast<int64_t>(padded.element_size());
  const auto* from = static_cast<const uint8_t*>(padded.const_data_ptr());
  auto* to = static_cast<uint8_t*>(out.mutable_data_ptr());
  const int64_t batch_stride = padded.stride(0) * item, row_stride = padded.stride(1) * item;
  torch::stable::parallel_for(0, kept.batch, grain(kept, bytes), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      uint8_t* next = to + kept.starts[b] * bytes;
      for (int64_t s = 0; s < kept.length; ++s) {
        if (!kept.keeps(b, s)) continue;
        std::memcpy(next, from + b * batch_stride + s * row_stride, bytes);
        next += bytes;
      }
    }
  });
  return out;
}

Tensor unpack_padded(Tensor packed, Tensor mask) {
  const char* const op = "unpack_padded";
  if (packed.dim() < 1) refuse(op, "packed", "a tensor [T, ...]", describe(packed));
  check_mask(op, mask);
  check_same_device(op, "packed", packed, "mask", mask);
  const Mask kept = read_mask(mask);
  check_count(op, "packed.shape[0]", packed.size(0), kept);

  packed = with_dense_rows(packed, 1);
  std::vector<int64_t> shape = {kept.batch, kept.length};
  for (int64_t d = 1; d < packed.dim(); ++d) shape.push_back(packed.size(d));
  Tensor out = torch::stable::empty(shape, packed.scalar_type());
  if (out.numel() == 0) return out;
  const int64_t bytes = row_bytes(packed, 1), item = static_cast<int64_t>(packed.element_size());
  const auto* from = static_cast<const uint8_t*>(packed.const_data_ptr());
  auto* to = static_cast<uint8_t*>(out.mutable_data_ptr());
  const int64_t row_stride = packed.stride(0) * item;
  torch::stable::parallel_for(0, kept.batch, grain(kept, bytes), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const uint8_t* next = from + kept.starts[b] * row_stride;
      for (int64_t s = 0; s < kept.length; ++s) {
        uint8_t* row = to + (b * kept.length + s) * bytes;
        if (kept.keeps(b, s)) {
          std::memcpy(row, next, bytes);
          next += row_stride;
        } else {
          std::memset(row, 0, bytes);
        }
      }
    }
  });
  return out;
}

}  // namespace embedding_kernels::cpu

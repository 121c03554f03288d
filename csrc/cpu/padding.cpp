// pack_padded and unpack_padded (family pooling) on torch tensors: copies of whole rows, of any dtype.
#include <cstring>
#include <vector>

#include "../kernels.h"
#include "../padded_rows.h"
#include "../pooling_checks.h"
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

constexpr int64_t kGrainBytes = int64_t{1} << 17;

// Sequences a thread should take at least, so that it copies enough to be worth its start.
int64_t grain(const Mask& mask, int64_t bytes) {
  return std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(mask.length * bytes, 1));
}

}  // namespace

Tensor pack_padded(Tensor padded, Tensor mask, int64_t total_tokens) {
  const char* const op = "pack_padded";
  check_pack_padded(op, padded, mask, total_tokens);
  const Mask kept = read_mask(mask);
  check_kept(op, "total_tokens", total_tokens, kept.starts.back());

  padded = with_dense_rows(padded, 2);
  Tensor out = torch::stable::empty(sizes_of_rows({total_tokens}, padded, 2), padded.scalar_type());
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
  check_unpack_padded(op, packed, mask);
  const Mask kept = read_mask(mask);
  check_kept(op, "packed.shape[0]", packed.size(0), kept.starts.back());

  packed = with_dense_rows(packed, 1);
  Tensor out = torch::stable::empty(sizes_of_rows({kept.batch, kept.length}, packed, 1), packed.scalar_type());
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

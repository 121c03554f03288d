// Tensor maps as the emulation writes them: what a copy of a box must know, within the driver's 128 bytes.
#pragma once

#include <cstdint>

namespace emulation {

struct BoxMap {
  static constexpr uint64_t kMark = 0x70616d2078617562;  // told apart from bytes that nobody encoded
  uint64_t mark, data;
  uint64_t strides[5];  // bytes
  uint32_t last[5];     // the largest coordinate inside the tensor
  uint16_t box[5];
  uint8_t rank, element_bytes, swizzled;

  uint32_t row_bytes() const { return uint32_t{box[0]} * element_bytes; }
  uint32_t rows() const { return uint32_t{1} * box[1] * box[2] * box[3] * box[4]; }
  uint32_t bytes() const { return row_bytes() * rows(); }
};
static_assert(sizeof(BoxMap) <= 128);

}  // namespace emulation

// Where Hopper keeps tiles in shared memory: matrices as products of warpgroups see them through a descriptor, and
// boxes as the copy engine lays them down (PTX ISA, "Asynchronous warpgroup level matrix shared memory layout" and
// "Tensor swizzling modes"). Addresses are those of the shared window. A test compares these maps with CuTe's.
#pragma once

#include <cstdint>

namespace emulation {

constexpr uint32_t kTileRow = 128;  // bytes

// The 128-byte swizzle permutes pieces of 16 bytes by the number of their row: a rule on bits of the address alone.
inline uint32_t swizzled_128(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

struct MatrixDescriptor {
  uint32_t start, leading, stride;  // bytes
  uint32_t base_offset, swizzle;    // 1 is the swizzle of 128 bytes
  bool known;                       // nothing set that the emulation does not know
};
inline MatrixDescriptor decode_descriptor(uint64_t bits) {
  const auto field = [&](int at) { return static_cast<uint32_t>(bits >> at & 0x3fff) << 4; };
  const auto base_offset = static_cast<uint32_t>(bits >> 49 & 7), swizzle = static_cast<uint32_t>(bits >> 62);
  const uint64_t unused = uint64_t{3} << 14 | uint64_t{3} << 30 | uint64_t{7} << 46 | uint64_t{0x3ff} << 52;
  return {field(0),    field(16), field(32),
          base_offset, swizzle,   base_offset == 0 && swizzle == 1 && (bits & unused) == 0};
}

// The byte of value `along` of the sum in row (or column) `outer` of a factor, whose rows lie along the sum (K-major):
// groups of eight rows of 128 bytes, `stride` bytes apart. Of values of one bit, the byte that has it.
inline uint32_t address_along_rows(const MatrixDescriptor& d, int outer, int along, int value_bits) {
  const auto o = static_cast<uint32_t>(outer), byte = static_cast<uint32_t>(along * value_bits / 8);
  return swizzled_128(d.start + o / 8 * d.stride + o % 8 * kTileRow + byte);
}

// Values of 16 bits whose columns lie along the sum (MN-major): 64 values of `outer` a row of 128 bytes, the next 64
// `leading` bytes on; groups of eight positions of the sum, `stride` bytes apart.
inline uint32_t address_along_columns(const MatrixDescriptor& d, int outer, int along) {
  const auto o = static_cast<uint32_t>(outer), a = static_cast<uint32_t>(along);
  return swizzled_128(d.start + o / 64 * d.leading + a / 8 * d.stride + a % 8 * kTileRow + o % 64 * 2);
}

// Byte `byte` of row `row` of a box whose rows, along the innermost dimension, have `row_bytes` bytes.
inline uint32_t address_in_box(uint32_t start, uint32_t row, uint32_t byte, uint32_t row_bytes, bool swizzled) {
  const uint32_t address = start + row * row_bytes + byte;
  return swizzled ? swizzled_128(address) : address;
}

}  // namespace emulation

// The host's side of copies of boxes: cuTensorMapEncodeTiled, with what its documentation says that it refuses.
#include <cstring>
#include <stdexcept>
#include <string>

#include "bulk.h"
#include "emulation.h"

namespace emulation {
namespace {

// Why the driver would not make a map, or null.
const char* why_refused(const void* map, const void* data, int element_bytes, int rank, const uint64_t* sizes,
                        const uint64_t* strides, const uint32_t* box, bool swizzled) {
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0) return "a map that begins at no multiple of 64 bytes";
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0) return "data that begin at no multiple of 16 bytes";
  if (data == nullptr) return "no data";
  if (rank < 1 || rank > 5) return "a rank that is not 1 to 5";
  for (int d = 0; d < rank; ++d) {
    if (sizes[d] == 0 || sizes[d] > uint64_t{1} << 32) return "a size that is not 1 to 2^32";
    if (box[d] == 0 || box[d] > 256) return "a box that does not have 1 to 256 elements in each dimension";
    if (d == 0) continue;
    if (strides[d] % 16 != 0) return "a stride that is no multiple of 16 bytes";
    if (strides[d] >= uint64_t{1} << 40) return "a stride of 2^40 bytes or more";
  }
  const uint64_t row = uint64_t{box[0]} * static_cast<uint64_t>(element_bytes);
  if (row % 16 != 0) return "a box whose rows are no multiple of 16 bytes";
  if (swizzled && row > 128) return "a swizzled box whose rows have more than 128 bytes";
  return nullptr;
}

}  // namespace

void encode_tensor_map(const char* op, void* map, const void* data, int element_bytes, int rank, const uint64_t* sizes,
                       const uint64_t* strides, const uint32_t* box, bool swizzled) {
  const char* const refused = why_refused(map, data, element_bytes, rank, sizes, strides, box, swizzled);
  if (refused != nullptr) {
    throw std::runtime_error(std::string(op) + ": the CUDA driver refuses a tensor map: " + refused);
  }
  BoxMap made = {};
  made.mark = BoxMap::kMark;
  made.data = reinterpret_cast<uint64_t>(data);
  made.rank = static_cast<uint8_t>(rank);
  made.element_bytes = static_cast<uint8_t>(element_bytes);
  made.swizzled = swizzled;
  for (int d = 0; d < 5; ++d) {
    const bool given = d < rank;
    made.last[d] = given ? static_cast<uint32_t>(sizes[d] - 1) : 0;
    made.box[d] = given ? static_cast<uint16_t>(box[d]) : 1;
    made.strides[d] = d == 0 ? static_cast<uint64_t>(element_bytes) : given ? strides[d] : 0;
  }
  std::memset(map, 0, 128);
  std::memcpy(map, &made, sizeof made);
}

}  // namespace emulation

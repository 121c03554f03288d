// Barriers in shared memory, whose phases end by arrivals and by the bytes that copies bring (mbarrier), and the copies
// of boxes by tensor maps.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "clocks.h"

namespace emulation {

class Block;

// A tensor map as the emulation writes it into the driver's 128 bytes.
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

struct PhaseBarrier {
  uint32_t address, count;
  uint32_t begun_by, begun_at;                    // a thread and its time
  uint32_t shown_at = 0;                          // when that thread showed it to the copy engine
  uint32_t agent = kNobody;                       // of the copies that complete here; their time is 1 + the phase
  uint32_t phase = 0;                             // the one under way
  uint32_t expected = 0, issued = 0, landed = 0;  // bytes in it
  std::vector<Arrival> arrived;
  TimesMet seen, published;  // by those whose arrivals ended the phase before
  bool unawaited = false;    // copies of that phase, by anybody
  std::vector<int> waiting;

  std::string describe() const;
};

// A copy between global memory and shared memory, either way.
struct BoxCopy {
  BoxMap map;
  int32_t place[5];
  uint32_t shared;
  PhaseBarrier* barrier;  // of a load
  uint32_t group;         // of a store
};

class Phases {
 public:
  PhaseBarrier& add(uint32_t address) { return barriers_[address] = PhaseBarrier(); }
  // As the running thread uses it.
  PhaseBarrier& used(uint32_t address, uintptr_t site);
  // The copy engine is shown the barriers that a thread began.
  void show(uint32_t thread, uint32_t time);
  void end_if_done(Block& block, PhaseBarrier& barrier);

  void load(Block& block, const BoxCopy& copy);
  // Whether a copy was under way, which has landed now.
  bool land_one(Block& block, size_t draw);
  // A barrier whose copies nobody has waited for, or null: they could land after the block has ended.
  const PhaseBarrier* unawaited() const;

 private:
  std::map<uint32_t, PhaseBarrier> barriers_;
  std::vector<BoxCopy> under_way_;  // under `latest`
};

}  // namespace emulation

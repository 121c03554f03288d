// Barriers in shared memory, whose phases end by arrivals and by the bytes that copies bring (mbarrier), and the copies
// of boxes.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "clocks.h"
#include "tensor_maps.h"

namespace emulation {

class Block;
struct Thread;

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
};
std::string describe(const PhaseBarrier& barrier);

// A copy between global memory and shared memory.
struct BoxCopy {
  BoxMap map;
  int32_t place[5];
  uint32_t shared;
  PhaseBarrier* barrier;  // of a load
  uint32_t group;         // of a store

  void load() const;
  void store() const;
};

class Phases {
 public:
  // Of the running thread.
  void begin(uint32_t address, uint32_t count, uintptr_t site);
  void show_to_engine(Thread& thread);
  void arrive(Block& block, uint32_t address, uint32_t bytes, uintptr_t site);
  void wait(Block& block, uint32_t address, uint32_t parity, uintptr_t site);
  void load(Block& block, BoxCopy copy, uint32_t barrier, uintptr_t site);

  // Whether a copy was under way, which has landed now.
  bool land_one(Block& block, size_t draw);
  // A barrier whose copies nobody has waited for, or null: they could land after the block has ended.
  const PhaseBarrier* unawaited() const;

 private:
  PhaseBarrier& used(uint32_t address, uintptr_t site);
  void land(Block& block, const BoxCopy& copy);
  void end_phase_if_done(Block& block, PhaseBarrier& barrier);

  std::map<uint32_t, PhaseBarrier> barriers_;
  std::vector<BoxCopy> under_way_;  // under `latest`
};

// Bulk stores of the running thread.
void store_box(Block& block, Thread& thread, BoxCopy copy, uintptr_t site);
void wait_stores_read(Thread& thread, uint32_t unfinished);
// Nothing may use what a thread leaves behind.
void check_end_of_thread(const Thread& thread);

}  // namespace emulation

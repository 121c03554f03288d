// Memory as the kernels see it: which bytes there are, who touched them last, and what two threads may not do
// unordered.
#pragma once

#include <cstdint>
#include <string>

#include "block.h"

namespace emulation {

enum class Access : uint8_t { kRead, kWrite, kAtomic };

// Checks and records an access; ends the launch with a report where it may not be. The agent is the thread, or,
// for its asynchronous copies, theirs, at the time of their group.
void access(Thread& thread, uintptr_t address, size_t bytes, Access kind, uintptr_t site);
void access_by_copy(Thread& thread, uintptr_t address, size_t bytes, Access kind, uint32_t group, uintptr_t site);

// An access through the asynchronous proxy: what came before it must be known to who started it, and ordinary stores
// must have been published as well.
struct Witness {
  const Agents& agents;
  const Clock& clock;
};
void access_by_engine(const Witness& witness, uint32_t agent, uint32_t time, uintptr_t address, size_t bytes,
                      Access kind, uintptr_t site);

// From now on these bytes are a barrier: nobody may touch them.
void hold_for_barrier(uintptr_t address, size_t bytes);

// The shared window as 32-bit addresses see it; it does not begin at 0.
constexpr uint32_t kSharedWindow = 1024;
uintptr_t from_shared_window(uint32_t address);
uint32_t to_shared_window(uintptr_t address, uintptr_t site);

// Function, file and line of an address in code.
std::string describe_site(uintptr_t site);

// Around the blocks of a launch.
class MemoryOfLaunch {
 public:
  MemoryOfLaunch(const void* arguments, size_t argument_bytes, unsigned char* shared, size_t shared_bytes);
  ~MemoryOfLaunch();
  void begin_block();
};

}  // namespace emulation

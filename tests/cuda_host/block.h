// One block of CUDA threads: fibres, their scheduler, and how they wait for each other.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "bulk.h"
#include "clocks.h"
#include "emulation.h"

namespace emulation {

struct Statement;
struct Frame;

enum class Order { kForward, kReverse, kRandom, kWarpFirst };

struct Options {
  Order order = Order::kForward;
  uint64_t seed = 0;
  // asynchronous copies land, and products are made, at the latest legal moment, not at once
  bool latest = false;
  int architecture = 80;
};
Options& options();

// A copy from global to shared memory that has been issued.
struct Copy {
  void* to;
  const void* from;
  uint32_t bytes, read;
  uint32_t group;
};

// Registers of a thread that a product of its warpgroup still uses.
struct InFlight {
  uintptr_t begin, end;
  uint32_t group;
  bool sums;  // else a factor, which may be read
};

struct Thread {
  enum State { kReady, kWaiting, kFinished };
  int index, warp, lane;
  dim3 place;
  State state;
  Agents agents;
  Clock clock;
  void* stack_pointer;
  std::vector<Copy> copies;  // issued and not landed, under `latest`
  std::vector<BoxCopy> stores;
  uint32_t last_store = 0;     // its group
  uint32_t written = kNobody;  // the agent of what its bulk stores write, which nobody waits for
  std::vector<InFlight> in_flight;
  uint32_t products_begun = 0;  // begin_products by its number in the process, until the commit
  // what it waits for and from where, for the report of a deadlock
  const char* waits_for;
  const PhaseBarrier* waits_barrier = nullptr;
  uintptr_t waits_at;

  // Whether products do, or are about to.
  bool uses_registers() const { return !in_flight.empty() || products_begun != 0; }
};

struct Product;
constexpr int kWarpgroup = 128;

class Block {
 public:
  Block(dim3 index, dim3 size, dim3 grid, uint32_t number, unsigned char* shared, size_t shared_bytes);

  // Runs every thread to its end.
  void run(void (*entry)(const void*), const void* arguments);

  // bar.sync (waits) and bar.arrive of the running thread; `count` 0 means all threads.
  void barrier(uint32_t name, uint32_t count, bool waits, uintptr_t site);

  // The lanes of `mask` meet at a statement; the last to come acts for all of them. Lanes outside are null.
  using Act = void (*)(Block&, const Statement&, Frame* const (&lanes)[32], Thread* const (&threads)[32]);
  void meet(const Statement& statement, uint32_t mask, Frame& mine, Act act, uintptr_t site);

  // All threads of the running thread's warpgroup meet; the last to come acts.
  using ActOfWarpgroup = void (*)(Block&, const Statement&, Frame* const* frames, Thread* threads, uintptr_t site);
  void meet_warpgroup(const Statement& statement, Frame& mine, ActOfWarpgroup act, uintptr_t site);

  // Orders the lanes' memory accesses, as bar.warp.sync does.
  void order_lanes(Thread* const (&threads)[32]);

  // The running thread waits; or others, that have waited, go on.
  void wait(const char* what, uintptr_t site);
  void make_ready(Thread& thread);
  Thread& thread(int index) { return threads_[static_cast<size_t>(index)]; }
  // A thread learns what others knew.
  void acquire(Thread& thread, const TimesMet& seen, const TimesMet& published);

  // Who works beside the threads. The products of a warpgroup have one agent for each of its warps, numbered one after
  // the other: they are known to who knows all four.
  uint32_t new_agent(const std::string& name, bool ordinary = false);
  uint32_t agent_beside(Thread& thread, Beside what);
  uint32_t agent_of_products(int warpgroup) const { return static_cast<uint32_t>(threads_count + 4 * warpgroup); }
  bool are_products(uint32_t agent) const {
    return agent >= static_cast<uint32_t>(threads_count) && agent < first_named_;
  }
  // Threads, and their copies of up to 16 bytes, work through the ordinary proxy.
  bool is_ordinary(uint32_t agent) const {
    return agent < static_cast<uint32_t>(threads_count) || (agent >= first_named_ && ordinary_[agent - first_named_]);
  }
  std::string name_of(uint32_t agent) const;

  const dim3 index, size, grid;
  const uint32_t number;  // from 1 on
  unsigned char* const shared;
  const size_t shared_size;
  const int threads_count;
  Phases phases;
  std::vector<std::vector<std::shared_ptr<Product>>> products;  // of each warp, not made yet, under `latest`

 private:
  struct Barrier {
    uint32_t count = 0;
    std::vector<Arrival> arrived;
    std::vector<int> waiting;
  };
  struct Meeting {
    const Statement* statement;
    uint32_t mask, arrived;
    Frame* frames[32];
  };

  struct MeetingOfWarpgroup {
    const Statement* statement = nullptr;
    int arrived = 0;
    std::array<Frame*, kWarpgroup> frames = {};
  };
  struct Joined {
    TimesMet mine, others, both;
  };

  size_t draw();
  Thread* next();
  const TimesMet& joined(const TimesMet& mine, const TimesMet& others);
  void report_end();  // threads that wait for ever, copies that nobody waited for

  std::vector<Thread> threads_;
  std::vector<int> ready_;
  std::vector<Barrier> barriers_;
  std::vector<std::vector<Meeting>> meetings_;  // of each warp
  std::vector<MeetingOfWarpgroup> meetings_of_warpgroups_;
  std::vector<std::string> names_;  // of agents from `first_named_` on
  std::vector<bool> ordinary_;
  uint32_t first_named_;
  std::array<Joined, 8> joined_;  // the last ones
  size_t last_joined_ = 0;
  uint64_t random_;
  int last_warp_ = 0;
};

// The block and the thread that run; null outside a kernel.
extern Block* current_block;
extern Thread* current_thread;
// While a report is made, whose own code may be instrumented (the linker keeps one copy of an inline function).
extern bool failing;

// Ends the launch: the running thread never goes on. `sites` are places in code, the newest first.
[[noreturn]] void fail(const std::string& what, std::initializer_list<uintptr_t> sites);

// The stacks of the threads lie here.
extern uintptr_t stacks_begin, stacks_end;
inline bool on_a_stack(uintptr_t address) { return address >= stacks_begin && address < stacks_end; }
Thread& thread_of_stack(uintptr_t address);
// Ends the launch if a product still uses these registers; notes which are written between begin_products and a
// product.
void access_registers(const Thread& thread, uintptr_t address, size_t bytes, bool writes, uintptr_t site);
// Whether some of these registers were written since begin_products.
bool were_written(const Thread& thread, const uint32_t* registers, size_t count);

}  // namespace emulation

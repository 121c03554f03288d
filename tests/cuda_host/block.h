// One block of CUDA threads: fibres, their scheduler, and how they wait for each other.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "clocks.h"
#include "emulation.h"

namespace emulation {

struct Statement;
struct Frame;

enum class Order { kForward, kReverse, kRandom, kWarpFirst };

struct Options {
  Order order = Order::kForward;
  uint64_t seed = 0;
  // asynchronous copies land at the latest legal moment, not at once
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

struct Thread {
  enum State { kReady, kWaiting, kFinished };
  int index, warp, lane;
  dim3 place;
  State state;
  Clock clock;
  void* stack_pointer;
  std::vector<Copy> copies;  // issued and not landed, under `latest`
  // what it waits for and from where, for the report of a deadlock
  const char* waits_for;
  uintptr_t waits_at;
};

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

  // Orders the lanes' memory accesses, as bar.warp.sync does.
  void order_lanes(Thread* const (&threads)[32]);

  const dim3 index, size, grid;
  const uint32_t number;  // from 1 on
  unsigned char* const shared;
  const size_t shared_size;
  const int threads_count;

 private:
  struct Barrier {
    uint32_t count = 0;
    std::vector<ClockState> arrived;
    std::vector<int> waiting;
  };
  struct Meeting {
    const Statement* statement;
    uint32_t mask, arrived;
    Frame* frames[32];
  };

  Thread* next();
  void make_ready(Thread& thread);
  void wait(const char* what, uintptr_t site);
  void report_deadlock();

  std::vector<Thread> threads_;
  std::vector<int> ready_;
  std::vector<Barrier> barriers_;
  std::vector<std::vector<Meeting>> meetings_;  // of each warp
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

// Whether an address lies on a stack of a thread.
bool on_a_stack(uintptr_t address);

}  // namespace emulation

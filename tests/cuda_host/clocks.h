// Vector clocks: what a thread knows of the others. Agents 0 to n - 1 are the threads of a block, n to 2 n - 1 their
// asynchronous copies, whose time is the number of the group they belong to.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

namespace emulation {

using Times = std::vector<uint32_t>;

// What a thread gives to others when it arrives somewhere.
struct ClockState {
  int thread;
  std::shared_ptr<const Times> seen;
  uint32_t own, copies_seen;
};

struct Clock {
  std::shared_ptr<const Times> seen;  // shared by all who met last
  uint32_t own = 1;
  uint32_t copies_closed = 0;  // groups
  uint32_t copies_seen = 0;    // groups that the thread has waited for

  // Whether what `agent` did at `time` came before what thread `index` does now.
  bool after(int index, int threads, int agent, uint32_t time) const {
    if (agent == index) return true;
    if (agent == threads + index) return time <= copies_seen;
    return time <= (*seen)[static_cast<size_t>(agent)];
  }
  ClockState state(int index) const { return {index, seen, own, copies_seen}; }
};

// All that any of them has seen or done.
inline std::shared_ptr<const Times> join(const std::vector<ClockState>& states, int threads) {
  auto joined = std::make_shared<Times>(*states.front().seen);
  const Times* last = states.front().seen.get();
  for (const ClockState& state : states) {
    // those who met before share one vector
    if (state.seen.get() != last) {
      last = state.seen.get();
      for (size_t i = 0; i < joined->size(); ++i) (*joined)[i] = std::max((*joined)[i], (*last)[i]);
    }
  }
  for (const ClockState& state : states) {
    uint32_t& own = (*joined)[static_cast<size_t>(state.thread)];
    uint32_t& copies = (*joined)[static_cast<size_t>(threads + state.thread)];
    own = std::max(own, state.own);
    copies = std::max(copies, state.copies_seen);
  }
  return joined;
}

}  // namespace emulation

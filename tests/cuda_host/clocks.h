// Vector clocks: what a thread knows of the others. Agents 0 to n - 1 are the threads of a block; then come the
// products of each warp, and whoever else works beside the threads, numbered as they first appear. Their time is the
// number of the group, or of the phase of a barrier, that they work for. Times that a vector does not have are 0.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

namespace emulation {

using Times = std::vector<uint32_t>;
using TimesMet = std::shared_ptr<const Times>;

inline uint32_t time_of(const Times& times, uint32_t agent) { return agent < times.size() ? times[agent] : 0; }

// What works beside a thread, in groups that it closes and waits for.
enum Beside : uint8_t { kCopies, kStores, kProducts, kBesides };

constexpr uint32_t kNobody = UINT32_MAX;
struct Agents {
  uint32_t thread = kNobody;
  uint32_t beside[kBesides] = {kNobody, kNobody, kNobody};
};

struct Knowledge {
  TimesMet met;                    // shared by all who met last
  uint32_t own = 0;                // of the thread itself
  uint32_t waited[kBesides] = {};  // groups beside it

  // Whether what `agent` did at `time` is known to a thread with these agents.
  bool has(const Agents& mine, uint32_t agent, uint32_t time) const {
    if (agent == mine.thread) return time <= own;
    if (time <= time_of(*met, agent)) return true;
    for (int i = 0; i < kBesides; ++i) {
      if (agent == mine.beside[i]) return time <= waited[i];
    }
    return false;
  }
};

// What a thread gives to others when it arrives somewhere.
struct Arrival {
  Agents agents;
  Knowledge seen, published;
};

struct Clock {
  Knowledge seen;
  // of it, what the asynchronous proxy (copies of boxes, products of warpgroups) sees of ordinary stores
  Knowledge published;
  uint32_t closed[kBesides] = {};  // groups

  Arrival arrive(const Agents& mine) {
    const Arrival arrival = {mine, seen, published};
    ++seen.own;
    return arrival;
  }
  // Up to which group all are finished, when a thread has waited until at most the last `unfinished` are not.
  uint32_t wait(Beside what, uint32_t unfinished) {
    uint32_t& waited = seen.waited[what];
    return waited = std::max(waited, closed[what] > unfinished ? closed[what] - unfinished : 0);
  }
};

// The later of each agent's times.
inline void join_into(Times& times, const Times& others) {
  if (times.size() < others.size()) times.resize(others.size(), 0);
  for (size_t i = 0; i < others.size(); ++i) times[i] = std::max(times[i], others[i]);
}
inline void join_into(Times& times, uint32_t agent, uint32_t time) {
  if (time == 0 || agent == kNobody) return;  // groups of nothing may be waited for too
  if (times.size() <= agent) times.resize(agent + 1, 0);
  times[agent] = std::max(times[agent], time);
}

// All that any of them knows or, in what they have seen, did.
inline TimesMet join(const std::vector<Arrival>& arrivals, Knowledge Arrival::* which) {
  const TimesMet& first = (arrivals.front().*which).met;
  const bool nothing_new = std::all_of(arrivals.begin(), arrivals.end(), [&](const Arrival& arrival) {
    const Knowledge& known = arrival.*which;
    return known.met == first && known.own == 0 && known.waited[0] + known.waited[1] + known.waited[2] == 0;
  });
  if (nothing_new) return first;
  auto joined = std::make_shared<Times>(*first);
  const Times* last = first.get();
  for (const Arrival& arrival : arrivals) {
    const Knowledge& known = arrival.*which;
    // those who met before share one vector
    if (known.met.get() != last) join_into(*joined, *(last = known.met.get()));
  }
  for (const Arrival& arrival : arrivals) {
    const Knowledge& known = arrival.*which;
    join_into(*joined, arrival.agents.thread, known.own);
    for (int i = 0; i < kBesides; ++i) join_into(*joined, arrival.agents.beside[i], known.waited[i]);
  }
  return joined;
}

}  // namespace emulation

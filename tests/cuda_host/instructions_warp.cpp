// Barriers, and what the lanes of a warp do together: shuffles, votes, reductions.
#include <algorithm>
#include <bit>

#include "program.h"

namespace emulation {
namespace {

using Frames = Frame* const[32];
using Threads = Thread* const[32];

uint32_t number(Context& c, const Statement& s, size_t group) {
  return static_cast<uint32_t>(c.frame.get(s.argument(group)));
}

// bar.sync name[, count] and bar.arrive name, count
template <bool Waits>
void barrier(Context& c, const Statement& s) {
  const uint32_t count = s.groups.size() > 1 ? number(c, s, 1) : 0;
  c.block.barrier(number(c, s, 0), count, Waits, c.site);
}

void sync_lanes(Context& c, const Statement& s) {
  c.block.meet(
      s, number(c, s, 0), c.frame,
      [](Block& block, const Statement&, Frames& frames, Threads& threads) {
        (void)frames;
        block.order_lanes(threads);
      },
      c.site);
}

enum class Shuffle { kIndex, kXor, kUp, kDown };

// shfl.sync of whole warps: the lane read from, or this lane itself where that one is past the end.
template <Shuffle Kind>
void shuffle(Context& c, const Statement& s) {
  const uint32_t clamp = number(c, s, 3), expected = Kind == Shuffle::kUp ? 0 : 0x1f;
  if (clamp != expected) fail("a shuffle within parts of a warp is not emulated", {c.site});
  c.block.meet(
      s, number(c, s, 4), c.frame,
      [](Block&, const Statement& st, Frames& frames, Threads& threads) {
        uint64_t values[32];
        for (int lane = 0; lane < 32; ++lane) {
          if (frames[lane] != nullptr && threads[lane] != nullptr) values[lane] = frames[lane]->get(st.argument(1));
        }
        for (int lane = 0; lane < 32; ++lane) {
          if (threads[lane] == nullptr) continue;
          const auto by = static_cast<int>(frames[lane]->get(st.argument(2)) & 31);
          int from = by;
          if (Kind == Shuffle::kXor) from = lane ^ by;
          if (Kind == Shuffle::kUp) from = lane - by >= 0 ? lane - by : lane;
          if (Kind == Shuffle::kDown) from = lane + by < 32 ? lane + by : lane;
          if (threads[from] == nullptr)
            fail("a shuffle reads lane " + std::to_string(from) + ", which takes no part", {});
          frames[lane]->set(st.argument(0), values[from]);
        }
      },
      c.site);
}

void ballot(Context& c, const Statement& s) {
  c.block.meet(
      s, number(c, s, 2), c.frame,
      [](Block&, const Statement& st, Frames& frames, Threads& threads) {
        uint64_t lanes = 0;
        for (int lane = 0; lane < 32; ++lane) {
          if (threads[lane] != nullptr && frames[lane]->get(st.argument(1)) != 0) lanes |= uint64_t{1} << lane;
        }
        for (int lane = 0; lane < 32; ++lane) {
          if (threads[lane] != nullptr) frames[lane]->set(st.argument(0), lanes);
        }
      },
      c.site);
}

// redux.sync: '+', '<' or '>' over unsigned words.
template <char Kind>
void reduce(Context& c, const Statement& s) {
  c.block.meet(
      s, number(c, s, 2), c.frame,
      [](Block&, const Statement& st, Frames& frames, Threads& threads) {
        uint32_t total = Kind == '<' ? ~0u : 0u;
        for (int lane = 0; lane < 32; ++lane) {
          if (threads[lane] == nullptr) continue;
          const auto value = static_cast<uint32_t>(frames[lane]->get(st.argument(1)));
          total = Kind == '+' ? total + value : Kind == '<' ? std::min(total, value) : std::max(total, value);
        }
        for (int lane = 0; lane < 32; ++lane) {
          if (threads[lane] != nullptr) frames[lane]->set(st.argument(0), total);
        }
      },
      c.site);
}

}  // namespace

void add_warp_instructions(Table& table) {
  table.insert({
      {"bar.sync", barrier<true>},
      {"bar.arrive", barrier<false>},
      {"bar.warp.sync", sync_lanes},
      {"shfl.sync.idx.b32", shuffle<Shuffle::kIndex>},
      {"shfl.sync.bfly.b32", shuffle<Shuffle::kXor>},
      {"shfl.sync.up.b32", shuffle<Shuffle::kUp>},
      {"shfl.sync.down.b32", shuffle<Shuffle::kDown>},
      {"vote.sync.ballot.b32", ballot},
      {"redux.sync.add.u32", reduce<'+'>},
      {"redux.sync.min.u32", reduce<'<'>},
      {"redux.sync.max.u32", reduce<'>'>},
  });
}

}  // namespace emulation

#include "phases.h"

#include <algorithm>
#include <cstring>

#include "block.h"
#include "memory.h"
#include "tiles.h"

namespace emulation {
namespace {

constexpr uint32_t kMostBytes = (1 << 20) - 1;  // that a phase can expect
constexpr uint32_t kPiece = 16;                 // what the swizzle leaves together

std::string place_in_shared(uint32_t address) { return "shared memory + " + std::to_string(address - kSharedWindow); }

// A row of a box: its bytes inside the tensor, and where the first of them is in global memory.
struct BoxRow {
  uint32_t row, begin, end;
  uintptr_t address;
};

template <class Act>
void for_each_row(const BoxCopy& copy, Act act) {
  const BoxMap& map = copy.map;
  const auto size = static_cast<int64_t>(map.last[0]) + 1, first = int64_t{copy.place[0]};
  const int64_t from = std::clamp<int64_t>(-first, 0, map.box[0]);
  const int64_t to = std::clamp<int64_t>(size - first, from, map.box[0]);
  uint32_t counts[5] = {};
  for (uint32_t row = 0; row < map.rows(); ++row) {
    // distances add up as the engine's address does, past 2^64
    uint64_t address = map.data + static_cast<uint64_t>((first + from) * map.element_bytes);
    bool inside = true;
    for (int d = 1; d < 5; ++d) {
      const int64_t at = int64_t{copy.place[d]} + counts[d];
      inside = inside && at >= 0 && at <= int64_t{map.last[d]};
      address += static_cast<uint64_t>(at) * map.strides[d];
    }
    const auto bytes = [&](int64_t elements) {
      return inside ? static_cast<uint32_t>(elements * map.element_bytes) : 0;
    };
    act(BoxRow{row, bytes(from), bytes(to), address});
    for (int d = 1; d < 5 && ++counts[d] == map.box[d]; ++d) counts[d] = 0;
  }
}

// The pieces of a row that are inside the tensor: where each is in shared memory, its first byte in the row, and bytes.
template <class Act>
void for_each_piece(const BoxCopy& copy, const BoxRow& row, Act act) {
  for (uint32_t byte = row.begin; byte < row.end;) {
    const uint32_t bytes = std::min(kPiece - byte % kPiece, row.end - byte);
    const uint32_t at = address_in_box(copy.shared, row.row, byte, copy.map.row_bytes(), copy.map.swizzled != 0);
    act(from_shared_window(at), byte, bytes);
    byte += bytes;
  }
}

void check_copy(const BoxCopy& copy, uintptr_t site) {
  if (copy.map.mark != BoxMap::kMark) fail("a copy by a tensor map that nobody made", {site});
  const uint32_t multiple = copy.map.swizzled != 0 ? 1024 : 128;
  if ((copy.shared - kSharedWindow) % multiple != 0) {
    fail("misaligned: a box at " + place_in_shared(copy.shared) + ", which is no multiple of " +
             std::to_string(multiple),
         {site});
  }
  if (copy.map.swizzled != 0 && copy.map.row_bytes() != kTileRow) {
    fail("a swizzled box whose rows do not have 128 bytes is not emulated", {site});
  }
}

Witness witness_of(const Thread& thread) { return {thread.agents, thread.clock.seen, thread.clock.published}; }

}  // namespace

std::string describe(const PhaseBarrier& barrier) {
  return "phase " + std::to_string(barrier.phase) + " of the barrier in " + place_in_shared(barrier.address) +
         " (missing: " + std::to_string(barrier.count - barrier.arrived.size()) + " of " +
         std::to_string(barrier.count) + " arrivals, " + std::to_string(barrier.expected - barrier.landed) + " of " +
         std::to_string(barrier.expected) + " bytes)";
}

void BoxCopy::load() const {
  std::memset(reinterpret_cast<void*>(from_shared_window(shared)), 0, map.bytes());
  for_each_row(*this, [&](const BoxRow& row) {
    for_each_piece(*this, row, [&](uintptr_t at, uint32_t byte, uint32_t bytes) {
      std::memcpy(reinterpret_cast<void*>(at), reinterpret_cast<const void*>(row.address + byte - row.begin), bytes);
    });
  });
}

void BoxCopy::store() const {
  for_each_row(*this, [&](const BoxRow& row) {
    for_each_piece(*this, row, [&](uintptr_t at, uint32_t byte, uint32_t bytes) {
      std::memcpy(reinterpret_cast<void*>(row.address + byte - row.begin), reinterpret_cast<const void*>(at), bytes);
    });
  });
}

// ---- barriers ----

void Phases::begin(uint32_t address, uint32_t count, uintptr_t site) {
  Thread& thread = *current_thread;
  if (address % 8 != 0) fail("misaligned: a barrier in " + place_in_shared(address), {site});
  if (count == 0 || count > kMostBytes) fail("a barrier of " + std::to_string(count) + " arrivals", {site});
  access(thread, from_shared_window(address), 8, Access::kWrite, site);
  hold_for_barrier(from_shared_window(address), 8);
  PhaseBarrier made = {};
  made.address = address;
  made.count = count;
  made.begun_by = static_cast<uint32_t>(thread.index);
  made.begun_at = thread.clock.seen.own;
  barriers_[address] = made;
}

void Phases::show_to_engine(Thread& thread) {
  for (auto& [address, barrier] : barriers_) {
    if (barrier.begun_by == static_cast<uint32_t>(thread.index) && barrier.shown_at == 0) {
      barrier.shown_at = thread.clock.seen.own;
    }
  }
  ++thread.clock.seen.own;
}

PhaseBarrier& Phases::used(uint32_t address, uintptr_t site) {
  const auto found = barriers_.find(address);
  if (found == barriers_.end()) fail("a barrier that was not begun, in " + place_in_shared(address), {site});
  PhaseBarrier& barrier = found->second;
  if (!current_thread->clock.seen.has(current_thread->agents, barrier.begun_by, barrier.begun_at)) {
    fail("race: a use of the barrier in " + place_in_shared(address) + " and its beginning by thread " +
             std::to_string(barrier.begun_by) + " are not ordered",
         {site});
  }
  return barrier;
}

void Phases::arrive(Block& block, uint32_t address, uint32_t bytes, uintptr_t site) {
  Thread& thread = *current_thread;
  PhaseBarrier& barrier = used(address, site);
  if (barrier.arrived.size() == barrier.count) fail("too many arrivals: " + describe(barrier), {site});
  barrier.expected += bytes;
  if (barrier.expected > kMostBytes) fail("more than 2^20 - 1 bytes are expected: " + describe(barrier), {site});
  barrier.arrived.push_back({thread.agents, thread.clock.seen, thread.clock.published});
  ++thread.clock.seen.own;
  end_phase_if_done(block, barrier);
}

void Phases::end_phase_if_done(Block& block, PhaseBarrier& barrier) {
  if (barrier.arrived.size() < barrier.count || barrier.landed < barrier.expected) return;
  barrier.seen = join(barrier.arrived, &Arrival::seen);
  barrier.published = join(barrier.arrived, &Arrival::published);
  if (barrier.issued != 0) {
    auto seen = std::make_shared<Times>(*barrier.seen);
    join_into(*seen, barrier.agent, barrier.phase + 1);
    barrier.seen = std::move(seen);
    barrier.unawaited = barrier.waiting.empty();
  }
  ++barrier.phase;
  barrier.expected = barrier.issued = barrier.landed = 0;
  barrier.arrived.clear();
  for (int index : barrier.waiting) {
    block.acquire(block.thread(index), barrier.seen, barrier.published);
    block.make_ready(block.thread(index));
  }
  barrier.waiting.clear();
}

void Phases::wait(Block& block, uint32_t address, uint32_t parity, uintptr_t site) {
  Thread& thread = *current_thread;
  PhaseBarrier& barrier = used(address, site);
  if (parity > 1) fail("a parity that is neither 0 nor 1", {site});
  if ((barrier.phase & 1) == parity) {
    barrier.waiting.push_back(thread.index);
    thread.waits_barrier = &barrier;
    block.wait("a barrier in shared memory", site);
  } else if (barrier.phase != 0) {
    barrier.unawaited = false;
    block.acquire(thread, barrier.seen, barrier.published);
  }
}

// ---- copies ----

void Phases::load(Block& block, BoxCopy copy, uint32_t barrier_address, uintptr_t site) {
  Thread& thread = *current_thread;
  check_copy(copy, site);
  PhaseBarrier& barrier = used(barrier_address, site);
  if (barrier.shown_at == 0 || !thread.clock.seen.has(thread.agents, barrier.begun_by, barrier.shown_at)) {
    fail("the copy engine was not shown that the barrier in " + place_in_shared(barrier_address) +
             " was begun (publish_barriers)",
         {site});
  }
  const uint32_t bytes = copy.map.bytes();
  if (barrier.issued + bytes > barrier.expected) {
    fail("a copy of " + std::to_string(bytes) + " bytes, of which " +
             std::to_string(barrier.expected - barrier.issued) + " are expected: " + describe(barrier),
         {site});
  }
  barrier.issued += bytes;
  if (barrier.agent == kNobody) {
    barrier.agent = block.new_agent("a copy for the barrier in " + place_in_shared(barrier_address));
  }
  const uint32_t time = barrier.phase + 1;
  const Witness witness = witness_of(thread);
  for_each_row(copy, [&](const BoxRow& row) {
    if (row.begin == row.end) return;
    access_by_engine(witness, barrier.agent, time, row.address, row.end - row.begin, Access::kRead, site);
  });
  access_by_engine(witness, barrier.agent, time, from_shared_window(copy.shared), bytes, Access::kWrite, site);
  copy.barrier = &barrier;
  if (options().latest) {
    std::memset(reinterpret_cast<void*>(from_shared_window(copy.shared)), 0xff, bytes);  // NaN, until it lands
    under_way_.push_back(copy);
  } else {
    land(block, copy);
  }
}

void Phases::land(Block& block, const BoxCopy& copy) {
  copy.load();
  copy.barrier->landed += copy.map.bytes();
  end_phase_if_done(block, *copy.barrier);
}

bool Phases::land_one(Block& block, size_t draw) {
  if (under_way_.empty()) return false;
  const auto place = under_way_.begin() + static_cast<std::ptrdiff_t>(draw % under_way_.size());
  const BoxCopy copy = *place;
  under_way_.erase(place);
  land(block, copy);
  return true;
}

const PhaseBarrier* Phases::unawaited() const {
  for (const auto& [address, barrier] : barriers_) {
    if (barrier.unawaited || barrier.issued != 0) return &barrier;
  }
  return nullptr;
}

void store_box(Block& block, Thread& thread, BoxCopy copy, uintptr_t site) {
  check_copy(copy, site);
  const uint32_t agent = block.agent_beside(thread, kStores);
  if (thread.written == kNobody) {
    thread.written = block.new_agent("the global side of a bulk store of thread " + std::to_string(thread.index));
  }
  copy.group = thread.clock.closed[kStores] + 1;
  thread.last_store = copy.group;
  const Witness witness = witness_of(thread);
  for_each_row(copy, [&](const BoxRow& row) {
    if (row.begin == row.end) return;
    for_each_piece(copy, row, [&](uintptr_t at, uint32_t, uint32_t bytes) {
      access_by_engine(witness, agent, copy.group, at, bytes, Access::kRead, site);
    });
    const uint32_t bytes = row.end - row.begin;
    access_by_engine(witness, thread.written, copy.group, row.address, bytes, Access::kWrite, site);
  });
  if (options().latest) {
    thread.stores.push_back(copy);
  } else {
    copy.store();
  }
}

void wait_stores_read(Thread& thread, uint32_t unfinished) {
  const uint32_t closed = thread.clock.closed[kStores];
  uint32_t& waited = thread.clock.seen.waited[kStores];
  waited = std::max(waited, closed > unfinished ? closed - unfinished : 0);
  std::erase_if(thread.stores, [&](const BoxCopy& copy) {
    if (copy.group <= waited) copy.store();
    return copy.group <= waited;
  });
}

void check_end_of_thread(const Thread& thread) {
  if (thread.last_store > thread.clock.seen.waited[kStores]) {
    fail("a thread ends while its bulk stores may still read shared memory", {});
  }
  if (!thread.in_flight.empty()) fail("a thread ends before wait_products has seen its products through", {});
}

}  // namespace emulation

// Barriers in shared memory, and copies of boxes by the copy engine.
#include <algorithm>
#include <cstring>

#include "bulk.h"
#include "memory.h"
#include "program.h"
#include "tiles.h"

namespace emulation {
namespace {

constexpr uint32_t kMostBytes = (1 << 20) - 1;  // that a phase can expect
constexpr uint32_t kPiece = 16;                 // what the swizzle leaves together

uint32_t word(Context& c, const Argument& argument) { return static_cast<uint32_t>(c.frame.get(argument)); }
std::string place_in_shared(uint32_t address) { return "shared memory + " + std::to_string(address - kSharedWindow); }

// ---- boxes ----

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

void move(const BoxCopy& copy) {
  const bool loads = copy.barrier != nullptr;
  if (loads) std::memset(reinterpret_cast<void*>(from_shared_window(copy.shared)), 0, copy.map.bytes());
  for_each_row(copy, [&](const BoxRow& row) {
    for_each_piece(copy, row, [&](uintptr_t here, uint32_t byte, uint32_t bytes) {
      const uintptr_t there = row.address + byte - row.begin;
      std::memcpy(reinterpret_cast<void*>(loads ? here : there), reinterpret_cast<void*>(loads ? there : here), bytes);
    });
  });
}

// `[map, {coordinates}]`
BoxCopy box_of(Context& c, const std::vector<Argument>& group, const Argument& shared) {
  BoxCopy copy = {};
  std::memcpy(&copy.map, reinterpret_cast<const void*>(c.frame.get(group[0])), sizeof copy.map);
  copy.shared = word(c, shared);
  if (copy.map.mark != BoxMap::kMark) fail("a copy by a tensor map that nobody made", {c.site});
  if (copy.map.rank != group.size() - 1) fail("a copy with more or fewer coordinates than its map has", {c.site});
  for (size_t i = 1; i < group.size(); ++i) copy.place[i - 1] = static_cast<int32_t>(word(c, group[i]));
  const uint32_t multiple = copy.map.swizzled != 0 ? 1024 : 128;
  if ((copy.shared - kSharedWindow) % multiple != 0) {
    fail("misaligned: a box at " + place_in_shared(copy.shared) + ", which is no multiple of " +
             std::to_string(multiple),
         {c.site});
  }
  // an illegal instruction on a GPU
  if (int64_t{copy.place[0]} * copy.map.element_bytes % 16 != 0) {
    fail("misaligned: a box whose innermost coordinate, " + std::to_string(copy.place[0]) +
             ", is no multiple of 16 bytes",
         {c.site});
  }
  if (copy.map.swizzled != 0 && copy.map.row_bytes() != kTileRow) {
    fail("a swizzled box whose rows do not have 128 bytes is not emulated", {c.site});
  }
  return copy;
}

// ---- instructions ----

void begin_barrier(Context& c, const Statement& s) {
  const uint32_t address = word(c, s.argument(0)), count = word(c, s.argument(1));
  if (address % 8 != 0) fail("misaligned: a barrier in " + place_in_shared(address), {c.site});
  if (count == 0 || count > kMostBytes) fail("a barrier of " + std::to_string(count) + " arrivals", {c.site});
  access(c.thread, from_shared_window(address), 8, Access::kWrite, c.site);
  hold_for_barrier(from_shared_window(address), 8);
  PhaseBarrier& barrier = c.block.phases.add(address);
  barrier.address = address;
  barrier.count = count;
  barrier.begun_by = c.thread.agents.thread;
  barrier.begun_at = c.thread.clock.seen.own;
}

void publish_barriers(Context& c, const Statement&) {
  c.block.phases.show(c.thread.agents.thread, c.thread.clock.seen.own++);
}

void publish_stores(Context& c, const Statement& s) {
  c.thread.clock.published = c.thread.clock.seen;
  publish_barriers(c, s);
}

// The state that an arrival gives is not emulated, so it must be thrown away.
template <bool Expects>
void arrive(Context& c, const Statement& s) {
  if (s.argument(0).kind != Argument::kNothing) fail("the state of a barrier is not emulated", {c.site});
  PhaseBarrier& barrier = c.block.phases.used(word(c, s.argument(1)), c.site);
  if (barrier.arrived.size() == barrier.count) fail("too many arrivals: " + barrier.describe(), {c.site});
  if (Expects) barrier.expected += word(c, s.argument(2));
  if (barrier.expected > kMostBytes) fail("more than 2^20 - 1 bytes are expected: " + barrier.describe(), {c.site});
  barrier.arrived.push_back(c.thread.clock.arrive(c.thread.agents));
  c.block.phases.end_if_done(c.block, barrier);
}

void try_wait(Context& c, const Statement& s) {
  PhaseBarrier& barrier = c.block.phases.used(word(c, s.argument(1)), c.site);
  const uint32_t parity = word(c, s.argument(2));
  if (parity > 1) fail("a parity that is neither 0 nor 1", {c.site});
  if ((barrier.phase & 1) == parity) {
    barrier.waiting.push_back(c.thread.index);
    c.thread.waits_barrier = &barrier;
    c.block.wait("a barrier in shared memory", c.site);
  } else if (barrier.phase != 0) {
    barrier.unawaited = false;
    c.block.acquire(c.thread, barrier.seen, barrier.published);
  }
  c.frame.set(s.argument(0), 1);
}

void load_box(Context& c, const Statement& s) {
  BoxCopy copy = box_of(c, s.groups[1], s.argument(0));
  PhaseBarrier& barrier = c.block.phases.used(word(c, s.argument(2)), c.site);
  const Clock& clock = c.thread.clock;
  if (barrier.shown_at == 0 || !clock.seen.has(c.thread.agents, barrier.begun_by, barrier.shown_at)) {
    fail("the copy engine was not shown by publish_barriers: " + barrier.describe(), {c.site});
  }
  const uint32_t bytes = copy.map.bytes(), time = barrier.phase + 1;
  if (barrier.issued + bytes > barrier.expected) {
    fail("a copy of " + std::to_string(bytes) + " bytes, of which " +
             std::to_string(barrier.expected - barrier.issued) + " are expected: " + barrier.describe(),
         {c.site});
  }
  barrier.issued += bytes;
  if (barrier.agent == kNobody) {
    barrier.agent = c.block.new_agent("a copy for the barrier in " + place_in_shared(barrier.address));
  }
  const Witness witness = {c.thread.agents, clock};
  for_each_row(copy, [&](const BoxRow& row) {
    if (row.begin == row.end) return;
    access_by_engine(witness, barrier.agent, time, row.address, row.end - row.begin, Access::kRead, c.site);
  });
  access_by_engine(witness, barrier.agent, time, from_shared_window(copy.shared), bytes, Access::kWrite, c.site);
  copy.barrier = &barrier;
  c.block.phases.load(c.block, copy);
}

void store_box(Context& c, const Statement& s) {
  BoxCopy copy = box_of(c, s.groups[0], s.argument(1));
  Thread& thread = c.thread;
  const uint32_t agent = c.block.agent_beside(thread, kStores);
  if (thread.written == kNobody) {
    thread.written = c.block.new_agent("the global side of a bulk store of thread " + std::to_string(thread.index));
  }
  thread.last_store = copy.group = thread.clock.closed[kStores] + 1;
  const Witness witness = {thread.agents, thread.clock};
  for_each_row(copy, [&](const BoxRow& row) {
    if (row.begin == row.end) return;
    for_each_piece(copy, row, [&](uintptr_t at, uint32_t, uint32_t bytes) {
      access_by_engine(witness, agent, copy.group, at, bytes, Access::kRead, c.site);
    });
    const uint32_t bytes = row.end - row.begin;
    access_by_engine(witness, thread.written, copy.group, row.address, bytes, Access::kWrite, c.site);
  });
  thread.stores.push_back(copy);
  if (options().latest) return;
  move(copy);
  thread.stores.clear();
}

void wait_stores_read(Context& c, const Statement& s) {
  const uint32_t waited = c.thread.clock.wait(kStores, word(c, s.argument(0)));
  std::erase_if(c.thread.stores, [&](const BoxCopy& copy) {
    if (copy.group <= waited) move(copy);
    return copy.group <= waited;
  });
}

}  // namespace

std::string PhaseBarrier::describe() const {
  return "phase " + std::to_string(phase) + " of the barrier in " + place_in_shared(address) +
         " (missing: " + std::to_string(count - arrived.size()) + " of " + std::to_string(count) + " arrivals, " +
         std::to_string(expected - landed) + " of " + std::to_string(expected) + " bytes)";
}

PhaseBarrier& Phases::used(uint32_t address, uintptr_t site) {
  const auto found = barriers_.find(address);
  if (found == barriers_.end()) fail("a barrier that was not begun, in " + place_in_shared(address), {site});
  PhaseBarrier& barrier = found->second;
  if (!current_thread->clock.seen.has(current_thread->agents, barrier.begun_by, barrier.begun_at)) {
    fail("race: a use and the beginning, by thread " + std::to_string(barrier.begun_by) +
             ", are not ordered: " + barrier.describe(),
         {site});
  }
  return barrier;
}

void Phases::show(uint32_t thread, uint32_t time) {
  for (auto& [address, barrier] : barriers_) {
    if (barrier.begun_by == thread && barrier.shown_at == 0) barrier.shown_at = time;
  }
}

void Phases::end_if_done(Block& block, PhaseBarrier& barrier) {
  if (barrier.arrived.size() < barrier.count || barrier.landed < barrier.expected) return;
  auto seen = std::make_shared<Times>(*join(barrier.arrived, &Arrival::seen));
  if (barrier.issued != 0) join_into(*seen, barrier.agent, barrier.phase + 1);
  barrier.unawaited = barrier.issued != 0 && barrier.waiting.empty();
  barrier.seen = std::move(seen);
  barrier.published = join(barrier.arrived, &Arrival::published);
  ++barrier.phase;
  barrier.expected = barrier.issued = barrier.landed = 0;
  barrier.arrived.clear();
  for (int index : barrier.waiting) {
    block.acquire(block.thread(index), barrier.seen, barrier.published);
    block.make_ready(block.thread(index));
  }
  barrier.waiting.clear();
}

void Phases::load(Block& block, const BoxCopy& copy) {
  under_way_.push_back(copy);
  if (!options().latest) {
    land_one(block, 0);
    return;
  }
  // NaN, until it lands
  std::memset(reinterpret_cast<void*>(from_shared_window(copy.shared)), 0xff, copy.map.bytes());
}

bool Phases::land_one(Block& block, size_t draw) {
  if (under_way_.empty()) return false;
  const auto place = under_way_.begin() + static_cast<std::ptrdiff_t>(draw % under_way_.size());
  const BoxCopy copy = *place;
  under_way_.erase(place);
  move(copy);
  copy.barrier->landed += copy.map.bytes();
  end_if_done(block, *copy.barrier);
  return true;
}

const PhaseBarrier* Phases::unawaited() const {
  for (const auto& [address, barrier] : barriers_) {
    if (barrier.unawaited || barrier.issued != 0) return &barrier;
  }
  return nullptr;
}

void add_bulk_instructions(Table& table) {
  table.insert({
      {"mbarrier.init.shared::cta.b64", begin_barrier},
      {"fence.mbarrier_init.release.cluster", publish_barriers},
      {"fence.proxy.async.shared::cta", publish_stores},
      {"mbarrier.arrive.shared::cta.b64", arrive<false>},
      {"mbarrier.arrive.expect_tx.shared::cta.b64", arrive<true>},
      {"mbarrier.try_wait.parity.shared::cta.b64", try_wait},
      {"cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes", load_box},
      {"cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes", load_box},
      {"cp.async.bulk.tensor.5d.global.shared::cta.bulk_group", store_box},
      {"cp.async.bulk.commit_group", [](Context& c, const Statement&) { ++c.thread.clock.closed[kStores]; }},
      {"cp.async.bulk.wait_group.read", wait_stores_read},
      {"prefetch.tensormap", [](Context&, const Statement&) {}},
  });
}

}  // namespace emulation

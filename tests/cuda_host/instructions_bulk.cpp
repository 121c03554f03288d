// Barriers in shared memory, and copies of boxes by the copy engine.
#include <cstring>
#include <unordered_map>

#include "memory.h"
#include "program.h"

namespace emulation {
namespace {

uint32_t word(Context& c, const Argument& argument) { return static_cast<uint32_t>(c.frame.get(argument)); }

void begin_barrier(Context& c, const Statement& s) {
  c.block.phases.begin(word(c, s.argument(0)), word(c, s.argument(1)), c.site);
}

// The state that an arrival gives is not emulated, so it must be thrown away.
template <bool Expects>
void arrive(Context& c, const Statement& s) {
  if (s.argument(0).kind != Argument::kNothing) fail("the state of a barrier is not emulated", {c.site});
  c.block.phases.arrive(c.block, word(c, s.argument(1)), Expects ? word(c, s.argument(2)) : 0, c.site);
}

void try_wait(Context& c, const Statement& s) {
  c.block.phases.wait(c.block, word(c, s.argument(1)), word(c, s.argument(2)), c.site);
  c.frame.set(s.argument(0), 1);
}

void publish_stores(Context& c, const Statement&) {
  c.block.phases.show_to_engine(c.thread);
  c.thread.clock.publish();
}

// `[map, {coordinates}]`
BoxCopy box_of(Context& c, const std::vector<Argument>& group, const Argument& shared) {
  BoxCopy copy = {};
  std::memcpy(&copy.map, reinterpret_cast<const void*>(c.frame.get(group[0])), sizeof copy.map);
  if (copy.map.mark == BoxMap::kMark && copy.map.rank != group.size() - 1) {
    fail("a copy with " + std::to_string(group.size() - 1) + " coordinates by a map of " +
             std::to_string(copy.map.rank) + " dimensions",
         {c.site});
  }
  for (size_t i = 1; i < group.size(); ++i) copy.place[i - 1] = static_cast<int32_t>(word(c, group[i]));
  copy.shared = word(c, shared);
  return copy;
}

void load_box(Context& c, const Statement& s) {
  c.block.phases.load(c.block, box_of(c, s.groups[1], s.argument(0)), word(c, s.argument(2)), c.site);
}
void store_box(Context& c, const Statement& s) {
  store_box(c.block, c.thread, box_of(c, s.groups[0], s.argument(1)), c.site);
}

const std::unordered_map<std::string, Statement::Handler>& handlers() {
  static const std::unordered_map<std::string, Statement::Handler> table = {
      {"mbarrier.init.shared::cta.b64", begin_barrier},
      {"fence.mbarrier_init.release.cluster",
       [](Context& c, const Statement&) { c.block.phases.show_to_engine(c.thread); }},
      {"mbarrier.arrive.shared::cta.b64", arrive<false>},
      {"mbarrier.arrive.expect_tx.shared::cta.b64", arrive<true>},
      {"mbarrier.try_wait.parity.shared::cta.b64", try_wait},
      {"fence.proxy.async.shared::cta", publish_stores},
      {"cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes", load_box},
      {"cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes", load_box},
      {"cp.async.bulk.tensor.5d.global.shared::cta.bulk_group", store_box},
      {"cp.async.bulk.commit_group", [](Context& c, const Statement&) { ++c.thread.clock.closed[kStores]; }},
      {"cp.async.bulk.wait_group.read",
       [](Context& c, const Statement& s) { wait_stores_read(c.thread, word(c, s.argument(0))); }},
      {"prefetch.tensormap", [](Context&, const Statement&) {}},
  };
  return table;
}

}  // namespace

Statement::Handler bulk_handler(const std::string& opcode) {
  const auto found = handlers().find(opcode);
  return found == handlers().end() ? nullptr : found->second;
}

}  // namespace emulation

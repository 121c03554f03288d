#include "memory.h"

#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <new>
#include <vector>

namespace emulation {
namespace {

// What is known of one byte, within a launch. Block 0 means nobody.
struct Touch {
  uint32_t time, site, block;
  uint16_t agent;
  bool operator==(const Touch&) const = default;
};
struct Cell {
  Touch write, atomic, read;  // `atomic` is the last one since the write
  uint32_t readers;           // 1 + place in `readings` where several read it unordered, else 0
  bool read_by_others;
};

// One of several who read a byte; bytes with the same past share them.
struct Reading {
  Touch touch;
  uint32_t before;       // 1 + place of the reading before, or 0
  uint32_t count, kept;  // with all before, and when they were last looked through
};
constexpr uint16_t kBarrierItself = UINT16_MAX;  // as an agent: nobody else may touch the byte

struct Region {
  uintptr_t begin, end;
  Cell* cells;
  size_t mapped;
  bool shared;
};

struct Range {
  uintptr_t begin, end;
};

std::vector<Range> buffers;     // as noted
std::vector<Region> regions;    // of the launch: buffers, those that overlap as one, and shared memory
std::vector<Reading> readings;  // of the block
struct {
  uint32_t from, to;
  Touch read, added;
} last_step;  // from some readings to those with one more
Range arguments_range, image_range;
uintptr_t image_base;

Cell* map_cells(size_t count, size_t& mapped) {
  mapped = count * sizeof(Cell);
  void* memory = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return static_cast<Cell*>(memory);
}

// The library's own code and constants, which kernels may read.
void find_image() {
  Dl_info info;
  dladdr(reinterpret_cast<const void*>(&find_image), &info);
  image_base = reinterpret_cast<uintptr_t>(info.dli_fbase);
  dl_iterate_phdr(
      [](dl_phdr_info* found, size_t, void*) {
        if (found->dlpi_addr != image_base) return 0;
        image_range = {UINTPTR_MAX, 0};
        for (int i = 0; i < found->dlpi_phnum; ++i) {
          const auto& header = found->dlpi_phdr[i];
          if (header.p_type != PT_LOAD) continue;
          image_range.begin = std::min(image_range.begin, image_base + header.p_vaddr);
          image_range.end = std::max(image_range.end, image_base + header.p_vaddr + header.p_memsz);
        }
        return 1;
      },
      nullptr);
}

bool inside(const Range& range, uintptr_t address, size_t bytes) {
  return address >= range.begin && address + bytes <= range.end;
}

std::string place_of(const Region& region, uintptr_t address) {
  return (region.shared ? "shared memory + "
                        : "a buffer of " + std::to_string(region.end - region.begin) + " bytes + ") +
         std::to_string(address - region.begin);
}

[[noreturn]] void report_stray(uintptr_t address, size_t bytes, Access kind, uintptr_t site) {
  const Region* nearest = nullptr;
  uintptr_t distance = UINTPTR_MAX;
  for (const Region& region : regions) {
    const uintptr_t away = address < region.begin ? region.begin - address : address - region.end;
    if (address + bytes > region.end || address < region.begin) {
      if (away < distance) distance = away, nearest = &region;
    }
  }
  std::string text = std::string("out of bounds: ") + (kind == Access::kRead ? "read" : "write") + " of " +
                     std::to_string(bytes) + " bytes";
  if (nearest != nullptr) {
    const auto offset = static_cast<int64_t>(address - nearest->begin);
    text += std::string(" at byte ") + std::to_string(offset) + " of " +
            (nearest->shared ? "shared memory, which has " : "a buffer of ") +
            std::to_string(nearest->end - nearest->begin) + " bytes";
  }
  fail(text, {site});
}

Region& region_of(uintptr_t address, size_t bytes, Access kind, uintptr_t site) {
  static size_t last = 0;
  if (last < regions.size() && address >= regions[last].begin && address + bytes <= regions[last].end) {
    return regions[last];
  }
  for (size_t i = 0; i < regions.size(); ++i) {
    if (address >= regions[i].begin && address + bytes <= regions[i].end) {
      last = i;
      return regions[i];
    }
  }
  report_stray(address, bytes, kind, site);
}

constexpr const char *kRead = "a read", *kWrite = "a write", *kAtomic = "an atomic";

struct Actor {
  const Witness& witness;
  uint32_t agent, time;
  uintptr_t site;
  bool engine;

  bool knows(const Touch& touch) const { return has(witness.clock.seen, touch); }
  // An ordinary store that the asynchronous proxy may not see yet.
  bool lacks(const Touch& touch, bool shared) const {
    // no kernel has a fence for global memory
    return engine && current_block->is_ordinary(touch.agent) && !(shared && has(witness.clock.published, touch));
  }

 private:
  bool has(const Knowledge& knowledge, const Touch& touch) const {
    const uint32_t agents = current_block->are_products(touch.agent) ? 4 : 1;
    for (uint32_t i = 0; i < agents; ++i) {
      if (!knowledge.has(witness.agents, touch.agent + i, touch.time)) return false;
    }
    return true;
  }
};

[[noreturn]] void report(const std::string& what, const Actor& actor, const Region& region, uintptr_t address,
                         const Touch& before) {
  fail(what + ", at " + place_of(region, address), {actor.site, image_base + before.site});
}

std::string by(const char* what, uint32_t agent) { return what + (" by " + current_block->name_of(agent)); }

// What came before this access, another block's or not, must be known to it.
void check_against(const Touch& before, const char* what, const Actor& actor, const Region& region, uintptr_t address,
                   Access kind) {
  if (before.block == 0) return;
  if (before.agent == kBarrierItself) report("an access where a barrier was begun", actor, region, address, before);
  const bool reads = kind == Access::kRead;
  if (before.block != current_block->number) {
    report(std::string("two blocks: this one ") + (reads ? "reads" : "writes") + " a byte that was " +
               (what == kRead ? "read" : "written") + " by block number " + std::to_string(before.block - 1),
           actor, region, address, before);
  }
  const char* const now = reads ? "a read" : "a write";
  if (!actor.knows(before)) {
    report("race: " + by(now, actor.agent) + " and " + by(what, before.agent) + " are not ordered", actor, region,
           address, before);
  }
  if (what != kRead && actor.lacks(before, region.shared)) {
    report("missing proxy fence (publish_stores) between " + by(what, before.agent) + " and " + by(now, actor.agent),
           actor, region, address, before);
  }
}

void check_against_reads(const Cell& cell, const Actor& actor, const Region& region, uintptr_t address) {
  if (cell.read_by_others)
    report("two blocks: this one writes a byte that others read", actor, region, address, cell.read);
  if (cell.readers == 0 || cell.read.block != current_block->number) {
    check_against(cell.read, kRead, actor, region, address, Access::kWrite);
    return;
  }
  for (uint32_t at = cell.readers; at != 0; at = readings[at - 1].before) {
    check_against(readings[at - 1].touch, kRead, actor, region, address, Access::kWrite);
  }
}

Touch touch_of(const Actor& actor) {
  return {actor.time, static_cast<uint32_t>(actor.site - image_base), current_block->number,
          static_cast<uint16_t>(actor.agent)};
}

uint32_t add_reading(const Touch& touch, uint32_t before) {
  const uint32_t count = before == 0 ? 1 : readings[before - 1].count + 1;
  const uint32_t kept = before == 0 ? 1 : readings[before - 1].kept;
  readings.push_back({touch, before, count, kept});
  return static_cast<uint32_t>(readings.size());
}

// Those among the readings that the actor does not know; who knows the actor need not be told of the others.
uint32_t without_known(uint32_t from, const Actor& actor) {
  uint32_t made = 0;
  for (uint32_t at = from; at != 0; at = readings[at - 1].before) {
    const Touch touch = readings[at - 1].touch;
    if (touch.agent != actor.agent && !actor.knows(touch)) made = add_reading(touch, made);
  }
  if (made != 0) readings[made - 1].kept = readings[made - 1].count;
  return made;
}

uint32_t with_reading(const Cell& cell, const Actor& actor) {
  uint32_t before = cell.readers == 0 ? add_reading(cell.read, 0) : cell.readers;
  const Reading& newest = readings[before - 1];
  if (actor.knows(newest.touch) || newest.count >= 2 * newest.kept + 8) before = without_known(before, actor);
  return before == 0 ? 0 : add_reading(touch_of(actor), before);
}

void note_read(Cell& cell, const Actor& actor) {
  const bool same_block = cell.read.block == current_block->number;
  if (!same_block || (cell.readers == 0 && (cell.read.agent == actor.agent || actor.knows(cell.read)))) {
    cell.read_by_others = cell.read_by_others || (cell.read.block != 0 && !same_block);
    cell.read = touch_of(actor);
    cell.readers = 0;
    return;
  }
  // neighbours mostly have the same past
  const Touch added = touch_of(actor);
  if (cell.readers != last_step.from || added != last_step.added ||
      (cell.readers == 0 && cell.read != last_step.read)) {
    last_step = {cell.readers, 0, cell.read, added};
    last_step.to = with_reading(cell, actor);
  }
  cell.readers = last_step.to;
  if (cell.readers == 0) cell.read = added;
}

void note_write(Cell& cell, const Actor& actor, Access kind) {
  if (kind == Access::kAtomic) {
    cell.atomic = touch_of(actor);
    return;
  }
  cell.write = touch_of(actor);
  // whatever else touched the byte came before
  cell.atomic = {};
  cell.read = {};
  cell.readers = 0;
}

void access_by(const Actor& actor, uintptr_t address, size_t bytes, Access kind) {
  Region& region = region_of(address, bytes, kind, actor.site);
  Touch checked = {};  // neighbours mostly were written together
  for (size_t i = 0; i < bytes; ++i) {
    Cell& cell = region.cells[address + i - region.begin];
    // what blocks before have left in shared memory is forgotten
    if (region.shared && cell.write.block != current_block->number) cell = {};
    if (kind != Access::kWrite && region.shared && cell.write.block == 0) {
      fail("read of a byte that nobody wrote, at " + place_of(region, address + i), {actor.site});
    }
    if (!(cell.write == checked)) check_against(cell.write, kWrite, actor, region, address + i, kind);
    checked = cell.write;
    if (kind != Access::kAtomic) check_against(cell.atomic, kAtomic, actor, region, address + i, kind);
    if (kind == Access::kRead) {
      note_read(cell, actor);
    } else {
      check_against_reads(cell, actor, region, address + i);
      note_write(cell, actor, kind);
    }
  }
}

}  // namespace

void access(Thread& thread, uintptr_t address, size_t bytes, Access kind, uintptr_t site) {
  if (on_a_stack(address)) {
    if (thread.uses_registers()) access_registers(thread, address, bytes, kind != Access::kRead, site);
    return;
  }
  if (kind == Access::kRead && (inside(image_range, address, bytes) || inside(arguments_range, address, bytes))) return;
  const Witness witness = {thread.agents, thread.clock};
  access_by({witness, static_cast<uint32_t>(thread.index), thread.clock.seen.own, site, false}, address, bytes, kind);
}

void access_by_copy(Thread& thread, uintptr_t address, size_t bytes, Access kind, uint32_t group, uintptr_t site) {
  const uint32_t agent = current_block->agent_beside(thread, kCopies);
  const Witness witness = {thread.agents, thread.clock};
  access_by({witness, agent, group, site, false}, address, bytes, kind);
}

void access_by_engine(const Witness& witness, uint32_t agent, uint32_t time, uintptr_t address, size_t bytes,
                      Access kind, uintptr_t site) {
  access_by({witness, agent, time, site, true}, address, bytes, kind);
}

void hold_for_barrier(uintptr_t address, size_t bytes) {
  Region& region = region_of(address, bytes, Access::kWrite, 0);
  for (size_t i = 0; i < bytes; ++i) region.cells[address + i - region.begin].write.agent = kBarrierItself;
}

uintptr_t from_shared_window(uint32_t address) {
  return reinterpret_cast<uintptr_t>(current_block->shared) + address - kSharedWindow;
}

uint32_t to_shared_window(uintptr_t address, uintptr_t site) {
  const auto base = reinterpret_cast<uintptr_t>(current_block->shared);
  // the end itself is the address of an empty array
  if (address < base || address > base + current_block->shared_size) {
    fail("an address that is not in shared memory was taken for one", {site});
  }
  return static_cast<uint32_t>(address - base) + kSharedWindow;
}

void note_buffer(const void* data, size_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(data);
  if (bytes != 0) buffers.push_back({begin, begin + bytes});
}

void forget_buffers() { buffers.clear(); }

// A demangled function without its return type, namespaces, parameters and template arguments.
std::string plain_name(std::string function) {
  const std::string nameless = "(anonymous namespace)::";
  for (size_t at; (at = function.find(nameless)) != std::string::npos;) function.erase(at, nameless.size());
  function.resize(std::min(function.size(), std::strcspn(function.c_str(), "<(\n")));
  const size_t last = function.find_last_of(": ");
  return last == std::string::npos ? function : function.substr(last + 1);
}

std::string describe_site(uintptr_t site) {
  static std::map<uintptr_t, std::string> known;
  if (image_base == 0) find_image();
  std::string& text = known[site];
  if (!text.empty()) return text;
  Dl_info info;
  dladdr(reinterpret_cast<const void*>(&find_image), &info);
  char command[4096];
  // one before the return address: the call itself
  std::snprintf(command, sizeof command, "addr2line -C -s -f -i -e '%s' %zx 2>/dev/null", info.dli_fname,
                static_cast<size_t>(site - image_base - 1));
  if (FILE* lines = popen(command, "r")) {
    char function[2048], place[1024];
    while (std::fgets(function, sizeof function, lines) && std::fgets(place, sizeof place, lines)) {
      text +=
          (text.empty() ? "" : " in ") + std::string(place, std::strcspn(place, "\n (")) + " " + plain_name(function);
    }
    pclose(lines);
  }
  if (text.empty()) text = "an unknown place";
  return text;
}

MemoryOfLaunch::MemoryOfLaunch(const void* arguments, size_t argument_bytes, unsigned char* shared,
                               size_t shared_bytes) {
  if (image_range.end == 0) find_image();
  const auto begin = reinterpret_cast<uintptr_t>(arguments);
  arguments_range = {begin, begin + argument_bytes};
  std::vector<Range> sorted = buffers;
  std::sort(sorted.begin(), sorted.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  regions.clear();
  for (const Range& range : sorted) {
    if (!regions.empty() && range.begin < regions.back().end) {
      regions.back().end = std::max(regions.back().end, range.end);
    } else {
      regions.push_back({range.begin, range.end, nullptr, 0, false});
    }
  }
  for (Region& region : regions) region.cells = map_cells(region.end - region.begin, region.mapped);
  if (shared_bytes != 0) {
    const auto base = reinterpret_cast<uintptr_t>(shared);
    Region region = {base, base + shared_bytes, nullptr, 0, true};
    region.cells = map_cells(shared_bytes, region.mapped);
    regions.push_back(region);
  }
}

MemoryOfLaunch::~MemoryOfLaunch() {
  for (Region& region : regions) munmap(region.cells, region.mapped);
  regions.clear();
}

void MemoryOfLaunch::begin_block() {
  readings.clear();
  last_step = {};
}

}  // namespace emulation

// Loads, stores, atomics, and asynchronous copies.
#include <algorithm>
#include <cstring>

#include "memory.h"
#include "program.h"

namespace emulation {
namespace {

constexpr bool kShared = true, kGlobal = false;

template <bool Shared>
uintptr_t address_of(Context& c, const Argument& argument) {
  const uint64_t value = c.frame.get(argument) + static_cast<uint64_t>(argument.offset);
  return Shared ? from_shared_window(static_cast<uint32_t>(value)) : value;
}

void require_multiple(Context& c, uintptr_t address, size_t bytes) {
  if (address % bytes != 0) {
    fail("misaligned: an access of " + std::to_string(bytes) + " bytes whose address has the remainder " +
             std::to_string(address % bytes),
         {c.site});
  }
}

template <bool Shared, size_t Bytes, size_t Count>
void load(Context& c, const Statement& s) {
  const uintptr_t from = address_of<Shared>(c, s.argument(1));
  require_multiple(c, from, Bytes * Count);
  access(c.thread, from, Bytes * Count, Access::kRead, c.site);
  for (size_t i = 0; i < Count; ++i) {
    uint64_t value = 0;
    std::memcpy(&value, reinterpret_cast<const char*>(from) + i * Bytes, Bytes);
    c.frame.set(s.groups[0][i], value);
  }
}

template <bool Shared, size_t Bytes, size_t Count>
void store(Context& c, const Statement& s) {
  const uintptr_t to = address_of<Shared>(c, s.argument(0));
  require_multiple(c, to, Bytes * Count);
  access(c.thread, to, Bytes * Count, Access::kWrite, c.site);
  for (size_t i = 0; i < Count; ++i) {
    const uint64_t value = c.frame.get(s.groups[1][i]);
    std::memcpy(reinterpret_cast<char*>(to) + i * Bytes, &value, Bytes);
  }
}

template <class T>
T combined(char kind, T before, T value) {
  switch (kind) {
    case '+':
      return static_cast<T>(before + value);
    case '<':
      return std::min(before, value);
    case '>':
      return std::max(before, value);
    case '|':
      return before | value;
    default:  // exchange
      return value;
  }
}

template <bool Shared, class T, char Kind>
void atomic(Context& c, const Statement& s) {
  const uintptr_t to = address_of<Shared>(c, s.argument(1));
  require_multiple(c, to, sizeof(T));
  access(c.thread, to, sizeof(T), Access::kAtomic, c.site);
  T before;
  std::memcpy(&before, reinterpret_cast<const void*>(to), sizeof(T));
  const T after = combined<T>(Kind, before, static_cast<T>(c.frame.get(s.argument(2))));
  std::memcpy(reinterpret_cast<void*>(to), &after, sizeof(T));
  c.frame.set(s.argument(0), static_cast<uint64_t>(before));
}

void land(const Copy& copy) {
  std::memcpy(copy.to, copy.from, copy.read);
  std::memset(static_cast<char*>(copy.to) + copy.read, 0, copy.bytes - copy.read);
}

// cp.async of `size` bytes, of which the last operand tells how many are read; the rest are zeros.
void copy_async(Context& c, const Statement& s) {
  const auto size = static_cast<uint32_t>(c.frame.get(s.argument(2)));
  const uint32_t read = s.groups.size() > 3 ? static_cast<uint32_t>(c.frame.get(s.argument(3))) : size;
  if (read > size) fail("an asynchronous copy reads more than it writes", {c.site});
  const uintptr_t to = address_of<kShared>(c, s.argument(0)), from = address_of<kGlobal>(c, s.argument(1));
  require_multiple(c, to, size);
  require_multiple(c, from, size);  // of a copy that reads nothing too
  const uint32_t group = c.thread.clock.closed[kCopies] + 1;
  if (read != 0) access_by_copy(c.thread, from, read, Access::kRead, group, c.site);
  access_by_copy(c.thread, to, size, Access::kWrite, group, c.site);
  const Copy copy = {reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), size, read, group};
  if (options().latest) {
    std::memset(copy.to, 0xff, size);  // NaN, until it lands
    c.thread.copies.push_back(copy);
  } else {
    land(copy);
  }
}

void commit_copies(Context& c, const Statement&) { ++c.thread.clock.closed[kCopies]; }

void wait_copies(Context& c, const Statement& s) {
  const auto unfinished = static_cast<uint32_t>(c.frame.get(s.argument(0)));
  const uint32_t waited = c.thread.clock.wait(kCopies, unfinished);
  std::erase_if(c.thread.copies, [&](const Copy& copy) {
    if (copy.group <= waited) land(copy);
    return copy.group <= waited;
  });
}

template <bool Shared, size_t Bytes>
void add_accesses(Table& table, const std::string& space, const std::string& type) {
  table["ld." + space + "." + type] = load<Shared, Bytes, 1>;
  table["st." + space + "." + type] = store<Shared, Bytes, 1>;
  table["ld." + space + ".v2." + type] = load<Shared, Bytes, 2>;
  table["st." + space + ".v2." + type] = store<Shared, Bytes, 2>;
  if constexpr (Bytes <= 4) {
    table["ld." + space + ".v4." + type] = load<Shared, Bytes, 4>;
    table["st." + space + ".v4." + type] = store<Shared, Bytes, 4>;
  }
}

template <bool Shared>
void add_space(Table& table, const std::string& space) {
  add_accesses<Shared, 4>(table, space, "b32");
  add_accesses<Shared, 8>(table, space, "b64");
  add_accesses<Shared, 2>(table, space, "b16");
  if (space == "global.nc") return;
  table["atom." + space + ".add.u32"] = atomic<Shared, uint32_t, '+'>;
  table["atom." + space + ".add.u64"] = atomic<Shared, uint64_t, '+'>;
  table["atom." + space + ".min.u32"] = atomic<Shared, uint32_t, '<'>;
  table["atom." + space + ".max.u32"] = atomic<Shared, uint32_t, '>'>;
  table["atom." + space + ".min.u64"] = atomic<Shared, uint64_t, '<'>;
  table["atom." + space + ".max.u64"] = atomic<Shared, uint64_t, '>'>;
  table["atom." + space + ".or.b32"] = atomic<Shared, uint32_t, '|'>;
  table["atom." + space + ".exch.b32"] = atomic<Shared, uint32_t, '='>;
}

}  // namespace

void add_memory_instructions(Table& table) {
  add_space<kGlobal>(table, "global");
  add_space<kGlobal>(table, "global.nc");
  add_space<kShared>(table, "shared");
  table["cp.async.cg.shared.global"] = copy_async;
  table["cp.async.ca.shared.global"] = copy_async;
  table["cp.async.commit_group"] = commit_copies;
  table["cp.async.wait_group"] = wait_copies;
}

}  // namespace emulation

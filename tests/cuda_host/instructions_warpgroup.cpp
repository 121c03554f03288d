// Products of warpgroups (wgmma), and the registers of warps.
#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#include "fragments.h"
#include "memory.h"
#include "numbers.h"
#include "program.h"
#include "tiles.h"

namespace emulation {

enum class Values : uint8_t { kBfloat16, kFloat16, kBits };

// sums [64, columns] += left [64, depth] right [depth, columns]
struct Product {
  struct Factor {
    MatrixDescriptor tile;
    bool along_columns;
  };
  Values values;
  int columns;
  bool held, add;  // the left factor is in registers; else the sums begin at 0
  Factor left, right;
  std::array<uint32_t*, kWarpgroup> sums;
  std::array<std::array<uint32_t, 4>, kWarpgroup> factor;
  uint32_t group;
  // under `latest`, sums that no product has been asked for before are poisoned, and kept here
  std::array<std::vector<uint32_t>, kWarpgroup> kept;

  int value_bits() const { return values == Values::kBits ? 1 : 16; }
  int depth() const { return 256 / value_bits(); }
  size_t registers() const { return static_cast<size_t>(columns / 2); }
};

namespace {

constexpr int kRows = 64, kMostColumns = 256, kWarp = 32;

// The pieces of 16 bytes of rows [first, last) of a factor: their address, and the values that they begin with.
template <class Act>
void for_each_piece(const Product::Factor& factor, const Product& product, int first, int last, Act act) {
  if (factor.along_columns) {
    for (int along = 0; along < product.depth(); ++along) {
      for (int outer = first; outer < last; outer += 8) {
        act(from_shared_window(address_along_columns(factor.tile, outer, along)), outer, along);
      }
    }
    return;
  }
  const int bits = product.value_bits(), step = 128 / bits;
  for (int outer = first; outer < last; ++outer) {
    for (int along = 0; along < product.depth(); along += step) {
      act(from_shared_window(address_along_rows(factor.tile, outer, along, bits)), outer, along);
    }
  }
}

float widened(Values values, uint16_t bits) {
  return values == Values::kBfloat16 ? from_bfloat16(bits) : from_float16(bits);
}

// Calls `set(outer, along, value)` for every value of rows [first, last).
template <class Set>
void for_each_value(const Product::Factor& factor, const Product& product, int first, int last, Set set) {
  for_each_piece(factor, product, first, last, [&](uintptr_t address, int outer, int along) {
    uint16_t piece[8];
    std::memcpy(piece, reinterpret_cast<const void*>(address), sizeof piece);
    for (int i = 0; i < 8; ++i) {
      set(factor.along_columns ? outer + i : outer, factor.along_columns ? along : along + i,
          widened(product.values, piece[i]));
    }
  });
}

// ---- the sums of warps [first, last) ----

using Sums = uint32_t[kRows][kMostColumns];

// Calls `act(row, column, the register)` for every sum.
template <class Act>
void for_each_sum(const Product& product, int first, int last, Act act) {
  for (int thread = first * kWarp; thread < last * kWarp; ++thread) {
    uint32_t* const sums = product.sums[static_cast<size_t>(thread)];
    for (int n = 0; n < product.columns / 8; ++n) {
      for (int i = 0; i < 4; ++i) {
        const Element e = accumulator(Lane(thread % kWarp), i);
        act(16 * (thread / kWarp) + e.row, 8 * n + e.column, sums[4 * n + i]);
      }
    }
  }
}

void multiply_halves(const Product& product, int first, int last, Sums& bits) {
  static float left[kRows][16], right[16][kMostColumns], sums[kRows][kMostColumns];
  const int begin = 16 * first, end = 16 * last, columns = product.columns;
  for_each_value(product.right, product, 0, columns, [](int n, int k, float value) { right[k][n] = value; });
  if (product.held) {
    for (int thread = first * kWarp; thread < last * kWarp; ++thread) {
      for (int i = 0; i < 8; ++i) {
        const Element e = emulation::left(Lane(thread % kWarp), i / 2, i % 2, 2);
        const uint32_t word = product.factor[static_cast<size_t>(thread)][static_cast<size_t>(i / 2)];
        left[16 * (thread / kWarp) + e.row][e.column] =
            widened(product.values, static_cast<uint16_t>(word >> 16 * (i % 2)));
      }
    }
  } else {
    for_each_value(product.left, product, begin, end, [](int m, int k, float value) { left[m][k] = value; });
  }
  std::memcpy(sums[begin], bits[begin], sizeof sums[0] * static_cast<size_t>(end - begin));
  for (int row = begin; row < end; ++row) {
    for (int k = 0; k < 16; ++k) {
      const float by = left[row][k];
      for (int n = 0; n < columns; ++n) sums[row][n] += by * right[k][n];
    }
  }
  std::memcpy(bits[begin], sums[begin], sizeof sums[0] * static_cast<size_t>(end - begin));
}

void count_bits(const Product& product, int first, int last, Sums& sums) {
  static uint64_t left[kRows][4], right[kMostColumns][4];
  const auto fill = [](uint64_t (*rows)[4]) {
    return [rows](uintptr_t address, int outer, int along) {
      std::memcpy(&rows[outer][along / 64], reinterpret_cast<const void*>(address), 16);
    };
  };
  for_each_piece(product.right, product, 0, product.columns, fill(right));
  for_each_piece(product.left, product, 16 * first, 16 * last, fill(left));
  for (int row = 16 * first; row < 16 * last; ++row) {
    for (int column = 0; column < product.columns; ++column) {
      for (int i = 0; i < 4; ++i) {
        sums[row][column] += static_cast<uint32_t>(std::popcount(left[row][i] & right[column][i]));
      }
    }
  }
}

// Warps [first, last) get their rows.
void make(const Product& product, int first, int last) {
  static Sums sums;
  for (int thread = first * kWarp; thread < last * kWarp; ++thread) {
    const std::vector<uint32_t>& kept = product.kept[static_cast<size_t>(thread)];
    if (!kept.empty()) std::memcpy(product.sums[static_cast<size_t>(thread)], kept.data(), 4 * kept.size());
  }
  for_each_sum(product, first, last,
               [&](int row, int column, const uint32_t& sum) { sums[row][column] = product.add ? sum : 0; });
  if (product.values == Values::kBits) {
    count_bits(product, first, last, sums);
  } else {
    multiply_halves(product, first, last, sums);
  }
  for_each_sum(product, first, last, [](int row, int column, uint32_t& sum) { sum = sums[row][column]; });
}

// ---- what the threads of a warpgroup must agree on, and know ----

// The least that any of them knows.
TimesMet common(const Thread* threads, Knowledge Clock::* which) {
  TimesMet last = (threads[0].clock.*which).met, least = last;
  for (int i = 1; i < kWarpgroup; ++i) {
    const TimesMet& times = (threads[i].clock.*which).met;
    if (times == last) continue;
    last = times;
    auto less = std::make_shared<Times>(*least);
    for (uint32_t agent = 0; agent < less->size(); ++agent) {
      (*less)[agent] = std::min((*less)[agent], time_of(*times, agent));
    }
    least = less;
  }
  return least;
}

void check_reads(Block& block, const Product& product, const Thread* threads, uintptr_t site) {
  const Agents nobody;
  Clock all;
  all.seen.met = common(threads, &Clock::seen);
  all.published.met = common(threads, &Clock::published);
  const uint32_t agent = block.agent_of_products(threads[0].index / kWarpgroup);
  const auto read = [&](uintptr_t address, int, int) {
    access_by_engine({nobody, all}, agent, product.group, address, 16, Access::kRead, site);
  };
  if (!product.held) for_each_piece(product.left, product, 0, kRows, read);
  for_each_piece(product.right, product, 0, product.columns, read);
}

// Places of registers that lie one after the other.
uint32_t* registers_of(const Frame& frame, const std::vector<Argument>& group, const Thread& thread, uintptr_t site) {
  auto* const first = static_cast<uint32_t*>(frame.operands[group[0].index].target);
  for (size_t i = 0; i < group.size(); ++i) {
    if (group[i].kind != Argument::kOperand || frame.operands[group[i].index].target != first + i) {
      fail("registers of a product that are not one array, in its order, are not emulated", {site});
    }
  }
  if (were_written(thread, first, group.size())) {
    fail("a register of a product is written between begin_products and the product", {site});
  }
  return first;
}

void hold(Thread& thread, const uint32_t* registers, size_t count, uint32_t group, bool sums) {
  const auto begin = reinterpret_cast<uintptr_t>(registers), end = begin + 4 * count;
  for (InFlight& held : thread.in_flight) {
    if (held.begin == begin && held.end == end && held.sums == sums) {
      held.group = group;
      return;
    }
    // factors mostly lie side by side
    if (held.end == begin && held.group == group && !held.sums && !sums) {
      held.end = end;
      return;
    }
  }
  thread.in_flight.push_back({begin, end, group, sums});
}

bool in_flight(const Thread& thread, const uint32_t* sums) {
  return std::any_of(thread.in_flight.begin(), thread.in_flight.end(), [&](const InFlight& held) {
    return held.sums && held.begin == reinterpret_cast<uintptr_t>(sums);
  });
}

Product::Factor factor_of(uint64_t bits, bool along_columns, uintptr_t site) {
  const MatrixDescriptor tile = decode_descriptor(bits);
  if (!tile.known) fail("a descriptor of a matrix that is not swizzled by 128 bytes is not emulated", {site});
  return {tile, along_columns};
}

// The rest of a statement behind the sums: `left, right, add, …`, of which the values must be the same for all.
void check_agreement(const Statement& s, Frame* const* frames, const Thread* threads, bool held, uintptr_t site) {
  for (int i = 0; i < kWarpgroup; ++i) {
    for (size_t group = held ? 2 : 1; group < s.groups.size(); ++group) {
      if (frames[i]->get(s.argument(group)) != frames[0]->get(s.argument(group))) {
        fail("the threads of a warpgroup do not agree on a product's operands: " + s.opcode, {site});
      }
    }
    if (threads[i].clock.closed[kProducts] != threads[0].clock.closed[kProducts]) {
      fail("the threads of a warpgroup have not committed products equally often", {site});
    }
    if (threads[i].products_begun == 0) fail("a product without begin_products since the last commit", {site});
  }
}

void multiply(Block& block, const Statement& s, Frame* const* frames, Thread* threads, uintptr_t site) {
  const auto product = std::make_shared<Product>();
  Product& p = *product;
  const auto has = [&](const std::string& part) { return s.opcode.find(part) != std::string::npos; };
  p.values = has(".b1.") ? Values::kBits : has(".bf16.") ? Values::kBfloat16 : Values::kFloat16;
  p.columns = 2 * static_cast<int>(s.groups[0].size());
  if (!has("n" + std::to_string(p.columns) + "k")) fail("a product with more or fewer sums than its shape", {site});
  const bool bits = p.values == Values::kBits;
  p.held = s.groups[1].size() == 4;
  check_agreement(s, frames, threads, p.held, site);
  p.group = threads[0].clock.closed[kProducts] + 1;
  const auto value = [&](size_t group) { return frames[0]->get(s.argument(group)); };
  p.add = value(3) != 0;
  if (!bits && (value(4) != 1 || value(5) != 1)) fail("a negated product is not emulated", {site});
  if (!p.held) p.left = factor_of(value(1), !bits && value(6) != 0, site);
  p.right = factor_of(value(2), !bits && value(p.held ? 6 : 7) != 0, site);
  check_reads(block, p, threads, site);
  for (size_t i = 0; i < kWarpgroup; ++i) {
    p.sums[i] = registers_of(*frames[i], s.groups[0], threads[i], site);
    if (p.held) {
      const uint32_t* const factor = registers_of(*frames[i], s.groups[1], threads[i], site);
      std::memcpy(p.factor[i].data(), factor, 16);
      hold(threads[i], factor, 4, p.group, false);
    }
    if (options().latest && !in_flight(threads[i], p.sums[i])) {
      if (p.add) p.kept[i].assign(p.sums[i], p.sums[i] + p.registers());
      std::memset(p.sums[i], 0xff, 4 * p.registers());
    }
    hold(threads[i], p.sums[i], p.registers(), p.group, true);
  }
  if (!options().latest) {
    make(p, 0, 4);
    return;
  }
  for (int warp = 0; warp < 4; ++warp) {
    block.products[static_cast<size_t>(threads[0].warp + warp)].push_back(product);
  }
}

void begin_products(Context& c, const Statement&) {
  static uint32_t begun = 0;
  c.thread.products_begun = ++begun;
}

void commit_products(Context& c, const Statement&) {
  c.thread.products_begun = 0;
  ++c.thread.clock.closed[kProducts];
}

void wait_products(Context& c, const Statement& s) {
  const auto unfinished = static_cast<uint32_t>(c.frame.get(s.argument(0)));
  const uint32_t waited = c.thread.clock.wait(kProducts, unfinished);
  std::erase_if(c.thread.in_flight, [&](const InFlight& held) { return held.group <= waited; });
  const int warp = c.thread.warp % 4;
  std::erase_if(c.block.products[static_cast<size_t>(c.thread.warp)], [&](const std::shared_ptr<Product>& product) {
    if (product->group <= waited) make(*product, warp, warp + 1);
    return product->group <= waited;
  });
}

void check_registers(Context& c, const Statement& s) {
  const uint64_t count = c.frame.get(s.argument(0));
  if (count < 24 || count > 256 || count % 8 != 0) {
    fail("setmaxnreg of " + std::to_string(count) + " registers, which is no multiple of 8 from 24 to 256", {c.site});
  }
}

}  // namespace

void add_warpgroup_instructions(Table& table) {
  for (const std::string columns : {"64", "96", "128", "256"}) {
    for (const char* values : {"k16.f32.bf16.bf16", "k16.f32.f16.f16", "k256.s32.b1.b1.and.popc"}) {
      table["wgmma.mma_async.sync.aligned.m64n" + columns + values] = [](Context& c, const Statement& s) {
        c.block.meet_warpgroup(s, c.frame, multiply, c.site);
      };
    }
  }
  table.insert({
      {"wgmma.fence.sync.aligned", begin_products},
      {"wgmma.commit_group.sync.aligned", commit_products},
      {"wgmma.wait_group.sync.aligned", wait_products},
      {"setmaxnreg.inc.sync.aligned.u32", check_registers},
      {"setmaxnreg.dec.sync.aligned.u32", check_registers},
  });
}

}  // namespace emulation

// The text of PTX, parsed: statements whose arguments are operands of the asm, registers of the text, or numbers.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <unordered_map>
#include <vector>

#include "block.h"

namespace emulation {

struct Argument {
  enum Kind : uint8_t { kOperand, kRegister, kNumber, kNothing } kind;  // kNothing: `_`
  bool negated;                                                         // !p
  bool address;                                                         // [x]
  int64_t offset;                                                       // of an address
  uint32_t index;                                                       // of operands and registers
  uint64_t number;
};

// The values of one execution.
struct Frame {
  static constexpr size_t kMost = 136;
  Operand operands[kMost];
  uint64_t registers[8];
  uint64_t get(const Argument& argument) const;
  void set(const Argument& argument, uint64_t bits);
};

// One place where a statement of a program stands.
struct Context {
  Block& block;
  Thread& thread;
  Frame& frame;
  uintptr_t site;
};

struct Statement {
  using Handler = void (*)(Context&, const Statement&);
  std::string opcode;
  Handler handler;
  // vectors in braces are one group, and `[map, {coordinates}]`
  std::vector<std::vector<Argument>> groups;
  uint32_t operands;  // that it names, at least
  bool guarded, guard_negated;
  uint32_t guard;

  const Argument& argument(size_t group) const { return groups[group][0]; }
};

using Program = std::vector<Statement>;

// Throws std::invalid_argument for what it cannot read or does not know.
Program parse(const std::string& text);

// What is known, by opcode.
using Table = std::unordered_map<std::string, Statement::Handler>;
void add_scalar_instructions(Table& table);
void add_memory_instructions(Table& table);
void add_warp_instructions(Table& table);
void add_matrix_instructions(Table& table);
void add_bulk_instructions(Table& table);
void add_warpgroup_instructions(Table& table);

}  // namespace emulation

#include "program.h"

#include <algorithm>
#include <cctype>
#include <map>
#include <memory>
#include <stdexcept>
#include <unordered_map>

#include "memory.h"

namespace emulation {
namespace {

const Table& instructions() {
  static const Table table = [] {
    Table made;
    for (const auto add : {add_scalar_instructions, add_memory_instructions, add_warp_instructions,
                           add_matrix_instructions, add_bulk_instructions, add_warpgroup_instructions}) {
      add(made);
    }
    return made;
  }();
  return table;
}

// Reads a text of statements: `op.suffix a, {b, c}, [d+4];`, `@p op …;`, `.reg .pred p, q;`, and blocks in braces.
class Parser {
 public:
  explicit Parser(const std::string& text) : text_(text) {}

  Program parse() {
    Program program;
    int depth = 0;
    for (skip(); place_ < text_.size(); skip()) {
      if (peek('{')) {
        ++depth;
      } else if (peek('}')) {
        --depth;
      } else if (text_.compare(place_, 4, ".reg") == 0) {
        declare();
      } else {
        program.push_back(statement());
      }
    }
    if (depth != 0) refuse("braces that do not close");
    return program;
  }

 private:
  [[noreturn]] void refuse(const std::string& why) const {
    throw std::invalid_argument("the emulation cannot read `" + text_ + "`: " + why);
  }
  void skip() {
    while (place_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[place_]))) ++place_;
  }
  bool peek(char wanted) {
    skip();
    if (place_ >= text_.size() || text_[place_] != wanted) return false;
    ++place_;
    return true;
  }
  void expect(char wanted) {
    if (!peek(wanted)) refuse(std::string("expected `") + wanted + "` at place " + std::to_string(place_));
  }
  std::string word() {
    skip();
    const size_t begin = place_;
    while (place_ < text_.size() && (std::isalnum(static_cast<unsigned char>(text_[place_])) || text_[place_] == '.' ||
                                     text_[place_] == '_' || text_[place_] == ':')) {
      ++place_;
    }
    if (begin == place_) refuse("expected a word at place " + std::to_string(place_));
    return text_.substr(begin, place_ - begin);
  }
  int64_t number() {
    skip();
    size_t used = 0;
    int64_t value = 0;
    try {
      value = std::stoll(text_.substr(place_), &used, 0);
    } catch (const std::logic_error&) {
      refuse("expected a number at place " + std::to_string(place_));
    }
    place_ += used;
    return value;
  }

  void declare() {
    word();  // .reg
    word();  // its type, which the statements know
    do {
      const auto index = static_cast<uint32_t>(registers_.size());
      if (index >= 8) refuse("more than 8 registers");
      registers_.emplace(word(), index);
    } while (peek(','));
    expect(';');
  }

  Argument argument() {
    Argument found = {Argument::kNumber, peek('!'), false, 0, 0, 0};
    skip();
    const char first = place_ < text_.size() ? text_[place_] : ' ';
    if (first == '%') {
      ++place_;
      found.kind = Argument::kOperand;
      found.index = static_cast<uint32_t>(number());
    } else if (std::isdigit(static_cast<unsigned char>(first)) || first == '-') {
      found.number = static_cast<uint64_t>(number());
    } else {
      const std::string name = word();
      if (name == "_") {
        found.kind = Argument::kNothing;
        return found;
      }
      const auto known = registers_.find(name);
      if (known == registers_.end()) refuse("`" + name + "` was not declared");
      found.kind = Argument::kRegister;
      found.index = known->second;
    }
    return found;
  }

  void vector(std::vector<Argument>& members) {
    do members.push_back(argument());
    while (peek(','));
    expect('}');
  }

  std::vector<Argument> group() {
    std::vector<Argument> members;
    if (peek('{')) {
      vector(members);
    } else if (peek('[')) {
      members.push_back(argument());
      members[0].address = true;
      if (peek('+')) members[0].offset = number();
      if (peek(',')) {
        expect('{');
        vector(members);
      }
      expect(']');
    } else {
      members.push_back(argument());
    }
    return members;
  }

  Statement statement() {
    Statement found = {};
    if (peek('@')) {
      const Argument guard = argument();
      if (guard.kind != Argument::kRegister) refuse("a guard that is no register");
      found.guarded = true;
      found.guard_negated = guard.negated;
      found.guard = guard.index;
    }
    found.opcode = word();
    const auto known = instructions().find(found.opcode);
    if (known == instructions().end()) refuse("the emulation does not know `" + found.opcode + "`");
    found.handler = known->second;
    if (!peek(';')) {
      do found.groups.push_back(group());
      while (peek(','));
      expect(';');
    }
    for (const auto& members : found.groups) {
      for (const Argument& argument : members) {
        if (argument.kind == Argument::kOperand) found.operands = std::max(found.operands, argument.index + 1);
      }
    }
    return found;
  }

  const std::string text_;
  size_t place_ = 0;
  std::map<std::string, uint32_t> registers_;
};

// By the address of the text, which is a literal.
const Program& program_of(const char* text, uintptr_t site) {
  static std::unordered_map<const char*, std::unique_ptr<Program>> known;
  static const char* last_text = nullptr;
  static const Program* last = nullptr;
  if (text == last_text) return *last;
  std::unique_ptr<Program>& program = known[text];
  if (program == nullptr) {
    std::string refused;
    try {
      program = std::make_unique<Program>(parse(text));
    } catch (const std::invalid_argument& error) {
      refused = error.what();
    }
    if (program == nullptr) {
      known.erase(text);
      fail(refused, {site});
    }
  }
  last_text = text;
  last = program.get();
  return *last;
}

}  // namespace

Program parse(const std::string& text) { return Parser(text).parse(); }

uint64_t Frame::get(const Argument& argument) const {
  switch (argument.kind) {
    case Argument::kOperand:
      return operands[argument.index].value;
    case Argument::kRegister:
      return registers[argument.index] ^ static_cast<uint64_t>(argument.negated);
    default:
      return argument.number;
  }
}

void Frame::set(const Argument& argument, uint64_t bits) {
  if (argument.kind == Argument::kRegister) {
    registers[argument.index] = bits;
    return;
  }
  Operand* const operand = argument.kind == Argument::kOperand ? &operands[argument.index] : nullptr;
  if (operand == nullptr || operand->target == nullptr)
    fail("PTX writes to an operand that is none of its outputs", {});
  const auto address = reinterpret_cast<uintptr_t>(operand->target);
  if (on_a_stack(address) && thread_of_stack(address).uses_registers()) {
    access_registers(thread_of_stack(address), address, 4, true, 0);
  }
  operand->value = bits;
  switch (operand->kind) {
    case Operand::kU16:
      *static_cast<uint16_t*>(operand->target) = static_cast<uint16_t>(bits);
      break;
    case Operand::kU32:
      *static_cast<uint32_t*>(operand->target) = static_cast<uint32_t>(bits);
      break;
    case Operand::kU64:
      *static_cast<uint64_t*>(operand->target) = bits;
  }
}

void execute(const char* text, std::initializer_list<Operand> outputs, std::initializer_list<Operand> inputs) {
  const auto site = reinterpret_cast<uintptr_t>(__builtin_return_address(0));
  if (current_thread == nullptr) throw std::logic_error(std::string("PTX outside a kernel: ") + text);
  const Program& program = program_of(text, site);
  Frame frame;
  if (outputs.size() + inputs.size() > Frame::kMost) fail("PTX with too many operands", {site});
  size_t count = 0;
  for (const auto* list : {&outputs, &inputs}) {
    for (const Operand& operand : *list) frame.operands[count++] = operand;
  }
  for (const Statement& statement : program) {
    if (statement.operands > count) {
      fail("PTX names operand %" + std::to_string(statement.operands - 1) + " of " + std::to_string(count), {site});
    }
    if (statement.guarded && (frame.registers[statement.guard] != 0) == statement.guard_negated) continue;
    Context context = {*current_block, *current_thread, frame, site};
    statement.handler(context, statement);
  }
}

}  // namespace emulation

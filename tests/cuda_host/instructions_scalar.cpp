// Instructions that are a function of their operands.
#include <bit>
#include <cmath>

#include "memory.h"
#include "numbers.h"
#include "program.h"

namespace emulation {
namespace {

uint32_t word(Context& c, const Statement& s, size_t group) {
  return static_cast<uint32_t>(c.frame.get(s.argument(group)));
}
float real(Context& c, const Statement& s, size_t group) { return std::bit_cast<float>(word(c, s, group)); }
void give(Context& c, const Statement& s, uint64_t bits) { c.frame.set(s.argument(0), bits); }
void give(Context& c, const Statement& s, float value) { give(c, s, uint64_t{std::bit_cast<uint32_t>(value)}); }

float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

// tanh.approx is right to 11 bits: the rest are cut off, so that nobody relies on them.
float coarse(float x) { return std::bit_cast<float>(std::bit_cast<uint32_t>(x) & ~0x1fffu); }

uint64_t reversed(uint32_t w) {
  uint32_t out = 0;
  for (int i = 0; i < 32; ++i) out |= (w >> i & 1) << (31 - i);
  return out;
}

uint64_t dot_bytes(uint32_t a, uint32_t b, uint32_t sum) {
  for (int i = 0; i < 4; ++i) {
    sum += static_cast<uint32_t>(static_cast<int8_t>(a >> 8 * i) * static_cast<int8_t>(b >> 8 * i));
  }
  return sum;
}

}  // namespace

void add_scalar_instructions(Table& table) {
  using C = Context&;
  using S = const Statement&;
  table.insert({
      {"mov.b32", [](C c, S s) { give(c, s, uint64_t{word(c, s, 1)}); }},
      {"brev.b32", [](C c, S s) { give(c, s, reversed(word(c, s, 1))); }},
      {"popc.b32", [](C c, S s) { give(c, s, static_cast<uint64_t>(std::popcount(word(c, s, 1)))); }},
      {"popc.b64", [](C c, S s) { give(c, s, static_cast<uint64_t>(std::popcount(c.frame.get(s.argument(1))))); }},
      {"bfind.u32",
       [](C c, S s) {
         give(c, s, static_cast<uint64_t>(static_cast<uint32_t>(31 - std::countl_zero(word(c, s, 1)))));
       }},
      {"dp4a.s32.s32", [](C c, S s) { give(c, s, dot_bytes(word(c, s, 1), word(c, s, 2), word(c, s, 3))); }},
      {"setp.ne.u32", [](C c, S s) { give(c, s, uint64_t{word(c, s, 1) != word(c, s, 2)}); }},
      {"selp.u32", [](C c, S s) { give(c, s, uint64_t{word(c, s, word(c, s, 3) != 0 ? 1 : 2)}); }},
      {"cvta.to.shared.u64",
       [](C c, S s) { give(c, s, uint64_t{to_shared_window(c.frame.get(s.argument(1)), c.site)}); }},
      {"cvt.u32.u64", [](C c, S s) { give(c, s, uint64_t{word(c, s, 1)}); }},
      {"ex2.approx.ftz.f32", [](C c, S s) { give(c, s, flushed(std::exp2(flushed(real(c, s, 1))))); }},
      {"lg2.approx.f32", [](C c, S s) { give(c, s, std::log2(real(c, s, 1))); }},
      {"rsqrt.approx.f32", [](C c, S s) { give(c, s, 1.0f / std::sqrt(real(c, s, 1))); }},
      {"rcp.approx.ftz.f32", [](C c, S s) { give(c, s, flushed(1.0f / flushed(real(c, s, 1)))); }},
      {"rcp.approx.f32", [](C c, S s) { give(c, s, 1.0f / real(c, s, 1)); }},
      {"tanh.approx.f32", [](C c, S s) { give(c, s, coarse(std::tanh(real(c, s, 1)))); }},
      {"fma.rn.f32", [](C c, S s) { give(c, s, std::fma(real(c, s, 1), real(c, s, 2), real(c, s, 3))); }},
      {"cvt.rn.bf16.f32", [](C c, S s) { give(c, s, uint64_t{to_bfloat16(real(c, s, 1))}); }},
      {"cvt.rn.f16.f32", [](C c, S s) { give(c, s, uint64_t{to_float16(real(c, s, 1))}); }},
      {"cvt.f32.f16", [](C c, S s) { give(c, s, from_float16(static_cast<uint16_t>(word(c, s, 1)))); }},
      // the first source goes to the upper half
      {"cvt.rn.bf16x2.f32",
       [](C c, S s) { give(c, s, uint64_t{to_bfloat16(real(c, s, 1))} << 16 | to_bfloat16(real(c, s, 2))); }},
      {"cvt.rn.f16x2.f32",
       [](C c, S s) { give(c, s, uint64_t{to_float16(real(c, s, 1))} << 16 | to_float16(real(c, s, 2))); }},
      {"cvt.rna.tf32.f32", [](C c, S s) { give(c, s, uint64_t{to_tf32(real(c, s, 1))}); }},
  });
}

}  // namespace emulation

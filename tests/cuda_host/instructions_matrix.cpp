// ldmatrix and mma.sync.
#include <bit>
#include <cstring>

#include "fragments.h"
#include "memory.h"
#include "numbers.h"
#include "program.h"

namespace emulation {
namespace {

using Frames = Frame* const[32];
using Threads = Thread* const[32];

constexpr uint32_t kAllLanes = 0xffffffffu;

uint32_t word(const Frame* frame, const Argument& argument) { return static_cast<uint32_t>(frame->get(argument)); }

// Lane 8 i + r has the address of row r of matrix i; each lane gets two neighbours of a row, or of a column.
template <int Count, bool Transposed>
void load_matrices(Context& c, const Statement& s) {
  // each lane's row is read by that lane
  if (c.thread.lane < 8 * Count) {
    const uintptr_t row = from_shared_window(word(&c.frame, s.argument(1)));
    if (row % 16 != 0) fail("misaligned: a row of ldmatrix begins at no multiple of 16 bytes", {c.site});
    access(c.thread, row, 16, Access::kRead, c.site);
  }
  c.block.meet(
      s, kAllLanes, c.frame,
      [](Block&, const Statement& st, Frames& frames, Threads&) {
        uint16_t matrices[Count][8][8];
        for (int i = 0; i < 8 * Count; ++i) {
          const uintptr_t row = from_shared_window(word(frames[i], st.argument(1)));
          std::memcpy(matrices[i / 8][i % 8], reinterpret_cast<const void*>(row), 16);
        }
        for (int lane = 0; lane < 32; ++lane) {
          const Element first = loaded(Lane(lane), 0, Transposed), second = loaded(Lane(lane), 1, Transposed);
          for (int i = 0; i < Count; ++i) {
            const auto& m = matrices[i];
            const uint32_t low = m[first.row][first.column], high = m[second.row][second.column];
            frames[lane]->set(st.groups[0][static_cast<size_t>(i)], high << 16 | low);
          }
        }
      },
      c.site);
}

// Values of 16 bits, two a register.
template <float (*Widen)(uint16_t)>
struct Halves {
  static constexpr int kDepth = 16, kValues = 2;
  using Value = float;
  using Sum = float;
  static Value get(uint32_t bits, int j) { return Widen(static_cast<uint16_t>(bits >> 16 * j)); }
};
struct Tf32 {
  static constexpr int kDepth = 8, kValues = 1;
  using Value = float;
  using Sum = float;
  // the lower bits are not looked at
  static Value get(uint32_t bits, int) { return std::bit_cast<float>(bits & ~0x1fffu); }
};
struct Bytes {
  static constexpr int kDepth = 32, kValues = 4;
  using Value = int32_t;
  using Sum = uint32_t;
  static Value get(uint32_t bits, int j) { return static_cast<int8_t>(bits >> 8 * j); }
};
// One bit each; the product is AND, the sum counts.
struct Bits {
  static constexpr int kDepth = 256, kValues = 32;
  using Value = uint32_t;
  using Sum = uint32_t;
  static Value get(uint32_t bits, int j) { return bits >> j & 1; }
};

// D [16 × 8] = A [16 × K] B [K × 8] + C, of the whole warp.
template <class Type>
void multiply_all(Block&, const Statement& s, Frames& frames, Threads&) {
  constexpr int kDepth = Type::kDepth, kValues = Type::kValues;
  static typename Type::Value a[16][kDepth], b[8][kDepth];
  typename Type::Sum sums[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const uint32_t bits = word(frames[lane], s.groups[1][static_cast<size_t>(i)]);
      for (int j = 0; j < kValues; ++j) {
        const Element e = left(Lane(lane), i, j, kValues);
        a[e.row][e.column] = Type::get(bits, j);
      }
      const Element e = accumulator(Lane(lane), i);
      sums[e.row][e.column] =
          std::bit_cast<typename Type::Sum>(word(frames[lane], s.groups[3][static_cast<size_t>(i)]));
    }
    for (int i = 0; i < 2; ++i) {
      const uint32_t bits = word(frames[lane], s.groups[2][static_cast<size_t>(i)]);
      for (int j = 0; j < kValues; ++j) {
        const Element e = right(Lane(lane), i, j, kValues);
        b[e.column][e.row] = Type::get(bits, j);
      }
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      auto& sum = sums[row][column];
      for (int k = 0; k < kDepth; ++k) sum += static_cast<typename Type::Sum>(a[row][k] * b[column][k]);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const Element e = accumulator(Lane(lane), i);
      frames[lane]->set(s.groups[0][static_cast<size_t>(i)], std::bit_cast<uint32_t>(sums[e.row][e.column]));
    }
  }
}

template <class Type>
void multiply(Context& c, const Statement& s) {
  c.block.meet(s, kAllLanes, c.frame, multiply_all<Type>, c.site);
}

}  // namespace

void add_matrix_instructions(Table& table) {
  table.insert({
      {"ldmatrix.sync.aligned.m8n8.x1.shared.b16", load_matrices<1, false>},
      {"ldmatrix.sync.aligned.m8n8.x2.shared.b16", load_matrices<2, false>},
      {"ldmatrix.sync.aligned.m8n8.x4.shared.b16", load_matrices<4, false>},
      {"ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16", load_matrices<1, true>},
      {"ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16", load_matrices<2, true>},
      {"ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16", load_matrices<4, true>},
      {"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", multiply<Halves<from_bfloat16>>},
      {"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", multiply<Halves<from_float16>>},
      {"mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", multiply<Tf32>},
      {"mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32", multiply<Bytes>},
      {"mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc", multiply<Bits>},
  });
}

}  // namespace emulation

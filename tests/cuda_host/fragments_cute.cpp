// Compares fragments.h, by which the emulation multiplies, with the layouts that NVIDIA states for the same
// instructions in CuTe (CUTLASS's headers), evaluated on the CPU. Prints a line for each place where they differ.
#include <cstdio>
#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/layout.hpp>

#include "fragments.h"

namespace {

using emulation::Element;
using emulation::Lane;

int differences = 0, compared = 0;

// CuTe maps (lane, value) to row + rows × column.
template <class Layout>
void compare(const char* what, const Layout& layout, int rows, int lane, int value, Element ours) {
  const int place = static_cast<int>(layout(lane, value));
  ++compared;
  if (place % rows != ours.row || place / rows != ours.column) {
    ++differences;
    std::printf("%s: lane %d value %d is (%d, %d) for us and (%d, %d) in CuTe\n", what, lane, value, ours.row,
                ours.column, place % rows, place / rows);
  }
}

template <class Instruction>
void compare_product(const char* name, int values) {
  using Traits = cute::MMA_Traits<Instruction>;
  const typename Traits::ALayout a{};
  const typename Traits::BLayout b{};
  const typename Traits::CLayout c{};
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      compare(name, c, 16, lane, i, emulation::accumulator(Lane(lane), i));
      for (int j = 0; j < values; ++j) {
        compare(name, a, 16, lane, i * values + j, emulation::left(Lane(lane), i, j, values));
      }
    }
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < values; ++j) {
        // B by its columns: CuTe's layout is of [8, K]
        const Element e = emulation::right(Lane(lane), i, j, values);
        compare(name, b, 8, lane, i * values + j, {e.column, e.row});
      }
    }
  }
}

// CuTe maps (lane, bit) to a bit of four matrices of 8 rows of 128 bits.
template <class Instruction>
void compare_loads(const char* name, bool transposed) {
  const typename cute::Copy_Traits<Instruction>::DstLayout layout{};
  for (int lane = 0; lane < 32; ++lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      for (int j = 0; j < 2; ++j) {
        const int bit = static_cast<int>(layout(lane, 32 * matrix + 16 * j));
        const Element ours = emulation::loaded(Lane(lane), j, transposed);
        ++compared;
        if (bit != 1024 * matrix + 128 * ours.row + 16 * ours.column) {
          ++differences;
          std::printf("%s: lane %d matrix %d half %d is (%d, %d) for us and bit %d in CuTe\n", name, lane, matrix, j,
                      ours.row, ours.column, bit);
        }
      }
    }
  }
}

}  // namespace

int main() {
  compare_loads<cute::SM75_U32x4_LDSM_N>("ldmatrix", false);
  compare_loads<cute::SM75_U16x8_LDSM_T>("ldmatrix.trans", true);
  compare_product<cute::SM80_16x8x16_F32BF16BF16F32_TN>("m16n8k16 bf16", 2);
  compare_product<cute::SM80_16x8x16_F32F16F16F32_TN>("m16n8k16 f16", 2);
  compare_product<cute::SM80_16x8x8_F32TF32TF32F32_TN>("m16n8k8 tf32", 1);
  compare_product<cute::SM80_16x8x32_S32S8S8S32_TN>("m16n8k32 s8", 4);
  compare_product<cute::SM80_16x8x256_S32U1U1S32_TN_XORPOPC>("m16n8k256 b1", 32);
  std::printf("%d compared, %d differ\n", compared, differences);
  return differences != 0;
}

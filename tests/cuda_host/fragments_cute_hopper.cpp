// Compares fragments of warpgroups, descriptors of tiles and places of elements in them, as kernels and emulation have
// them, with what CuTe (CUTLASS's headers) states for the same instructions, evaluated on the CPU. Prints a line for
// each place where they differ. With an argument, that bit of every descriptor of ours is wrong.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

// Shared memory, as far as CuTe is to know: its descriptors hold addresses in it.
alignas(1024) static unsigned char shared_window[192 * 1024];
static inline size_t __cvta_generic_to_shared(const void* pointer) {
  return static_cast<size_t>(static_cast<const unsigned char*>(pointer) - shared_window);
}
#define CUTE_CVTA_GENERIC_TO_SHARED_ACTIVATED 1

#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/layout.hpp>
#include <cute/tensor.hpp>

#include "fragments.h"
#include "tiles.h"

namespace kernels {
uint64_t along_rows(uint32_t address);
uint64_t along_columns(uint32_t address, uint32_t panel_bytes);
uint64_t further(uint64_t matrix, uint32_t bytes);
uint32_t panel_offset(int row, int piece);
}  // namespace kernels

namespace {

using cute::_1;
using cute::_2;
using cute::Int;
using cute::Shape;
using cute::Step;
using emulation::Element;
using emulation::Lane;
namespace gmma = cute::SM90::GMMA;

constexpr uint32_t kTile = 5 * 1024;  // where a tile begins
int differences = 0, compared = 0;
uint64_t planted = 0;

void compare(const char* what, const char* place, int x, int y, uint64_t ours, uint64_t theirs) {
  ++compared;
  if (ours == theirs) return;
  ++differences;
  std::printf("%s, %s (%d, %d): %llx for us and %llx in CuTe\n", what, place, x, y,
              static_cast<unsigned long long>(ours), static_cast<unsigned long long>(theirs));
}

// ---- fragments: CuTe maps (thread, value) to row + 64 × column ----

template <class Instruction>
void compare_sums(const char* name) {
  using Traits = cute::MMA_Traits<Instruction>;
  const typename Traits::CLayout layout{};
  constexpr int kColumns = cute::get<1>(typename Traits::Shape_MNK{});
  for (int thread = 0; thread < 128; ++thread) {
    for (int value = 0; value < kColumns / 2; ++value) {
      const Element e = emulation::accumulator(Lane(thread % 32), value % 4);
      const int row = 16 * (thread / 32) + e.row, column = 8 * (value / 4) + e.column;
      compare(name, "sum of thread, value", thread, value, row + 64 * column, layout(thread, value));
    }
  }
}

template <class Instruction>
void compare_held(const char* name) {
  const typename cute::MMA_Traits<Instruction>::ALayout layout{};
  for (int thread = 0; thread < 128; ++thread) {
    for (int value = 0; value < 8; ++value) {
      const Element e = emulation::left(Lane(thread % 32), value / 2, value % 2, 2);
      const int row = 16 * (thread / 32) + e.row;
      compare(name, "left factor of thread, value", thread, value, row + 64 * e.column, layout(thread, value));
    }
  }
}

// ---- tiles: values in CuTe's order of places, from kTile on ----

template <class Value, class Layout>
auto tile_of(const Layout& layout) {
  return cute::make_tensor(cute::make_smem_ptr(reinterpret_cast<Value*>(shared_window + kTile)), layout);
}
// The place of a value in bytes; the swizzle permutes offsets as it does addresses, since kTile is a multiple of 1024.
template <class Value, class Layout>
auto place_in(const Layout& layout) {
  return [places = cute::as_position_independent_swizzle_layout(layout)](int x, int y) {
    return kTile + static_cast<uint32_t>(places(x, y) * sizeof(Value));
  };
}

// [kRows, kColumns] in panels of kRows rows; products take kPart rows, and step by 32 bytes along them.
template <class Value, int kRows, int kColumns, int kPart, int kBits>
void compare_rows(const char* name) {
  constexpr int kBytes = sizeof(Value), kStep = 32 / kBytes;
  const auto layout = cute::tile_to_shape(gmma::Layout_K_SW128_Atom<Value>{}, Shape<Int<kRows>, Int<kColumns>>{});
  const auto parts =
      cute::local_tile(tile_of<Value>(layout), Shape<Int<kPart>, Int<kStep>>{}, cute::make_coord(cute::_, cute::_));
  const auto place = place_in<Value>(layout);
  for (int part = 0; part < kRows / kPart; ++part) {
    for (int step = 0; step < kColumns / kStep; ++step) {
      const uint32_t on = 128 * (kRows * (step / 4) + kPart * part) + 32 * (step % 4);
      const uint64_t ours = kernels::further(kernels::along_rows(kTile), on) ^ planted;
      const uint64_t theirs = gmma::make_gmma_desc<gmma::Major::K>(parts(cute::_, cute::_, part, step)).desc_;
      compare(name, "descriptor of part, step", part, step, ours, theirs);
      compare(name, "descriptor of an address, part, step", part, step, kernels::along_rows(kTile + on), theirs);
      const emulation::MatrixDescriptor decoded = emulation::decode_descriptor(ours);
      compare(name, "known, part, step", part, step, decoded.known, true);
      for (int row = 0; row < kPart; ++row) {
        for (int i = 0; i < 256 / kBits; ++i) {
          const int byte = i * kBits / 8;
          compare(name, "place of row, value", row, i, emulation::address_along_rows(decoded, row, i, kBits),
                  place(kPart * part + row, kStep * step + byte / kBytes) + byte % kBytes);
        }
      }
    }
  }
}

// [kRows, kColumns] in the same panels; products take 16 rows, which lie along the sum, and the first kPart columns.
template <class Value, int kRows, int kColumns, int kPart>
void compare_columns(const char* name) {
  const auto layout =
      cute::tile_to_shape(gmma::Layout_MN_SW128_Atom<Value>{}, Shape<Int<kColumns>, Int<kRows>>{}, Step<_2, _1>{});
  const auto parts =
      cute::local_tile(tile_of<Value>(layout), Shape<Int<kColumns>, Int<16>>{}, cute::make_coord(cute::_, cute::_));
  const auto place = place_in<Value>(layout);
  for (int step = 0; step < kRows / 16; ++step) {
    const uint64_t ours = kernels::further(kernels::along_columns(kTile, 128 * kRows), 2048 * step) ^ planted;
    uint64_t theirs = gmma::make_gmma_desc<gmma::Major::MN>(parts(cute::_, cute::_, 0, step)).desc_;
    // of one panel CuTe leaves out the way to the next
    if (kColumns == 64) theirs |= uint64_t{128 * kRows / 16} << 16;
    compare(name, "descriptor of step", step, 0, ours, theirs);
    const uint32_t address = kTile + 2048 * step;
    compare(name, "descriptor of an address, step", step, 0, kernels::along_columns(address, 128 * kRows), theirs);
    const emulation::MatrixDescriptor decoded = emulation::decode_descriptor(ours);
    compare(name, "known, step", step, 0, decoded.known, true);
    for (int column = 0; column < kPart; ++column) {
      for (int row = 0; row < 16; ++row) {
        compare(name, "place of column, row", column, row, emulation::address_along_columns(decoded, column, row),
                place(column, 16 * step + row));
      }
    }
  }
}

// A panel: pieces as kernels address them, and bytes as the copy engine lays down a box of it.
template <int kRows>
void compare_panel(const char* name) {
  const auto place =
      place_in<uint8_t>(cute::tile_to_shape(gmma::Layout_K_SW128_Atom<uint8_t>{}, Shape<Int<kRows>, Int<128>>{}));
  const cute::Swizzle<3, 4, 3> swizzle;
  for (int row = 0; row < kRows; ++row) {
    for (int byte = 0; byte < 128; ++byte) {
      compare(name, "row, byte", row, byte, emulation::address_in_box(kTile, row, byte, 128, true), place(row, byte));
      if (byte % 16 != 0) continue;
      compare(name, "row, piece", row, byte / 16, kTile + kernels::panel_offset(row, byte / 16), place(row, byte));
      compare(name, "offset of row, piece", row, byte / 16, kernels::panel_offset(row, byte / 16),
              swizzle(128 * row + byte));
    }
  }
}

template <class Half>
void compare_halves(const char* name) {
  compare_rows<Half, 64, 64, 64, 16>(name);
  compare_rows<Half, 64, 256, 64, 16>(name);
  compare_rows<Half, 128, 128, 64, 16>(name);
  compare_rows<Half, 128, 256, 128, 16>(name);
  compare_rows<Half, 256, 128, 128, 16>(name);
  compare_columns<Half, 64, 64, 64>(name);
  compare_columns<Half, 64, 128, 96>(name);  // half of the second panel, for which CuTe has no layout of its own
  compare_columns<Half, 128, 128, 128>(name);
  compare_columns<Half, 128, 256, 256>(name);
  compare_columns<Half, 256, 256, 256>(name);
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1) planted = uint64_t{1} << std::atoi(arguments[1]);
  using cute::bfloat16_t;
  using cute::half_t;
  constexpr auto kAlong = gmma::Major::K, kAcross = gmma::Major::MN;
  compare_sums<cute::SM90_64x64x16_F32BF16BF16_SS<kAlong, kAlong>>("m64n64k16 bf16");
  compare_sums<cute::SM90_64x128x16_F32BF16BF16_SS<kAlong, kAlong>>("m64n128k16 bf16");
  compare_sums<cute::SM90_64x64x16_F32F16F16_SS<kAlong, kAlong>>("m64n64k16 f16");
  compare_sums<cute::SM90_64x128x16_F32F16F16_SS<kAlong, kAlong>>("m64n128k16 f16");
  compare_sums<cute::SM90_64x96x16_F32BF16BF16_RS<kAlong, kAcross>>("m64n96k16 bf16");
  compare_sums<cute::SM90_64x256x16_F32BF16BF16_RS<kAlong, kAcross>>("m64n256k16 bf16");
  // CuTe has no products of bits; their sums are those of other 32-bit whole numbers
  compare_sums<cute::SM90_64x256x32_S32S8S8_SS_TN>("m64n256k32 s8");
  compare_held<cute::SM90_64x64x16_F32BF16BF16_RS<kAlong, kAcross>>("m64n64k16 bf16");
  compare_held<cute::SM90_64x96x16_F32BF16BF16_RS<kAlong, kAcross>>("m64n96k16 bf16");
  compare_held<cute::SM90_64x128x16_F32F16F16_RS<kAlong, kAcross>>("m64n128k16 f16");
  compare_held<cute::SM90_64x256x16_F32F16F16_RS<kAlong, kAcross>>("m64n256k16 f16");
  compare_halves<bfloat16_t>("tiles of bf16");
  compare_halves<half_t>("tiles of f16");
  // rows of bits as rows of bytes
  compare_rows<uint8_t, 64, 128, 64, 1>("tiles of bits");
  compare_rows<uint8_t, 256, 256, 256, 1>("tiles of bits");
  compare_rows<uint8_t, 256, 256, 64, 1>("tiles of bits");
  compare_panel<64>("a panel");
  compare_panel<256>("a panel");
  std::printf("%d compared, %d differ\n", compared, differences);
  return differences != 0;
}

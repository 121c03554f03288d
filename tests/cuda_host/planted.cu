// A small kernel with everything that the emulation must see through, right and with one bug planted at a time:
// out [rows, 16] = a [rows, depth] b [16, depth]ᵀ for ragged sequences of at most 16 rows, one block each.
#include <cstdio>
#include <stdexcept>

#include "ptx.cuh"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using namespace embedding_kernels;

enum Bug {
  kNone,
  kFragmentOffByOne,
  kOperandsSwapped,
  kBarrierMissing,
  kWaitMissing,
  kWaitOffByOne,
  kStorePastTheEnd,
  kRowsOfTheNeighbour,
  kBarrierInABranch,
  kUnwrittenShared,
  kMisaligned,
  kShuffleInABranch,
  kReturnBeforeABarrier,
  kNamedBarrierTooFew,
  kCopyReadsPastTheEnd,
  kUnknownInstruction,
  kLocalArrayIndex,
  kTooMuchShared,
  kAtomicAndPlain,
};

constexpr int kThreads = 64, kRows = 16, kStep = 16, kPitch = kStep + 8;

struct Shared {
  uint16_t a[2][kRows][kPitch];
  uint16_t b[2][kRows][kPitch];
  uint32_t counter;
};

// As ptx::multiply_bfloat16, with two registers of A in each other's place.
void multiply_swapped(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  EK_PTX_PURE(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%5, %4, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};",
      (EK_CHANGE_F32(c[0]), EK_CHANGE_F32(c[1]), EK_CHANGE_F32(c[2]), EK_CHANGE_F32(c[3])),
      (EK_IN_U32(a[0]), EK_IN_U32(a[1]), EK_IN_U32(a[2]), EK_IN_U32(a[3]), EK_IN_U32(b0), EK_IN_U32(b1)));
}

template <int Planted>
void fetch(Shared& shared, int stage, const uint16_t* a, const uint16_t* b, int first, int rows, int depth, int step) {
  const int chunk = static_cast<int>(threadIdx.x) % 32, row = chunk / 2, column = chunk % 2 * 8;
  const int64_t offset = int64_t{step} * kStep + column;
  if (threadIdx.x < 32) {
    const bool inside = row < rows || Planted == kCopyReadsPastTheEnd;
    ptx::copy16_async(ptx::shared_address(&shared.a[stage][row][column]), a + (first + row) * int64_t{depth} + offset,
                      inside ? 16 : 0);
  } else {
    ptx::copy16_async(ptx::shared_address(&shared.b[stage][row][column]), b + row * int64_t{depth} + offset);
  }
  ptx::commit_copies();
}

template <int Planted>
void multiply(Shared& shared, int stage, float (&sums)[4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int row = Planted == kFragmentOffByOne ? (lane + 1) % 16 : lane % 16;
  const int column = Planted == kMisaligned ? lane / 16 * 8 + 4 : lane / 16 * 8;
  uint32_t a[4], b[2];
  // past the step lie 8 columns of padding that nobody writes
  const int shift = Planted == kUnwrittenShared ? 8 : 0;
  ptx::load_matrices4(ptx::shared_address(&shared.a[stage][row][column + shift]), a);
  ptx::load_matrices2(ptx::shared_address(&shared.b[stage][warp * 8 + lane % 8][lane / 8 % 2 * 8]), b);
  if (Planted == kOperandsSwapped) {
    multiply_swapped(sums, a, b[0], b[1]);
  } else {
    ptx::multiply_bfloat16(sums, a, b[0], b[1]);
  }
}

// What does not touch the result.
template <int Planted>
void distract(Shared& shared, const int* offsets) {
  if (Planted == kBarrierInABranch && threadIdx.x < 32) ptx::sync_block();
  if (Planted == kShuffleInABranch && threadIdx.x % 2 == 0) ptx::shuffle_xor(1u, 2);
  if (Planted == kNamedBarrierTooFew) ptx::sync_threads(1, 96);
  if (Planted == kUnknownInstruction) EK_PTX("nanosleep.u32 %0;", (), (EK_IN_U32(20)));
  if (Planted == kLocalArrayIndex) {
    volatile int place = offsets[1] + 100;
    int held[4] = {};
    held[place] = 1;
  }
  if (Planted == kAtomicAndPlain) {
    if (threadIdx.x == 0) shared.counter = 0;
    ptx::add_shared(ptx::shared_address(&shared.counter), 1);
  }
}

template <int Planted>
void product(const uint16_t* a, const uint16_t* b, const int* offsets, int depth, float* out) {
  Shared& shared = emulation::shared_memory<Shared>();
  const int first = offsets[blockIdx.x], rows = offsets[blockIdx.x + 1] - first, steps = depth / kStep;
  distract<Planted>(shared, offsets);
  float sums[4] = {0, 0, 0, 0};
  fetch<Planted>(shared, 0, a, b, first, rows, depth, 0);
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) {
      fetch<Planted>(shared, (step + 1) % 2, a, b, first, rows, depth, step + 1);
      if (Planted != kWaitMissing) ptx::wait_copies<Planted == kWaitOffByOne ? 2 : 1>();
    } else {
      ptx::wait_copies<0>();
    }
    if (Planted == kReturnBeforeABarrier && threadIdx.x >= 32) return;
    ptx::sync_block();
    multiply<Planted>(shared, step % 2, sums);
    if (Planted != kBarrierMissing) ptx::sync_block();
  }
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2);
    int column = warp * 8 + lane % 4 * 2 + i % 2;
    if (Planted == kStorePastTheEnd && column == 15) ++column;
    // a later block writes the neighbour's rows again: the result is right by the order of blocks
    const int mask = Planted == kRowsOfTheNeighbour && blockIdx.x == 0 ? rows + 1 : rows;
    if (row < mask) out[(first + row) * int64_t{kRows} + column] = sums[i];
  }
}

template <int Planted>
void start(const uint16_t* a, const uint16_t* b, const int* offsets, int sequences, int depth, float* out) {
  const size_t shared = Planted == kTooMuchShared ? sizeof(Shared) - 4 : sizeof(Shared);
  emulation::launch("product", product<Planted>, dim3(static_cast<unsigned>(sequences)), dim3(kThreads), shared,
                    nullptr, a, b, offsets, depth, out);
}

using Start = void (*)(const uint16_t*, const uint16_t*, const int*, int, int, float*);
constexpr Start kStarts[] = {
    start<0>,  start<1>,  start<2>,  start<3>,  start<4>,  start<5>,  start<6>,  start<7>,  start<8>,  start<9>,
    start<10>, start<11>, start<12>, start<13>, start<14>, start<15>, start<16>, start<17>, start<18>,
};

}  // namespace

// What the emulation reports, or an empty text.
EXPORT const char* planted(int bug, const uint16_t* a, const uint16_t* b, const int* offsets, int sequences, int depth,
                           float* out) {
  static char report[4096];
  report[0] = 0;
  const emulation::DeviceGuard guard(0);
  const int rows = offsets[sequences];
  emulation::note_buffer(a, sizeof(uint16_t) * static_cast<size_t>(rows * depth));
  emulation::note_buffer(b, sizeof(uint16_t) * static_cast<size_t>(kRows * depth));
  emulation::note_buffer(offsets, sizeof(int) * static_cast<size_t>(sequences + 1));
  emulation::note_buffer(out, sizeof(float) * static_cast<size_t>(rows * kRows));
  try {
    kStarts[bug](a, b, offsets, sequences, depth, out);
  } catch (const std::runtime_error& error) {
    std::snprintf(report, sizeof report, "%s", error.what());
  }
  return report;
}

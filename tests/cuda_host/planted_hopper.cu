// A small kernel with everything of Hopper's that the emulation must see through, right and with one bug planted at a
// time: out [rows, 128] = bfloat16(x [rows, depth] wᵀ [depth, 64]) v [64, 128], for ragged sequences, one block each,
// whose tiles of 64 rows come through a ring from the copy engine and go back through it.
#include <cstdio>
#include <stdexcept>

#include "warpgroup.cuh"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using namespace embedding_kernels;
using namespace embedding_kernels::cuda;

enum Bug {
  kNone,
  kReleasedBeforeTheWait,
  kFenceMissingBeforeAProduct,
  kFenceMissingBeforeAStore,
  kTooFewBytesExpected,
  kTooManyBytesExpected,
  kNotSwizzled,
  kDescriptorOff,
  kFullNotAwaited,
  kWrongParity,
  kSumsUsedEarly,
  kFactorOverwritten,
  kBeginMissing,
  kBarriersNotPublished,
  kBarriersNotSynced,
  kBoxReused,
  kWarpMissing,
  kRowOff,
  kRowOfTheNeighbour,
  kFreeNotAwaited,
  kOneWarpReleases,
  kRegistersOdd,
  kEndsBeforeTheStores,
  kBarrierTouched,
  kBoxMisplaced,
  kRowsTakenForColumns,
  kPanelsOneBehindTheOther,
  kTooManyArrivals,
  kArrivalMissing,
  kBarrierNotBegun,
  kReadBeforeTheWait,
  kTooMuchShared,
  kCopyNobodyAwaits,
  kCommitMissing,
  kErasedNotPublished,
  kGlobalStoreBefore,
  kColumnOff,
  kFactorChangedAfterBegin,
  kSumsChangedAfterBegin,
  // right, though unusual
  kErasedAndPublished,
  kPublishedAfterTheBarrier,
};
int planted_now = kNone;

constexpr int kThreads = 256, kRows = 64, kColumns = 128, kStages = 2;
constexpr uint32_t kPanelBytes = kRows * kPanelRow;

struct Shared {
  unsigned char stages[kStages][2][kPanelBytes];  // x, w
  unsigned char v[2][kPanelBytes];
  unsigned char out[2][kPanelBytes];
  uint64_t full[kStages], free[kStages];
};

struct Task {
  TensorMap x, w, out;
  const uint16_t* v;
  const int* offsets;
  int depth;
  uint16_t* first_out;
};

void begin(Shared& shared) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      ptx::begin_barrier(ptx::shared_address(&shared.full[i]), 1);
      if (planted_now == kBarrierNotBegun) continue;
      const uint32_t arrivals = planted_now == kOneWarpReleases || planted_now == kTooManyArrivals ? 1
                                : planted_now == kArrivalMissing                                   ? 5
                                                                                                   : 4;
      ptx::begin_barrier(ptx::shared_address(&shared.free[i]), arrivals);
    }
    if (planted_now != kBarriersNotPublished) ptx::publish_barriers();
  }
  if (planted_now != kBarriersNotSynced) ptx::sync_block();
}

// One thread has the tiles copied.
void produce(Shared& shared, const Task& task, int first, int rows) {
  RingPlace<kStages> place;
  for (int row = 0; row < rows; row += kRows) {
    for (int column = 0; column < task.depth; column += kPanelValues) {
      const uint32_t full = ptx::shared_address(&shared.full[place.stage]);
      if (planted_now != kFreeNotAwaited) wait_at(ptx::shared_address(&shared.free[place.stage]), place.parity ^ 1);
      const uint32_t bytes = planted_now == kTooFewBytesExpected    ? kPanelBytes
                             : planted_now == kTooManyBytesExpected ? 2 * kPanelBytes + 16
                                                                    : 2 * kPanelBytes;
      ptx::arrive_expecting(full, bytes);
      int32_t x[5];
      ragged_place(planted_now == kColumnOff ? column + 4 : column, 0, planted_now == kRowOff ? first + 1 : first, rows,
                   row, x);
      const uint32_t tile = ptx::shared_address(shared.stages[place.stage][0]);
      ptx::load_box5(planted_now == kBoxMisplaced ? tile + 128 : tile, &task.x, x, full);
      ptx::load_box2(ptx::shared_address(shared.stages[place.stage][1]), &task.w, column, 0, full);
      place.advance();
    }
  }
  if (planted_now != kCopyNobodyAwaits) return;
  const uint32_t full = ptx::shared_address(&shared.full[place.stage]);
  wait_at(ptx::shared_address(&shared.free[place.stage]), place.parity ^ 1);
  ptx::arrive_expecting(full, kPanelBytes);
  ptx::load_box2(ptx::shared_address(shared.stages[place.stage][1]), &task.w, 0, 0, full);
}

// The right factor of the second product, by ordinary stores.
void store_right(Shared& shared, const uint16_t* v) {
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
  for (int i = thread; i < kRows * kColumns / 8; i += kWarpgroup) {
    const int row = i / 16, piece = i % 16;
    const uint32_t offset = planted_now == kNotSwizzled ? static_cast<uint32_t>(row * kPanelRow + piece % 8 * 16)
                                                        : panel_offset(row, piece % 8);
    ptx::store_shared_words4(ptx::shared_address(shared.v[piece / 8]) + offset, ptx::load_words4(v + i * 8));
  }
  if (planted_now != kFenceMissingBeforeAProduct) ptx::publish_stores();
  ptx::sync_threads(1, kWarpgroup);
}

void multiply_stage(Shared& shared, const RingPlace<kStages>& place, float (&sums)[8][4], bool add) {
  const uint32_t parity = planted_now == kWrongParity ? place.parity ^ 1 : place.parity;
  if (planted_now != kFullNotAwaited) wait_at(ptx::shared_address(&shared.full[place.stage]), parity);
  const uint32_t left = ptx::shared_address(shared.stages[place.stage][0]);
  const uint32_t right = ptx::shared_address(shared.stages[place.stage][1]);
  if (planted_now != kBeginMissing) ptx::begin_products();
  for (uint32_t step = 0; step < 4; ++step) {
    const uint32_t off = planted_now == kDescriptorOff ? 16 : 0;
    if (planted_now == kWarpMissing && threadIdx.x / 32 == 5) break;
    ptx::multiply_tiles_bfloat16(sums, along_rows(left + 32 * step), along_rows(right + 32 * step + off),
                                 add || step != 0);
  }
  if (planted_now != kCommitMissing) ptx::commit_products();
}

void release_stage(Shared& shared, int stage) {
  if (planted_now == kErasedNotPublished || planted_now == kErasedAndPublished) {
    // of a warp's rows, which the other warps do not read from here
    ptx::sync_threads(1, kWarpgroup);
    shared.stages[stage][0][threadIdx.x % kWarpgroup * kPanelRow / 2] = 0;
    if (planted_now == kErasedAndPublished) ptx::publish_stores();
    ptx::sync_warp();
  }
  const uint32_t free = ptx::shared_address(&shared.free[stage]);
  if (threadIdx.x % 32 == 0 && (planted_now != kOneWarpReleases || threadIdx.x == kWarpgroup)) ptx::arrive_at(free);
}

void pack(const float (&sums)[8][4], uint32_t (&held)[4][4]) {
  for (int step = 0; step < 4; ++step) {
    for (int i = 0; i < 4; ++i) {
      const float (&from)[4] = sums[2 * step + i / 2];
      held[step][i] = ptx::pack_bfloat16(from[i % 2 * 2], from[i % 2 * 2 + 1]);
    }
  }
}

void multiply_held(Shared& shared, uint32_t (&held)[4][4], float (&sums)[16][4]) {
  const uint32_t right = ptx::shared_address(shared.v[0]);
  if (planted_now == kSumsChangedAfterBegin) ptx::begin_products();
  for (auto& of_columns : sums) {
    for (float& sum : of_columns) sum = 0;
  }
  if (planted_now != kSumsChangedAfterBegin) ptx::begin_products();
  if (planted_now == kFactorChangedAfterBegin) held[3][3] = ptx::pack_bfloat16(0, 0);
  for (uint32_t step = 0; step < 4; ++step) {
    const uint32_t address = right + step * 16 * kPanelRow;
    const uint32_t panels = planted_now == kPanelsOneBehindTheOther ? kPanelBytes / 2 : kPanelBytes;
    ptx::multiply_held_bfloat16(
        sums, held[step], planted_now == kRowsTakenForColumns ? along_rows(address) : along_columns(address, panels));
  }
  ptx::commit_products();
  if (planted_now == kFactorOverwritten) held[0][0] = 0;
  ptx::wait_products<0>();
  ptx::settle(sums);
}

void store_tile(Shared& shared, const Task& task, int first, int rows, int row, const float (&sums)[16][4]) {
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup, lane = thread % 32;
  // the thread that stored the tile before, before the others overwrite it
  if (planted_now != kBoxReused && thread == 0) ptx::wait_stores_read<0>();
  ptx::sync_threads(1, kWarpgroup);
  for (int n = 0; n < 16; ++n) {
    for (int half = 0; half < 2; ++half) {
      const int at = thread / 32 * 16 + lane / 4 + 8 * half;
      unsigned char* const piece = shared.out[n / 8] + panel_offset(at, n % 8) + lane % 4 * 4;
      *reinterpret_cast<uint32_t*>(piece) = ptx::pack_bfloat16(sums[n][2 * half], sums[n][2 * half + 1]);
    }
  }
  const bool late = planted_now == kPublishedAfterTheBarrier;
  if (planted_now != kFenceMissingBeforeAStore && !late) ptx::publish_stores();
  ptx::sync_threads(1, kWarpgroup);
  if (thread != 0) return;
  if (late) ptx::publish_stores();
  if (planted_now == kGlobalStoreBefore) task.first_out[first * kColumns] = 0;
  for (int panel = 0; panel < 2; ++panel) {
    int32_t x[5];
    ragged_place(panel * kPanelValues, 0, first, planted_now == kRowOfTheNeighbour ? rows + 1 : rows, row, x);
    ptx::store_box5(&task.out, x, ptx::shared_address(shared.out[panel]));
  }
  ptx::commit_stores();
}

void consume(Shared& shared, const Task& task, int first, int rows) {
  store_right(shared, task.v);
  if (planted_now == kReadBeforeTheWait) {
    volatile unsigned char got = shared.stages[0][0][0];
    (void)got;
  }
  RingPlace<kStages> place;
  for (int row = 0; row < rows; row += kRows) {
    float scores[8][4], sums[16][4];
    uint32_t held[4][4];
    for (int column = 0; column < task.depth; column += kPanelValues) {
      multiply_stage(shared, place, scores, column != 0);
      if (planted_now == kReleasedBeforeTheWait) release_stage(shared, place.stage);
      if (planted_now == kSumsUsedEarly) pack(scores, held);
      ptx::wait_products<0>();
      ptx::settle(scores);
      if (planted_now != kReleasedBeforeTheWait) release_stage(shared, place.stage);
      place.advance();
    }
    pack(scores, held);
    multiply_held(shared, held, sums);
    store_tile(shared, task, first, rows, row, sums);
  }
  if (planted_now != kEndsBeforeTheStores && threadIdx.x == kWarpgroup) ptx::wait_stores_read<0>();
}

void product(const __grid_constant__ Task task) {
  Shared& shared = emulation::shared_memory<Shared>();
  const int first = task.offsets[blockIdx.x], rows = task.offsets[blockIdx.x + 1] - first;
  begin(shared);
  if (planted_now == kBarrierTouched && threadIdx.x == 1) shared.full[0] = 0;
  if (threadIdx.x < kWarpgroup) {
    planted_now == kRegistersOdd ? ptx::keep_registers<100>() : ptx::keep_registers<24>();
    if (threadIdx.x == 0) produce(shared, task, first, rows);
  } else {
    ptx::take_registers<240>();
    consume(shared, task, first, rows);
  }
}

void start(const uint16_t* x, const uint16_t* w, const uint16_t* v, const int* offsets, int sequences, int depth,
           uint16_t* out) {
  Task task;
  task.x = ragged_map("product", x, depth, 1, depth, depth, kRows);
  const auto columns = static_cast<uint64_t>(depth);
  task.w = tensor_map("product", w,
                      {TensorShape::kHalf, 2, {columns, kRows}, {2, 2 * columns}, {kPanelValues, kRows}, true});
  task.out = ragged_map("product", out, kColumns, 1, kColumns, kColumns, kRows);
  task.v = v;
  task.offsets = offsets;
  task.depth = depth;
  task.first_out = out;
  const size_t shared = planted_now == kTooMuchShared ? 228 * 1024 : sizeof(Shared);
  emulation::launch("product", product, dim3(static_cast<unsigned>(sequences)), dim3(kThreads), shared, nullptr, task);
}

}  // namespace

// What the emulation reports, or an empty text. Each of x and out has one row more than the sequences.
EXPORT const char* planted(int bug, const uint16_t* x, const uint16_t* w, const uint16_t* v, const int* offsets,
                           int sequences, int depth, uint16_t* out) {
  static char report[4096];
  report[0] = 0;
  const emulation::DeviceGuard guard(0);
  const auto rows = static_cast<size_t>(offsets[sequences] + 1), columns = static_cast<size_t>(depth);
  emulation::note_buffer(x, 2 * rows * columns);
  emulation::note_buffer(w, 2 * kRows * columns);
  emulation::note_buffer(v, 2 * kRows * kColumns);
  emulation::note_buffer(offsets, sizeof(int) * static_cast<size_t>(sequences + 1));
  emulation::note_buffer(out, 2 * rows * kColumns);
  planted_now = bug;
  try {
    start(x, w, v, offsets, sequences, depth, out);
  } catch (const std::runtime_error& error) {
    std::snprintf(report, sizeof report, "%s", error.what());
  }
  return report;
}

// The refusal of a map whose box, strides or data are given, or an empty text.
EXPORT const char* map_refused(uintptr_t data, int rank, const uint64_t* sizes, const uint64_t* strides,
                               const uint32_t* box, int swizzled) {
  static char report[4096];
  report[0] = 0;
  alignas(64) TensorMap map;
  try {
    emulation::encode_tensor_map("map", &map, reinterpret_cast<const void*>(data), 2, rank, sizes, strides, box,
                                 swizzled != 0);
  } catch (const std::runtime_error& error) {
    std::snprintf(report, sizeof report, "%s", error.what());
  }
  return report;
}

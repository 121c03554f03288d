// Every wrapper of ptx_hopper.cuh on operands from outside, a block a launch, as conformance.cu has those of ptx.cuh.
// conformance_definitions_hopper.py says what must come out.
#include "conformance.h"
#include "warpgroup.cuh"

namespace {

namespace ptx = embedding_kernels::ptx;
using embedding_kernels::TensorMap;
using embedding_kernels::TensorShape;
using embedding_kernels::cuda::along_columns;
using embedding_kernels::cuda::along_rows;
using embedding_kernels::cuda::panel_offset;
using embedding_kernels::cuda::wait_at;

constexpr int kMostThreads = 384;
// The first words of a block's operands: coordinates, steps and the like; then what they are about.
constexpr int kParameters = 64;

struct Shared {
  alignas(1024) uint32_t left[4096];
  alignas(1024) uint32_t right[8192];
  uint32_t words[3][kMostThreads];
  uint64_t barrier;
};

__device__ inline Shared& shared_memory() { return conformance::shared_memory<Shared>(); }
__device__ inline int thread() { return static_cast<int>(threadIdx.x); }
__device__ inline int threads() { return static_cast<int>(blockDim.x); }
// Another thread, in the other half of the block.
__device__ inline int opposite() { return threads() - 1 - thread(); }

// ---- bodies: operands and results of the block ----

namespace body {

// One thread begins the block's barrier.
__device__ inline uint32_t begun_barrier(uint32_t count) {
  const uint32_t barrier = ptx::shared_address(&shared_memory().barrier);
  if (thread() == 0) {
    ptx::begin_barrier(barrier, count);
    ptx::publish_barriers();
  }
  ptx::sync_block();
  return barrier;
}

// All arrive, three times; the phase before the first has passed.
__device__ inline void phases(const uint32_t* in, uint32_t* out, const TensorMap*) {
  Shared& shared = shared_memory();
  const uint32_t barrier = begun_barrier(static_cast<uint32_t>(threads()));
  out[4 * thread()] = ptx::has_passed(barrier, 1) ? 1 : 0;
#pragma unroll
  for (int phase = 0; phase < 3; ++phase) {
    shared.words[phase][thread()] = in[thread()] + static_cast<uint32_t>(phase);
    ptx::arrive_at(barrier);
    wait_at(barrier, phase & 1);
    out[4 * thread() + 1 + phase] = shared.words[phase][opposite()];
  }
}
// The second warp arrives and does not wait.
__device__ inline void arrive_at(const uint32_t* in, uint32_t* out, const TensorMap*) {
  Shared& shared = shared_memory();
  const uint32_t barrier = begun_barrier(32);
  if (thread() < 32) {
    wait_at(barrier, 0);
    out[thread()] = shared.words[0][opposite()];
  } else {
    shared.words[0][thread()] = in[thread()];
    ptx::arrive_at(barrier);
    out[thread()] = in[thread()];
  }
}

// The shared memory of a box goes out as it lies there.
__device__ inline void put_box(uint32_t* out, int words) {
  Shared& shared = shared_memory();
  for (int i = thread(); i < words; i += threads()) out[i] = shared.left[i];
}
template <int Words>
__device__ inline void load2(const uint32_t* in, uint32_t* out, const TensorMap* map) {
  const uint32_t barrier = begun_barrier(1);
  if (thread() == 0) {
    ptx::prefetch_map(map);
    ptx::arrive_expecting(barrier, 4 * Words);
    ptx::load_box2(ptx::shared_address(shared_memory().left), map, static_cast<int32_t>(in[0]),
                   static_cast<int32_t>(in[1]), barrier);
  }
  wait_at(barrier, 0);
  put_box(out, Words);
}
// One phase for two boxes and another thread's arrival.
template <int Words>
__device__ inline void load2_twice(const uint32_t* in, uint32_t* out, const TensorMap* map) {
  const uint32_t barrier = begun_barrier(2);
  if (thread() == 32) ptx::arrive_at(barrier);
  if (thread() == 0) {
    ptx::arrive_expecting(barrier, 8 * Words);
    for (int box = 0; box < 2; ++box) {
      ptx::load_box2(ptx::shared_address(&shared_memory().left[box * Words]), map, static_cast<int32_t>(in[2 * box]),
                     static_cast<int32_t>(in[2 * box + 1]), barrier);
    }
  }
  wait_at(barrier, 0);
  put_box(out, 2 * Words);
}

__device__ inline void take_place(const uint32_t* in, int32_t (&x)[5]) {
#pragma unroll
  for (int i = 0; i < 5; ++i) x[i] = static_cast<int32_t>(in[i]);
}
// Column, head, first row, count and row.
__device__ inline void take_ragged_place(const uint32_t* in, int32_t (&x)[5]) {
  int32_t of[5];
  take_place(in, of);
  embedding_kernels::ragged_place(of[0], of[1], of[2], of[3], of[4], x);
}
using Place = void (*)(const uint32_t*, int32_t (&)[5]);

template <int Words, Place Take>
__device__ inline void load5(const uint32_t* in, uint32_t* out, const TensorMap* map) {
  const uint32_t barrier = begun_barrier(1);
  if (thread() == 0) {
    int32_t x[5];
    Take(in, x);
    ptx::arrive_expecting(barrier, 4 * Words);
    ptx::load_box5(ptx::shared_address(shared_memory().left), map, x, barrier);
  }
  wait_at(barrier, 0);
  put_box(out, Words);
}
template <int Words, Place Take>
__device__ inline void store5(const uint32_t* in, uint32_t*, const TensorMap* map) {
  Shared& shared = shared_memory();
  for (int i = thread(); i < Words; i += threads()) shared.left[i] = in[kParameters + i];
  ptx::publish_stores();
  ptx::sync_block();
  if (thread() == 0) {
    int32_t x[5];
    Take(in, x);
    ptx::store_box5(map, x, ptx::shared_address(shared.left));
    ptx::commit_stores();
    ptx::wait_stores_read<0>();
  }
  ptx::sync_block();
  // what was read may change
  for (int i = thread(); i < Words; i += threads()) shared.left[i] = 0;
}
// Two groups, each of which may be overwritten as soon as it is the oldest that must have been read.
template <int Words>
__device__ inline void store5_twice(const uint32_t* in, uint32_t*, const TensorMap* map) {
  Shared& shared = shared_memory();
  uint32_t* const boxes[2] = {shared.left, shared.right};
  for (int i = thread(); i < 2 * Words; i += threads()) boxes[i / Words][i % Words] = in[kParameters + i];
  ptx::publish_stores();
  ptx::sync_block();
  if (thread() != 0) return;
  for (int box = 0; box < 2; ++box) {
    int32_t x[5];
    take_place(in + 5 * box, x);
    ptx::store_box5(map, x, ptx::shared_address(boxes[box]));
    ptx::commit_stores();
  }
  ptx::wait_stores_read<1>();
  for (int i = 0; i < Words; ++i) shared.left[i] = 0;
  ptx::wait_stores_read<0>();
  for (int i = 0; i < Words; ++i) shared.right[i] = 0;
}

// The first warpgroup gives away registers, the two others take them.
template <int Kept, int Taken>
__device__ inline void registers(const uint32_t* in, uint32_t* out, const TensorMap*) {
  Shared& shared = shared_memory();
  if (thread() < 128) {
    ptx::keep_registers<Kept>();
    shared.words[0][thread()] = in[thread()];
    ptx::sync_threads(1, kMostThreads);
    out[thread()] = shared.words[0][opposite()];
  } else {
    ptx::take_registers<Taken>();
    shared.words[0][thread()] = in[thread()];
    ptx::sync_threads(1, kMostThreads);
    out[thread()] = shared.words[0][opposite()];
  }
}

// ---- products ----

// A matrix of `words` words a row, as panels.
__device__ inline void place_tile(uint32_t* tile, const uint32_t* in, int rows, int words) {
  for (int i = thread(); i < rows * words; i += threads()) {
    const int row = i / words, word = i % words;
    const uint32_t offset = panel_offset(row, word % 32 / 4);
    tile[word / 32 * rows * 32 + static_cast<int>(offset / 4) + word % 4] = in[i];
  }
}
__device__ inline void take(float& value, uint32_t word) { value = ptx::float_of(word); }
__device__ inline void take(uint32_t& value, uint32_t word) { value = word; }
__device__ inline uint32_t word_of(float value) { return ptx::bits_of(value); }
__device__ inline uint32_t word_of(uint32_t value) { return value; }
template <class Sum, int N>
__device__ inline void take_sums(Sum (&d)[N][4], const uint32_t* in) {
#pragma unroll
  for (int i = 0; i < 4 * N; ++i) take(d[i / 4][i % 4], in[4 * N * thread() + i]);
}
template <class Sum, int N>
__device__ inline void put_sums(const Sum (&d)[N][4], uint32_t* out) {
#pragma unroll
  for (int i = 0; i < 4 * N; ++i) out[4 * N * thread() + i] = word_of(d[i / 4][i % 4]);
}
// Step `step` of the sum, 32 bytes, of a tile with so many rows.
__device__ inline uint64_t step_of(const uint32_t* tile, int rows, uint32_t step) {
  return along_rows(ptx::shared_address(tile) + step / 4 * static_cast<uint32_t>(rows) * 128 + step % 4 * 32);
}

// Left [64, Words] and right [8 N, Words] by rows, then the sums; step and `add` are parameters.
template <int Words, class Sum, int N, void (*Multiply)(Sum (&)[N][4], uint64_t, uint64_t, uint32_t)>
__device__ inline void multiply_tiles(const uint32_t* in, uint32_t* out, const TensorMap*) {
  Shared& shared = shared_memory();
  const uint32_t *const left = in + kParameters, *const right = left + 64 * Words;
  place_tile(shared.left, left, 64, Words);
  place_tile(shared.right, right, 8 * N, Words);
  Sum d[N][4];
  take_sums(d, right + 8 * N * Words);
  ptx::publish_stores();
  ptx::sync_block();
  ptx::begin_products();
  Multiply(d, step_of(shared.left, 64, in[0]), step_of(shared.right, 8 * N, in[0]), in[1]);
  ptx::commit_products();
  ptx::wait_products<0>();
  ptx::settle(d);
  put_sums(d, out);
}

// Right [64, 8 N] by rows, the left factor's registers, then the sums.
template <int N, void (*Multiply)(float (&)[N][4], const uint32_t (&)[4], uint64_t)>
__device__ inline void multiply_held(const uint32_t* in, uint32_t* out, const TensorMap*) {
  Shared& shared = shared_memory();
  const uint32_t *const right = in + kParameters, *const left = right + 64 * 4 * N;
  place_tile(shared.right, right, 64, 4 * N);
  uint32_t held[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) held[i] = left[4 * thread() + i];
  float d[N][4];
  take_sums(d, left + 4 * 128);
  ptx::publish_stores();
  ptx::sync_block();
  ptx::begin_products();
  Multiply(d, held, along_columns(ptx::shared_address(shared.right) + 2048 * in[0], 64 * 128));
  ptx::commit_products();
  ptx::wait_products<0>();
  ptx::settle(d);
  put_sums(d, out);
}

// Two products of steps in[0] and in[1], of the same operands as above: into sums of their own, waited for one after
// the other; into the same sums in one group; into the same sums, changed between them.
enum class Two { kApart, kTogether, kInTurn };
template <Two How>
__device__ inline void multiply_twice(const uint32_t* in, uint32_t* out, const TensorMap*) {
  constexpr int kWords = 64;
  Shared& shared = shared_memory();
  const uint32_t *const left = in + kParameters, *const right = left + 64 * kWords;
  place_tile(shared.left, left, 64, kWords);
  place_tile(shared.right, right, 64, kWords);
  float first[8][4], second[8][4];
  take_sums(first, right + 64 * kWords);
  take_sums(second, right + 64 * kWords);
  const auto multiply = [&](float (&d)[8][4], uint32_t step) {
    ptx::multiply_tiles_bfloat16(d, step_of(shared.left, 64, step), step_of(shared.right, 64, step), 1);
  };
  ptx::publish_stores();
  ptx::sync_block();
  ptx::begin_products();
  multiply(first, in[0]);
  if constexpr (How == Two::kTogether) multiply(first, in[1]);
  ptx::commit_products();
  if constexpr (How == Two::kApart) {
    ptx::begin_products();
    multiply(second, in[1]);
    ptx::commit_products();
    ptx::wait_products<1>();
    ptx::settle(first);
    put_sums(first, out);
  }
  ptx::wait_products<0>();
  if constexpr (How == Two::kApart) {
    ptx::settle(second);
    put_sums(second, out + 128 * 32);
    return;
  }
  ptx::settle(first);
  if constexpr (How == Two::kInTurn) {
#pragma unroll
    for (int i = 0; i < 32; ++i) first[i / 4][i % 4] = -first[i / 4][i % 4];
    ptx::begin_products();
    multiply(first, in[1]);
    ptx::commit_products();
    ptx::wait_products<0>();
    ptx::settle(first);
  }
  put_sums(first, out);
}

}  // namespace body

// ---- tensors and boxes ----

constexpr TensorShape kHalves = {TensorShape::kHalf, 2, {72, 40}, {2, 160}, {64, 24}, true};
constexpr TensorShape kBytes = {TensorShape::kByte, 2, {200, 40}, {1, 208}, {128, 24}, true};
constexpr TensorShape kFloats = {TensorShape::kFloat, 2, {40, 40}, {4, 176}, {16, 24}, false};
constexpr TensorShape kFive = {TensorShape::kHalf, 5,   {72, 3, 5, 2, 3}, {2, 160, 480, 2400, 4800},
                               {64, 2, 3, 2, 1},   true};

template <const TensorShape& Shape>
TensorMap of_operands(const uint32_t* in, uint32_t*) {
  return embedding_kernels::tensor_map("conformance", in + kParameters, Shape);
}
template <const TensorShape& Shape>
TensorMap of_results(const uint32_t*, uint32_t* out) {
  return embedding_kernels::tensor_map("conformance", out, Shape);
}
// [90, 3, 72] with gaps: rows of 240 values, heads of 80.
TensorMap ragged(const void* data) { return embedding_kernels::ragged_map("conformance", data, 72, 3, 80, 240, 64); }
TensorMap of_ragged_operands(const uint32_t* in, uint32_t*) { return ragged(in + kParameters); }
TensorMap of_ragged_results(const uint32_t*, uint32_t* out) { return ragged(out); }
TensorMap none(const uint32_t*, uint32_t*) { return {}; }

constexpr int kRaggedWords = 90 * 120;

// ---- the table ----

using Body = void (*)(const uint32_t*, uint32_t*, const TensorMap*);

template <int Threads, Body Try>
__global__ void __launch_bounds__(Threads, 1)
    one_block(const uint32_t* in, uint32_t* out, const __grid_constant__ TensorMap map) {
  Try(in, out, &map);
}

struct Case {
  const char* name;                // the wrapper, and which of several of its name
  int threads, operands, results;  // of a block; words of a thread
  void (*kernel)(const uint32_t*, uint32_t*, TensorMap);
  TensorMap (*map)(const uint32_t*, uint32_t*);
};

// So many words of operands and results in a block.
template <int Threads, Body Try>
constexpr Case block_of(const char* name, int in_words, int out_words,
                        TensorMap (*map)(const uint32_t*, uint32_t*) = none) {
  return {
      name, Threads, (in_words + Threads - 1) / Threads, (out_words + Threads - 1) / Threads, one_block<Threads, Try>,
      map};
}
template <int N, void (*Multiply)(float (&)[N][4], uint64_t, uint64_t, uint32_t)>
constexpr Case tiles(const char* name) {
  return block_of<128, body::multiply_tiles<64, float, N, Multiply>>(
      name, kParameters + (64 + 8 * N) * 64 + 128 * 4 * N, 128 * 4 * N);
}
template <int N, void (*Multiply)(float (&)[N][4], const uint32_t (&)[4], uint64_t)>
constexpr Case held(const char* name) {
  return block_of<128, body::multiply_held<N, Multiply>>(name, kParameters + 64 * 4 * N + 128 * 4 + 128 * 4 * N,
                                                         128 * 4 * N);
}
template <body::Two How>
constexpr Case twice(const char* name) {
  return block_of<128, body::multiply_twice<How>>(name, kParameters + 128 * 64 + 128 * 32,
                                                  (How == body::Two::kApart ? 2 : 1) * 128 * 32);
}

const Case kCases[] = {
    block_of<64, body::phases>("begin_barrier", 64, 4 * 64),
    block_of<64, body::phases>("has_passed", 64, 4 * 64),
    block_of<64, body::arrive_at>("arrive_at", 64, 64),
    block_of<128, body::load2<768>>("publish_barriers", kParameters + 1600, 768, of_operands<kHalves>),
    block_of<128, body::load2<768>>("prefetch_map", kParameters + 1600, 768, of_operands<kHalves>),
    block_of<128, body::load2_twice<768>>("arrive_expecting", kParameters + 1600, 2 * 768, of_operands<kHalves>),
    block_of<128, body::load2<768>>("load_box2 halves", kParameters + 1600, 768, of_operands<kHalves>),
    block_of<128, body::load2<768>>("load_box2 bytes", kParameters + 2080, 768, of_operands<kBytes>),
    block_of<128, body::load2<384>>("load_box2 floats", kParameters + 1760, 384, of_operands<kFloats>),
    block_of<128, body::load5<384, body::take_place>>("load_box5", kParameters + 3600, 384, of_operands<kFive>),
    block_of<128, body::load5<2048, body::take_ragged_place>>("load_box5 ragged", kParameters + kRaggedWords, 2048,
                                                              of_ragged_operands),
    block_of<128, body::store5<384, body::take_place>>("store_box5", kParameters + 384, 3600, of_results<kFive>),
    block_of<128, body::store5<2048, body::take_ragged_place>>("store_box5 ragged", kParameters + 2048, kRaggedWords,
                                                               of_ragged_results),
    block_of<128, body::store5<384, body::take_place>>("publish_stores", kParameters + 384, 3600, of_results<kFive>),
    block_of<128, body::store5_twice<384>>("commit_stores", kParameters + 768, 3600, of_results<kFive>),
    block_of<128, body::store5_twice<384>>("wait_stores_read", kParameters + 768, 3600, of_results<kFive>),
    block_of<384, body::registers<24, 240>>("keep_registers", 384, 384),
    block_of<384, body::registers<40, 232>>("take_registers", 384, 384),
    twice<body::Two::kInTurn>("begin_products"),
    twice<body::Two::kTogether>("commit_products"),
    twice<body::Two::kApart>("wait_products"),
    tiles<8, ptx::multiply_tiles_bfloat16>("multiply_tiles_bfloat16 64"),
    tiles<16, ptx::multiply_tiles_bfloat16>("multiply_tiles_bfloat16 128"),
    tiles<8, ptx::multiply_tiles_float16>("multiply_tiles_float16 64"),
    tiles<16, ptx::multiply_tiles_float16>("multiply_tiles_float16 128"),
    held<8, ptx::multiply_held_bfloat16>("multiply_held_bfloat16 64"),
    held<12, ptx::multiply_held_bfloat16>("multiply_held_bfloat16 96"),
    held<16, ptx::multiply_held_bfloat16>("multiply_held_bfloat16 128"),
    held<32, ptx::multiply_held_bfloat16>("multiply_held_bfloat16 256"),
    held<8, ptx::multiply_held_float16>("multiply_held_float16 64"),
    held<12, ptx::multiply_held_float16>("multiply_held_float16 96"),
    held<16, ptx::multiply_held_float16>("multiply_held_float16 128"),
    held<32, ptx::multiply_held_float16>("multiply_held_float16 256"),
    block_of<128, body::multiply_tiles<32, uint32_t, 32, ptx::count_common_bits>>(
        "count_common_bits", kParameters + (64 + 256) * 32 + 128 * 128, 128 * 128),
};
constexpr int kCount = static_cast<int>(sizeof kCases / sizeof kCases[0]);

}  // namespace

EXPORT int conformance_count() { return kCount; }

// Name of a case, and three numbers: threads of a block, words of operands and of results of a thread.
EXPORT const char* conformance_case(int number, int* numbers) {
  const Case& c = kCases[number];
  numbers[0] = c.threads;
  numbers[1] = c.operands;
  numbers[2] = c.results;
  return c.name;
}

// in [blocks, threads, operands] to out [blocks, threads, results]; an empty text, or what went wrong.
EXPORT const char* conformance_run(int number, const uint32_t* in, uint32_t* out, int blocks) {
  const Case& c = kCases[number];
  const auto in_words = static_cast<size_t>(c.threads * c.operands);
  const auto out_words = static_cast<size_t>(c.threads * c.results);
  const auto count = static_cast<size_t>(blocks);
  return conformance::run({c.name, in, count * in_words, out, count * out_words},
                          [&](const uint32_t* from, uint32_t* to) {
                            for (size_t block = 0; block < count; ++block) {
                              const uint32_t* const block_in = from + block * in_words;
                              uint32_t* const block_out = to + block * out_words;
                              conformance::start(c.name, c.kernel, 1, c.threads, sizeof(Shared), block_in, block_out,
                                                 c.map(block_in, block_out));
                            }
                          });
}

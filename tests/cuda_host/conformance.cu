// Every wrapper of ptx.cuh on operands from outside, a small kernel each: the same file for nvcc and a GPU, and for g++
// and the emulation. conformance.py draws the operands and compares.
#include "conformance.h"
#include "ptx.cuh"

namespace {

namespace ptx = embedding_kernels::ptx;

constexpr int kMostThreads = 64;

// What a block shares: a place a thread.
struct Shared {
  uint32_t words[kMostThreads][4];
  uint32_t counter;
};

__device__ inline Shared& shared_memory() { return conformance::shared_memory<Shared>(); }

__device__ inline int thread() { return static_cast<int>(threadIdx.x); }
// Another thread, in the other half of the block.
__device__ inline int opposite() { return static_cast<int>(blockDim.x) - 1 - thread(); }

// ---- bodies: operands and results of this thread; named as the wrapper that they try ----

namespace body {

__device__ inline void sync_block(const uint32_t* in, uint32_t* out) {
  Shared& shared = shared_memory();
  shared.words[thread()][0] = in[0];
  ptx::sync_block();
  out[0] = shared.words[opposite()][0];
}
__device__ inline void sync_threads(const uint32_t* in, uint32_t* out) {
  Shared& shared = shared_memory();
  shared.words[thread()][0] = in[0];
  ptx::sync_threads(3, blockDim.x);
  out[0] = shared.words[opposite()][0];
}
// The second warp does not wait.
__device__ inline void arrive(const uint32_t* in, uint32_t* out) {
  Shared& shared = shared_memory();
  if (thread() < 32) {
    ptx::sync_threads(15, blockDim.x);
    out[0] = shared.words[opposite()][0];
  } else {
    shared.words[thread()][0] = in[0];
    ptx::arrive(15, blockDim.x);
    out[0] = in[0];
  }
}
__device__ inline void sync_warp(const uint32_t* in, uint32_t* out) {
  Shared& shared = shared_memory();
  shared.words[thread()][0] = in[0];
  ptx::sync_warp();
  out[0] = shared.words[opposite()][0];
}

__device__ inline void vote_ballot(const uint32_t* in, uint32_t* out) { out[0] = ptx::vote_ballot((in[0] & 4) != 0); }
__device__ inline void shuffle(const uint32_t* in, uint32_t* out) { out[0] = ptx::shuffle(in[0], in[1]); }
__device__ inline void shuffle_float(const uint32_t* in, uint32_t* out) {
  out[0] = ptx::bits_of(ptx::shuffle(ptx::float_of(in[0]), in[1]));
}
__device__ inline void shuffle_xor(const uint32_t* in, uint32_t* out) { out[0] = ptx::shuffle_xor(in[0], in[1]); }
__device__ inline void shuffle_xor_float(const uint32_t* in, uint32_t* out) {
  out[0] = ptx::bits_of(ptx::shuffle_xor(ptx::float_of(in[0]), in[1]));
}
__device__ inline void shuffle_up(const uint32_t* in, uint32_t* out) { out[0] = ptx::shuffle_up(in[0], in[1]); }
__device__ inline void warp_add(const uint32_t* in, uint32_t* out) { out[0] = ptx::warp_add(in[0]); }
__device__ inline void warp_min(const uint32_t* in, uint32_t* out) { out[0] = ptx::warp_min(in[0]); }

__device__ inline void reverse_bits(const uint32_t* in, uint32_t* out) { out[0] = ptx::reverse_bits(in[0]); }
__device__ inline void count_bits(const uint32_t* in, uint32_t* out) { out[0] = ptx::count_bits(in[0]); }
__device__ inline void highest_bit(const uint32_t* in, uint32_t* out) { out[0] = ptx::highest_bit(in[0]); }
__device__ inline void dot_bytes(const uint32_t* in, uint32_t* out) {
  out[0] = static_cast<uint32_t>(ptx::dot_bytes(in[0], in[1], static_cast<int32_t>(in[2])));
}
// To a float and, changed as only a float is, back.
__device__ inline void bits_of(const uint32_t* in, uint32_t* out) { out[0] = ptx::bits_of(-ptx::float_of(in[0])); }
__device__ inline void float_of(const uint32_t* in, uint32_t* out) {
  *reinterpret_cast<float*>(out) = ptx::float_of(in[0]);
}

__device__ inline void exp2_near(const uint32_t* in, uint32_t* out) {
  out[0] = ptx::bits_of(ptx::exp2_near(ptx::float_of(in[0])));
}
__device__ inline void log2_near(const uint32_t* in, uint32_t* out) {
  out[0] = ptx::bits_of(ptx::log2_near(ptx::float_of(in[0])));
}
__device__ inline void reciprocal_near(const uint32_t* in, uint32_t* out) {
  out[0] = ptx::bits_of(ptx::reciprocal_near(ptx::float_of(in[0])));
}
__device__ inline void tanh_near(const uint32_t* in, uint32_t* out) {
  out[0] = ptx::bits_of(ptx::tanh_near(ptx::float_of(in[0])));
}
__device__ inline void fused_multiply_add(const uint32_t* in, uint32_t* out) {
  out[0] = ptx::bits_of(ptx::fused_multiply_add(ptx::float_of(in[0]), ptx::float_of(in[1]), ptx::float_of(in[2])));
}

__device__ inline void pack_bfloat16(const uint32_t* in, uint32_t* out) {
  out[0] = ptx::pack_bfloat16(ptx::float_of(in[0]), ptx::float_of(in[1]));
}
__device__ inline void pack_float16(const uint32_t* in, uint32_t* out) {
  out[0] = ptx::pack_float16(ptx::float_of(in[0]), ptx::float_of(in[1]));
}
__device__ inline void round_bfloat16(const uint32_t* in, uint32_t* out) {
  out[0] = ptx::round_bfloat16(ptx::float_of(in[0]));
}
__device__ inline void round_float16(const uint32_t* in, uint32_t* out) {
  out[0] = ptx::round_float16(ptx::float_of(in[0]));
}
__device__ inline void widen_float16(const uint32_t* in, uint32_t* out) {
  out[0] = ptx::bits_of(ptx::widen_float16(static_cast<uint16_t>(in[0])));
}

__device__ inline void put(const ptx::Words4& words, uint32_t* out) {
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = words.word[i];
}
__device__ inline void load_words4(const uint32_t* in, uint32_t* out) { put(ptx::load_words4(in), out); }
__device__ inline void load_constant_words4(const uint32_t* in, uint32_t* out) {
  put(ptx::load_constant_words4(in), out);
}
__device__ inline void store_words4(const uint32_t* in, uint32_t* out) {
  ptx::store_words4(out, {{in[0], in[1], in[2], in[3]}});
}
// Where shared memory begins is the machine's own affair.
__device__ inline void shared_address(const uint32_t* in, uint32_t* out) {
  Shared& shared = shared_memory();
  out[0] = ptx::shared_address(&shared.words[in[0] % 32][in[1] % 4]) - ptx::shared_address(&shared.words[0][0]);
}
__device__ inline void load_shared_words4(const uint32_t* in, uint32_t* out) {
  Shared& shared = shared_memory();
#pragma unroll
  for (int i = 0; i < 4; ++i) shared.words[thread()][i] = in[i];
  ptx::sync_warp();
  put(ptx::load_shared_words4(ptx::shared_address(&shared.words[opposite()])), out);
}
__device__ inline void store_shared_words4(const uint32_t* in, uint32_t* out) {
  Shared& shared = shared_memory();
  ptx::store_shared_words4(ptx::shared_address(&shared.words[thread()]), {{in[0], in[1], in[2], in[3]}});
  ptx::sync_warp();
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = shared.words[opposite()][i];
}

// A place of each thread's own, whose values before and after tell all; one of all threads, which ends with their sum
// in the first thread's results.
__device__ inline void add_global(const uint32_t* in, uint32_t* out) {
  out[1] = in[0];
  out[2] = 0;
  ptx::sync_warp();
  out[0] = ptx::add_global(&out[1], in[1]);
  ptx::add_global(out - 3 * thread() + 2, in[1]);
}
__device__ inline void add_global_wide(const uint32_t* in, uint32_t* out) {
  auto* wide = reinterpret_cast<uint64_t*>(out);
  wide[1] = uint64_t{in[1]} << 32 | in[0];
  wide[2] = 0;
  ptx::sync_warp();
  const uint64_t value = uint64_t{in[3]} << 32 | in[2];
  wide[0] = ptx::add_global(&wide[1], value);
  ptx::add_global(wide - 3 * thread() + 2, value);
}
__device__ inline void add_shared(const uint32_t* in, uint32_t* out) {
  Shared& shared = shared_memory();
  shared.words[thread()][0] = in[0];
  if (thread() == 0) shared.counter = 0;
  ptx::sync_warp();
  out[0] = ptx::add_shared(ptx::shared_address(&shared.words[thread()]), in[1]);
  ptx::add_shared(ptx::shared_address(&shared.counter), in[1]);
  ptx::sync_warp();
  out[1] = shared.words[thread()][0];
  out[2] = shared.counter;
}

// A copy of as many of 16 (4) bytes as the last operand says.
__device__ inline void copy16_async(const uint32_t* in, uint32_t* out) {
  Shared& shared = shared_memory();
  ptx::copy16_async(ptx::shared_address(&shared.words[thread()]), in, in[4] % 17);
  ptx::commit_copies();
  ptx::wait_copies<0>();
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = shared.words[thread()][i];
}
__device__ inline void copy4_async(const uint32_t* in, uint32_t* out) {
  Shared& shared = shared_memory();
  ptx::copy4_async(ptx::shared_address(&shared.words[thread()]), in, in[1] % 5);
  ptx::commit_copies();
  ptx::wait_copies<0>();
  out[0] = shared.words[thread()][0];
}
// A group a word; each is read by another thread as soon as it is the oldest that must have landed.
template <int Groups>
__device__ inline void in_groups(const uint32_t* in, uint32_t* out) {
  static_assert(Groups == 2 || Groups == 3);
  Shared& shared = shared_memory();
#pragma unroll
  for (int i = 0; i < Groups; ++i) {
    ptx::copy4_async(ptx::shared_address(&shared.words[thread()][i]), in + i);
    ptx::commit_copies();
  }
  ptx::wait_copies<Groups - 1>();
  ptx::sync_warp();
  out[0] = shared.words[opposite()][0];
  ptx::wait_copies<Groups - 2>();
  ptx::sync_warp();
  out[1] = shared.words[opposite()][1];
  ptx::wait_copies<0>();
  ptx::sync_warp();
  out[2] = Groups == 3 ? shared.words[opposite()][2] : in[2];
}

// Each thread's four operands are a row, at a place that is not in the order of threads.
__device__ inline uint32_t place_row(const uint32_t* in) {
  uint32_t (&row)[4] = shared_memory().words[(5 * thread() + 3) % 32];
#pragma unroll
  for (int i = 0; i < 4; ++i) row[i] = in[i];
  ptx::sync_warp();
  return ptx::shared_address(&row);
}
__device__ inline void load_matrices4(const uint32_t* in, uint32_t* out) {
  uint32_t m[4];
  ptx::load_matrices4(place_row(in), m);
  put({{m[0], m[1], m[2], m[3]}}, out);
}
__device__ inline void load_matrices4_transposed(const uint32_t* in, uint32_t* out) {
  uint32_t m[4];
  ptx::load_matrices4_transposed(place_row(in), m);
  put({{m[0], m[1], m[2], m[3]}}, out);
}
__device__ inline void load_matrices2(const uint32_t* in, uint32_t* out) {
  uint32_t m[2];
  ptx::load_matrices2(place_row(in), m);
  out[0] = m[0];
  out[1] = m[1];
}
__device__ inline void load_matrices2_transposed(const uint32_t* in, uint32_t* out) {
  uint32_t m[2];
  ptx::load_matrices2_transposed(place_row(in), m);
  out[0] = m[0];
  out[1] = m[1];
}

__device__ inline void take(float& value, uint32_t word) { value = ptx::float_of(word); }
__device__ inline void take(uint32_t& value, uint32_t word) { value = word; }
__device__ inline uint32_t word_of(float value) { return ptx::bits_of(value); }
__device__ inline uint32_t word_of(uint32_t value) { return value; }

// Operands: a, b and c as the instruction takes them.
template <class Sum, void (*Multiply)(Sum (&)[4], const uint32_t (&)[4], uint32_t, uint32_t)>
__device__ inline void multiply(const uint32_t* in, uint32_t* out) {
  const uint32_t a[4] = {in[0], in[1], in[2], in[3]};
  Sum c[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) take(c[i], in[6 + i]);
  Multiply(c, a, in[4], in[5]);
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = word_of(c[i]);
}

}  // namespace body

// ---- the table ----

using Body = void (*)(const uint32_t*, uint32_t*);
using Kernel = void (*)(const uint32_t*, uint32_t*);

template <int Operands, int Results, Body Try>
__global__ void each_thread(const uint32_t* in, uint32_t* out) {
  const int64_t place = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  Try(in + place * Operands, out + place * Results);
}

struct Case {
  const char* name;                // the wrapper, and which of several of its name
  int threads, operands, results;  // of a block; words of a thread
  Kernel kernel;
};

template <int Operands, int Results, Body Try>
constexpr Case one_warp(const char* name) {
  return {name, 32, Operands, Results, each_thread<Operands, Results, Try>};
}
template <int Operands, int Results, Body Try>
constexpr Case two_warps(const char* name) {
  return {name, 64, Operands, Results, each_thread<Operands, Results, Try>};
}

const Case kCases[] = {
    two_warps<1, 1, body::sync_block>("sync_block"),
    two_warps<1, 1, body::sync_threads>("sync_threads"),
    two_warps<1, 1, body::arrive>("arrive"),
    one_warp<1, 1, body::sync_warp>("sync_warp"),
    one_warp<1, 1, body::vote_ballot>("vote_ballot"),
    one_warp<2, 1, body::shuffle>("shuffle"),
    one_warp<2, 1, body::shuffle_float>("shuffle float"),
    one_warp<2, 1, body::shuffle_xor>("shuffle_xor"),
    one_warp<2, 1, body::shuffle_xor_float>("shuffle_xor float"),
    one_warp<2, 1, body::shuffle_up>("shuffle_up"),
    one_warp<1, 1, body::warp_add>("warp_add"),
    one_warp<1, 1, body::warp_min>("warp_min"),
    one_warp<1, 1, body::reverse_bits>("reverse_bits"),
    one_warp<1, 1, body::count_bits>("count_bits"),
    one_warp<1, 1, body::highest_bit>("highest_bit"),
    one_warp<3, 1, body::dot_bytes>("dot_bytes"),
    one_warp<1, 1, body::bits_of>("bits_of"),
    one_warp<1, 1, body::float_of>("float_of"),
    one_warp<1, 1, body::exp2_near>("exp2_near"),
    one_warp<1, 1, body::log2_near>("log2_near"),
    one_warp<1, 1, body::reciprocal_near>("reciprocal_near"),
    one_warp<1, 1, body::tanh_near>("tanh_near"),
    one_warp<3, 1, body::fused_multiply_add>("fused_multiply_add"),
    one_warp<2, 1, body::pack_bfloat16>("pack_bfloat16"),
    one_warp<2, 1, body::pack_float16>("pack_float16"),
    one_warp<1, 1, body::round_bfloat16>("round_bfloat16"),
    one_warp<1, 1, body::round_float16>("round_float16"),
    one_warp<1, 1, body::widen_float16>("widen_float16"),
    one_warp<4, 4, body::load_words4>("load_words4"),
    one_warp<4, 4, body::load_constant_words4>("load_constant_words4"),
    one_warp<4, 4, body::store_words4>("store_words4"),
    one_warp<2, 1, body::shared_address>("shared_address"),
    one_warp<4, 4, body::load_shared_words4>("load_shared_words4"),
    one_warp<4, 4, body::store_shared_words4>("store_shared_words4"),
    one_warp<2, 3, body::add_global>("add_global"),
    one_warp<4, 6, body::add_global_wide>("add_global 64"),
    one_warp<2, 3, body::add_shared>("add_shared"),
    one_warp<8, 4, body::copy16_async>("copy16_async"),
    one_warp<2, 1, body::copy4_async>("copy4_async"),
    one_warp<3, 3, body::in_groups<2>>("commit_copies"),
    one_warp<3, 3, body::in_groups<3>>("wait_copies"),
    one_warp<4, 4, body::load_matrices4>("load_matrices4"),
    one_warp<4, 4, body::load_matrices4_transposed>("load_matrices4_transposed"),
    one_warp<4, 2, body::load_matrices2>("load_matrices2"),
    one_warp<4, 2, body::load_matrices2_transposed>("load_matrices2_transposed"),
    one_warp<10, 4, body::multiply<float, ptx::multiply_bfloat16>>("multiply_bfloat16"),
    one_warp<10, 4, body::multiply<float, ptx::multiply_float16>>("multiply_float16"),
    one_warp<10, 4, body::multiply<uint32_t, ptx::multiply_bits>>("multiply_bits"),
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
  const size_t threads = static_cast<size_t>(blocks) * static_cast<size_t>(c.threads);
  const conformance::Work work = {c.name, in, threads * static_cast<size_t>(c.operands), out,
                                  threads * static_cast<size_t>(c.results)};
  return conformance::run(work, [&](const uint32_t* from, uint32_t* to) {
    conformance::start(c.name, c.kernel, blocks, c.threads, sizeof(Shared), from, to);
  });
}

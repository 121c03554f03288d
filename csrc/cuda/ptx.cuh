// The one header through which kernels reach PTX: one wrapper an instruction, and one body a wrapper. nvcc assembles
// the text; the host emulation (tests/cuda_host) parses the same text and obeys it, so that what is proven there is the
// text.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define EK_LIST(...) __VA_ARGS__
// An instruction that is ordered with memory or with other threads, and one that is a function of its operands.
#define EK_PTX(text, outputs, inputs) asm volatile(text : EK_LIST outputs : EK_LIST inputs : "memory")
#define EK_PTX_PURE(text, outputs, inputs) asm(text : EK_LIST outputs : EK_LIST inputs)
#define EK_OUT_U16(x) "=h"(x)
#define EK_OUT_U32(x) "=r"(x)
#define EK_OUT_U64(x) "=l"(x)
#define EK_OUT_F32(x) "=f"(x)
#define EK_CHANGE_U32(x) "+r"(x)
#define EK_CHANGE_F32(x) "+f"(x)
#define EK_IN_U16(x) "h"(x)
#define EK_IN_U32(x) "r"(x)
#define EK_IN_I32(x) "r"(x)
#define EK_IN_U64(x) "l"(x)
#define EK_IN_F32(x) "f"(x)
#define EK_IN_POINTER(x) "l"(x)
#define EK_IN_CONSTANT(x) "n"(x)
#else
#include "emulation.h"
#endif

namespace embedding_kernels::ptx {

// ---- barriers ----

// All threads of the block; orders their memory accesses.
__device__ inline void sync_block() { EK_PTX("bar.sync 0;", (), ()); }

// `threads` threads (a multiple of 32) meet at barrier `name`, 1 to 15; `arrive` counts in without waiting.
__device__ inline void sync_threads(uint32_t name, uint32_t threads) {
  EK_PTX("bar.sync %0, %1;", (), (EK_IN_U32(name), EK_IN_U32(threads)));
}
__device__ inline void arrive(uint32_t name, uint32_t threads) {
  EK_PTX("bar.arrive %0, %1;", (), (EK_IN_U32(name), EK_IN_U32(threads)));
}

// The lanes of `mask`; orders their memory accesses. Shuffles and votes do not.
__device__ inline void sync_warp(uint32_t mask = 0xffffffffu) { EK_PTX("bar.warp.sync %0;", (), (EK_IN_U32(mask))); }

// ---- between the lanes of a warp, all 32 of them ----

// Bit i is the predicate of lane i of this warp.
__device__ inline uint32_t vote_ballot(bool predicate) {
  uint32_t lanes;
  EK_PTX("{ .reg .pred p; setp.ne.u32 p, %1, 0; vote.sync.ballot.b32 %0, p, 0xffffffff; }", (EK_OUT_U32(lanes)),
         (EK_IN_U32(static_cast<uint32_t>(predicate))));
  return lanes;
}

__device__ inline uint32_t shuffle(uint32_t value, uint32_t lane) {
  uint32_t got;
  EK_PTX("shfl.sync.idx.b32 %0, %1, %2, 0x1f, 0xffffffff;", (EK_OUT_U32(got)), (EK_IN_U32(value), EK_IN_U32(lane)));
  return got;
}
__device__ inline float shuffle(float value, uint32_t lane) {
  float got;
  EK_PTX("shfl.sync.idx.b32 %0, %1, %2, 0x1f, 0xffffffff;", (EK_OUT_F32(got)), (EK_IN_F32(value), EK_IN_U32(lane)));
  return got;
}

__device__ inline uint32_t shuffle_xor(uint32_t value, uint32_t lanes) {
  uint32_t got;
  EK_PTX("shfl.sync.bfly.b32 %0, %1, %2, 0x1f, 0xffffffff;", (EK_OUT_U32(got)), (EK_IN_U32(value), EK_IN_U32(lanes)));
  return got;
}
__device__ inline float shuffle_xor(float value, uint32_t lanes) {
  float got;
  EK_PTX("shfl.sync.bfly.b32 %0, %1, %2, 0x1f, 0xffffffff;", (EK_OUT_F32(got)), (EK_IN_F32(value), EK_IN_U32(lanes)));
  return got;
}

// The value of the lane `by` below; lanes under `by` keep their own.
__device__ inline uint32_t shuffle_up(uint32_t value, uint32_t by) {
  uint32_t got;
  EK_PTX("shfl.sync.up.b32 %0, %1, %2, 0x0, 0xffffffff;", (EK_OUT_U32(got)), (EK_IN_U32(value), EK_IN_U32(by)));
  return got;
}

__device__ inline uint32_t warp_add(uint32_t value) {
  uint32_t sum;
  EK_PTX("redux.sync.add.u32 %0, %1, 0xffffffff;", (EK_OUT_U32(sum)), (EK_IN_U32(value)));
  return sum;
}
__device__ inline uint32_t warp_min(uint32_t value) {
  uint32_t least;
  EK_PTX("redux.sync.min.u32 %0, %1, 0xffffffff;", (EK_OUT_U32(least)), (EK_IN_U32(value)));
  return least;
}

// ---- bits ----

__device__ inline uint32_t reverse_bits(uint32_t word) {
  uint32_t reversed;
  EK_PTX_PURE("brev.b32 %0, %1;", (EK_OUT_U32(reversed)), (EK_IN_U32(word)));
  return reversed;
}
__device__ inline uint32_t count_bits(uint32_t word) {
  uint32_t count;
  EK_PTX_PURE("popc.b32 %0, %1;", (EK_OUT_U32(count)), (EK_IN_U32(word)));
  return count;
}
// Place of the highest bit that is set, 0xffffffff for none.
__device__ inline uint32_t highest_bit(uint32_t word) {
  uint32_t place;
  EK_PTX_PURE("bfind.u32 %0, %1;", (EK_OUT_U32(place)), (EK_IN_U32(word)));
  return place;
}
// `sum` plus the four products of the signed bytes of a and b.
__device__ inline int32_t dot_bytes(uint32_t a, uint32_t b, int32_t sum) {
  uint32_t total;
  EK_PTX_PURE("dp4a.s32.s32 %0, %1, %2, %3;", (EK_OUT_U32(total)),
              (EK_IN_U32(a), EK_IN_U32(b), EK_IN_U32(static_cast<uint32_t>(sum))));
  return static_cast<int32_t>(total);
}
__device__ inline uint32_t bits_of(float value) {
  uint32_t bits;
  EK_PTX_PURE("mov.b32 %0, %1;", (EK_OUT_U32(bits)), (EK_IN_F32(value)));
  return bits;
}
__device__ inline float float_of(uint32_t bits) {
  float value;
  EK_PTX_PURE("mov.b32 %0, %1;", (EK_OUT_F32(value)), (EK_IN_U32(bits)));
  return value;
}

// ---- arithmetic ----

// 2^x to two units in the last place; exp2(-inf) is 0. Results below the normal numbers are 0.
__device__ inline float exp2_near(float x) {
  float y;
  EK_PTX_PURE("ex2.approx.ftz.f32 %0, %1;", (EK_OUT_F32(y)), (EK_IN_F32(x)));
  return y;
}
__device__ inline float log2_near(float x) {
  float y;
  EK_PTX_PURE("lg2.approx.f32 %0, %1;", (EK_OUT_F32(y)), (EK_IN_F32(x)));
  return y;
}
// 1 / x to one unit in the last place; of numbers below the normal ones, an infinity.
__device__ inline float reciprocal_near(float x) {
  float y;
  EK_PTX_PURE("rcp.approx.ftz.f32 %0, %1;", (EK_OUT_F32(y)), (EK_IN_F32(x)));
  return y;
}
// tanh(x) to 2^-11: for what is rounded to bfloat16 or float16 anyway.
__device__ inline float tanh_near(float x) {
  float y;
  EK_PTX_PURE("tanh.approx.f32 %0, %1;", (EK_OUT_F32(y)), (EK_IN_F32(x)));
  return y;
}
__device__ inline float fused_multiply_add(float a, float b, float c) {
  float y;
  EK_PTX_PURE("fma.rn.f32 %0, %1, %2, %3;", (EK_OUT_F32(y)), (EK_IN_F32(a), EK_IN_F32(b), EK_IN_F32(c)));
  return y;
}

// To nearest even; `high` goes to the upper half of the word.
__device__ inline uint32_t pack_bfloat16(float low, float high) {
  uint32_t pair;
  EK_PTX_PURE("cvt.rn.bf16x2.f32 %0, %1, %2;", (EK_OUT_U32(pair)), (EK_IN_F32(high), EK_IN_F32(low)));
  return pair;
}
__device__ inline uint32_t pack_float16(float low, float high) {
  uint32_t pair;
  EK_PTX_PURE("cvt.rn.f16x2.f32 %0, %1, %2;", (EK_OUT_U32(pair)), (EK_IN_F32(high), EK_IN_F32(low)));
  return pair;
}
__device__ inline uint16_t round_bfloat16(float value) {
  uint16_t bits;
  EK_PTX_PURE("cvt.rn.bf16.f32 %0, %1;", (EK_OUT_U16(bits)), (EK_IN_F32(value)));
  return bits;
}
__device__ inline uint16_t round_float16(float value) {
  uint16_t bits;
  EK_PTX_PURE("cvt.rn.f16.f32 %0, %1;", (EK_OUT_U16(bits)), (EK_IN_F32(value)));
  return bits;
}
__device__ inline float widen_float16(uint16_t bits) {
  float value;
  EK_PTX_PURE("cvt.f32.f16 %0, %1;", (EK_OUT_F32(value)), (EK_IN_U16(bits)));
  return value;
}

// ---- memory, 16 bytes at a time; addresses are multiples of 16 ----

struct Words4 {
  uint32_t word[4];
};
__device__ inline Words4 load_words4(const void* from) {
  Words4 w;
  EK_PTX("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];",
         (EK_OUT_U32(w.word[0]), EK_OUT_U32(w.word[1]), EK_OUT_U32(w.word[2]), EK_OUT_U32(w.word[3])),
         (EK_IN_POINTER(from)));
  return w;
}
// What no thread writes while the kernel runs may come by the read-only path.
__device__ inline Words4 load_constant_words4(const void* from) {
  Words4 w;
  EK_PTX_PURE("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];",
              (EK_OUT_U32(w.word[0]), EK_OUT_U32(w.word[1]), EK_OUT_U32(w.word[2]), EK_OUT_U32(w.word[3])),
              (EK_IN_POINTER(from)));
  return w;
}
__device__ inline void store_words4(void* to, const Words4& w) {
  EK_PTX("st.global.v4.b32 [%0], {%1, %2, %3, %4};", (),
         (EK_IN_POINTER(to), EK_IN_U32(w.word[0]), EK_IN_U32(w.word[1]), EK_IN_U32(w.word[2]), EK_IN_U32(w.word[3])));
}

// The address of a place in shared memory, as instructions on shared memory want it.
__device__ inline uint32_t shared_address(const void* place) {
  uint32_t address;
  EK_PTX_PURE("{ .reg .u64 t; cvta.to.shared.u64 t, %1; cvt.u32.u64 %0, t; }", (EK_OUT_U32(address)),
              (EK_IN_POINTER(place)));
  return address;
}
__device__ inline Words4 load_shared_words4(uint32_t from) {
  Words4 w;
  EK_PTX("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];",
         (EK_OUT_U32(w.word[0]), EK_OUT_U32(w.word[1]), EK_OUT_U32(w.word[2]), EK_OUT_U32(w.word[3])),
         (EK_IN_U32(from)));
  return w;
}
__device__ inline void store_shared_words4(uint32_t to, const Words4& w) {
  EK_PTX("st.shared.v4.b32 [%0], {%1, %2, %3, %4};", (),
         (EK_IN_U32(to), EK_IN_U32(w.word[0]), EK_IN_U32(w.word[1]), EK_IN_U32(w.word[2]), EK_IN_U32(w.word[3])));
}

// ---- atomics: the value before; they order nothing else ----

__device__ inline uint32_t add_global(uint32_t* to, uint32_t value) {
  uint32_t before;
  EK_PTX("atom.global.add.u32 %0, [%1], %2;", (EK_OUT_U32(before)), (EK_IN_POINTER(to), EK_IN_U32(value)));
  return before;
}
__device__ inline uint64_t add_global(uint64_t* to, uint64_t value) {
  uint64_t before;
  EK_PTX("atom.global.add.u64 %0, [%1], %2;", (EK_OUT_U64(before)), (EK_IN_POINTER(to), EK_IN_U64(value)));
  return before;
}
__device__ inline uint32_t add_shared(uint32_t to, uint32_t value) {
  uint32_t before;
  EK_PTX("atom.shared.add.u32 %0, [%1], %2;", (EK_OUT_U32(before)), (EK_IN_U32(to), EK_IN_U32(value)));
  return before;
}

// ---- asynchronous copies from global to shared memory ----

// 16 bytes past the first cache, of which `bytes` are read and the rest are zeros. At 0 `from` need not be readable,
// but be a multiple of 16 all the same.
__device__ inline void copy16_async(uint32_t to, const void* from, uint32_t bytes = 16) {
  EK_PTX("cp.async.cg.shared.global [%0], [%1], 16, %2;", (), (EK_IN_U32(to), EK_IN_POINTER(from), EK_IN_U32(bytes)));
}
__device__ inline void copy4_async(uint32_t to, const void* from, uint32_t bytes = 4) {
  EK_PTX("cp.async.ca.shared.global [%0], [%1], 4, %2;", (), (EK_IN_U32(to), EK_IN_POINTER(from), EK_IN_U32(bytes)));
}
// Closes this thread's group of copies; `wait_copies<N>` waits until at most the last N groups are unfinished. Other
// threads see them after a barrier that follows.
__device__ inline void commit_copies() { EK_PTX("cp.async.commit_group;", (), ()); }
template <int Unfinished>
__device__ inline void wait_copies() {
  EK_PTX("cp.async.wait_group %0;", (), (EK_IN_CONSTANT(Unfinished)));
}

// ---- matrix products of a warp; fragments as the PTX ISA draws them ----

// Four 8 × 8 matrices of 16-bit values; lane 8 i + r holds the address of row r of matrix i. `transposed` hands out
// columns as rows.
__device__ inline void load_matrices4(uint32_t address, uint32_t (&m)[4]) {
  EK_PTX("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];",
         (EK_OUT_U32(m[0]), EK_OUT_U32(m[1]), EK_OUT_U32(m[2]), EK_OUT_U32(m[3])), (EK_IN_U32(address)));
}
__device__ inline void load_matrices4_transposed(uint32_t address, uint32_t (&m)[4]) {
  EK_PTX("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];",
         (EK_OUT_U32(m[0]), EK_OUT_U32(m[1]), EK_OUT_U32(m[2]), EK_OUT_U32(m[3])), (EK_IN_U32(address)));
}
__device__ inline void load_matrices2(uint32_t address, uint32_t (&m)[2]) {
  EK_PTX("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];", (EK_OUT_U32(m[0]), EK_OUT_U32(m[1])),
         (EK_IN_U32(address)));
}
__device__ inline void load_matrices2_transposed(uint32_t address, uint32_t (&m)[2]) {
  EK_PTX("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];", (EK_OUT_U32(m[0]), EK_OUT_U32(m[1])),
         (EK_IN_U32(address)));
}

// c [16 × 8] += a [16 × 16] b [16 × 8], b by columns.
__device__ inline void multiply_bfloat16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  EK_PTX_PURE(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};",
      (EK_CHANGE_F32(c[0]), EK_CHANGE_F32(c[1]), EK_CHANGE_F32(c[2]), EK_CHANGE_F32(c[3])),
      (EK_IN_U32(a[0]), EK_IN_U32(a[1]), EK_IN_U32(a[2]), EK_IN_U32(a[3]), EK_IN_U32(b0), EK_IN_U32(b1)));
}
__device__ inline void multiply_float16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  EK_PTX_PURE(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};",
      (EK_CHANGE_F32(c[0]), EK_CHANGE_F32(c[1]), EK_CHANGE_F32(c[2]), EK_CHANGE_F32(c[3])),
      (EK_IN_U32(a[0]), EK_IN_U32(a[1]), EK_IN_U32(a[2]), EK_IN_U32(a[3]), EK_IN_U32(b0), EK_IN_U32(b1)));
}
// c [16 × 8] += ones of (a [16 × 256] and b [256 × 8]), b by columns: bits.
__device__ inline void multiply_bits(uint32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  EK_PTX_PURE(
      "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, "
      "%1, %2, %3};",
      (EK_CHANGE_U32(c[0]), EK_CHANGE_U32(c[1]), EK_CHANGE_U32(c[2]), EK_CHANGE_U32(c[3])),
      (EK_IN_U32(a[0]), EK_IN_U32(a[1]), EK_IN_U32(a[2]), EK_IN_U32(a[3]), EK_IN_U32(b0), EK_IN_U32(b1)));
}

}  // namespace embedding_kernels::ptx

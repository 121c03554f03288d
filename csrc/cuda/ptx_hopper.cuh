// PTX of Hopper (sm_90a only): barriers in shared memory, copies of boxes by the copy engine, products of warpgroups.
// One wrapper an instruction and one body a wrapper, as in ptx.cuh.
#pragma once

#include "ptx.cuh"
#include "tensor_map.cuh"

#if defined(__CUDACC__)
// Sums of a product that is under way when the statement ends, and a factor that it still reads then.
#define EK_SUM_F32(x) "+f"(x)
#define EK_SUM_U32(x) "+r"(x)
#define EK_HELD_U32(x) "r"(x)
#endif

// Lists of operands: "%0, %1, …" of the text, and the places themselves, of an array [n / 4][4].
#define EK_NUMBERS_32                                                      \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define EK_NUMBERS_48 \
  EK_NUMBERS_32       \
  ", "                \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define EK_NUMBERS_64 \
  EK_NUMBERS_48       \
  ", "                \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define EK_NUMBERS_128                                                                           \
  EK_NUMBERS_64                                                                                  \
  ", "                                                                                           \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define EK_SUMS_F32_4(d, i) EK_SUM_F32(d[i][0]), EK_SUM_F32(d[i][1]), EK_SUM_F32(d[i][2]), EK_SUM_F32(d[i][3])
#define EK_SUMS_F32_16(d, i) \
  EK_SUMS_F32_4(d, i), EK_SUMS_F32_4(d, i + 1), EK_SUMS_F32_4(d, i + 2), EK_SUMS_F32_4(d, i + 3)
#define EK_SUMS_F32_32(d) EK_SUMS_F32_16(d, 0), EK_SUMS_F32_16(d, 4)
#define EK_SUMS_F32_48(d) EK_SUMS_F32_32(d), EK_SUMS_F32_16(d, 8)
#define EK_SUMS_F32_64(d) EK_SUMS_F32_48(d), EK_SUMS_F32_16(d, 12)
#define EK_SUMS_F32_128(d) \
  EK_SUMS_F32_64(d), EK_SUMS_F32_16(d, 16), EK_SUMS_F32_16(d, 20), EK_SUMS_F32_16(d, 24), EK_SUMS_F32_16(d, 28)
#define EK_SUMS_U32_4(d, i) EK_SUM_U32(d[i][0]), EK_SUM_U32(d[i][1]), EK_SUM_U32(d[i][2]), EK_SUM_U32(d[i][3])
#define EK_SUMS_U32_16(d, i) \
  EK_SUMS_U32_4(d, i), EK_SUMS_U32_4(d, i + 1), EK_SUMS_U32_4(d, i + 2), EK_SUMS_U32_4(d, i + 3)
#define EK_SUMS_U32_32(d) EK_SUMS_U32_16(d, 0), EK_SUMS_U32_16(d, 4)
#define EK_SUMS_U32_48(d) EK_SUMS_U32_32(d), EK_SUMS_U32_16(d, 8)
#define EK_SUMS_U32_64(d) EK_SUMS_U32_48(d), EK_SUMS_U32_16(d, 12)
#define EK_SUMS_U32_128(d) \
  EK_SUMS_U32_64(d), EK_SUMS_U32_16(d, 16), EK_SUMS_U32_16(d, 20), EK_SUMS_U32_16(d, 24), EK_SUMS_U32_16(d, 28)
namespace embedding_kernels::ptx {

// ---- barriers in shared memory ----
//
// A phase ends when `count` arrivals have come and as many bytes as were expected; what came before the arrivals is
// seen by those who wait for the phase. Phases alternate in parity, the first is 0.

__device__ inline void begin_barrier(uint32_t barrier, uint32_t count) {
  EK_PTX("mbarrier.init.shared::cta.b64 [%0], %1;", (), (EK_IN_U32(barrier), EK_IN_U32(count)));
}
// Shows the copy engine the barriers that this thread began; the block's threads see them past a barrier of the block.
__device__ inline void publish_barriers() { EK_PTX("fence.mbarrier_init.release.cluster;", (), ()); }
__device__ inline void arrive_at(uint32_t barrier) {
  EK_PTX("mbarrier.arrive.shared::cta.b64 _, [%0];", (), (EK_IN_U32(barrier)));
}
// Arrives, and has the phase wait for `bytes` of copies too.
__device__ inline void arrive_expecting(uint32_t barrier, uint32_t bytes) {
  EK_PTX("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;", (), (EK_IN_U32(barrier), EK_IN_U32(bytes)));
}
// Whether the phase of this parity has ended; may wait a while for it.
__device__ inline bool has_passed(uint32_t barrier, uint32_t parity) {
  uint32_t passed;
  EK_PTX("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }",
         (EK_OUT_U32(passed)), (EK_IN_U32(barrier), EK_IN_U32(parity)));
  return passed != 0;
}

// ---- copies of boxes between global and shared memory ----
//
// The copy engine and the products of warpgroups see ordinary stores to shared memory only past this, by the thread
// that stored, or by one that has met it since.
__device__ inline void publish_stores() { EK_PTX("fence.proxy.async.shared::cta;", (), ()); }

// One thread starts a copy. Coordinates name the first element, the innermost dimension first, in which a box begins at
// a multiple of 16 bytes; what lies outside the tensor is read as zeros. The barrier's phase must expect the bytes of
// the whole box.
__device__ inline void load_box2(uint32_t to, const TensorMap* map, int32_t x0, int32_t x1, uint32_t barrier) {
  EK_PTX("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];", (),
         (EK_IN_U32(to), EK_IN_POINTER(map), EK_IN_I32(x0), EK_IN_I32(x1), EK_IN_U32(barrier)));
}
__device__ inline void load_box5(uint32_t to, const TensorMap* map, const int32_t (&x)[5], uint32_t barrier) {
  EK_PTX(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5, %6}], "
      "[%7];",
      (),
      (EK_IN_U32(to), EK_IN_POINTER(map), EK_IN_I32(x[0]), EK_IN_I32(x[1]), EK_IN_I32(x[2]), EK_IN_I32(x[3]),
       EK_IN_I32(x[4]), EK_IN_U32(barrier)));
}
// What lies outside the tensor is not written.
__device__ inline void store_box5(const TensorMap* map, const int32_t (&x)[5], uint32_t from) {
  EK_PTX("cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%1, %2, %3, %4, %5}], [%6];", (),
         (EK_IN_POINTER(map), EK_IN_I32(x[0]), EK_IN_I32(x[1]), EK_IN_I32(x[2]), EK_IN_I32(x[3]), EK_IN_I32(x[4]),
          EK_IN_U32(from)));
}
// Closes this thread's group of stores; waits until at most the last N groups still read shared memory.
__device__ inline void commit_stores() { EK_PTX("cp.async.bulk.commit_group;", (), ()); }
template <int Unfinished>
__device__ inline void wait_stores_read() {
  EK_PTX("cp.async.bulk.wait_group.read %0;", (), (EK_IN_CONSTANT(Unfinished)));
}
__device__ inline void prefetch_map(const TensorMap* map) {
  EK_PTX("prefetch.tensormap [%0];", (), (EK_IN_POINTER(map)));
}

// ---- registers of a warpgroup ----

template <int Count>
__device__ inline void keep_registers() {
  EK_PTX("setmaxnreg.dec.sync.aligned.u32 %0;", (), (EK_IN_CONSTANT(Count)));
}
template <int Count>
__device__ inline void take_registers() {
  EK_PTX("setmaxnreg.inc.sync.aligned.u32 %0;", (), (EK_IN_CONSTANT(Count)));
}

// ---- products of a warpgroup: four warps, of which the first one's number is a multiple of four ----
//
// begin_products, products, commit_products; wait_products<N> waits until at most the last N commits are unfinished. Up
// to then nobody touches the sums nor the factors. Warp w has rows 16 w to 16 w + 15 of the sums; its fragments are
// those of mma, eight columns an entry.

__device__ inline void begin_products() { EK_PTX("wgmma.fence.sync.aligned;", (), ()); }
__device__ inline void commit_products() { EK_PTX("wgmma.commit_group.sync.aligned;", (), ()); }
template <int Unfinished>
__device__ inline void wait_products() {
  EK_PTX("wgmma.wait_group.sync.aligned %0;", (), (EK_IN_CONSTANT(Unfinished)));
}

// sums [64, N] = or += left [64, 16] right [16, N], both in shared memory by rows of 16-bit values: left's rows, and
// right's columns. `add` 0 sets the sums.
__device__ inline void multiply_tiles_bfloat16(float (&d)[8][4], uint64_t left, uint64_t right, uint32_t add) {
  EK_PTX("{ .reg .pred p; setp.ne.u32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" EK_NUMBERS_32
         "}, %32, %33, p, 1, 1, 0, 0; }",
         (EK_SUMS_F32_32(d)), (EK_IN_U64(left), EK_IN_U64(right), EK_IN_U32(add)));
}
__device__ inline void multiply_tiles_bfloat16(float (&d)[16][4], uint64_t left, uint64_t right, uint32_t add) {
  EK_PTX("{ .reg .pred p; setp.ne.u32 p, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" EK_NUMBERS_64
         "}, %64, %65, p, 1, 1, 0, 0; }",
         (EK_SUMS_F32_64(d)), (EK_IN_U64(left), EK_IN_U64(right), EK_IN_U32(add)));
}
__device__ inline void multiply_tiles_float16(float (&d)[8][4], uint64_t left, uint64_t right, uint32_t add) {
  EK_PTX("{ .reg .pred p; setp.ne.u32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" EK_NUMBERS_32
         "}, %32, %33, p, 1, 1, 0, 0; }",
         (EK_SUMS_F32_32(d)), (EK_IN_U64(left), EK_IN_U64(right), EK_IN_U32(add)));
}
__device__ inline void multiply_tiles_float16(float (&d)[16][4], uint64_t left, uint64_t right, uint32_t add) {
  EK_PTX("{ .reg .pred p; setp.ne.u32 p, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" EK_NUMBERS_64
         "}, %64, %65, p, 1, 1, 0, 0; }",
         (EK_SUMS_F32_64(d)), (EK_IN_U64(left), EK_IN_U64(right), EK_IN_U32(add)));
}
// sums [64, N] += left [64, 16], in registers as mma's, right [16, N] in shared memory by its rows.
__device__ inline void multiply_held_bfloat16(float (&d)[8][4], const uint32_t (&left)[4], uint64_t right) {
  EK_PTX("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" EK_NUMBERS_32
         "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;",
         (EK_SUMS_F32_32(d)),
         (EK_HELD_U32(left[0]), EK_HELD_U32(left[1]), EK_HELD_U32(left[2]), EK_HELD_U32(left[3]), EK_IN_U64(right)));
}
__device__ inline void multiply_held_bfloat16(float (&d)[12][4], const uint32_t (&left)[4], uint64_t right) {
  EK_PTX("wgmma.mma_async.sync.aligned.m64n96k16.f32.bf16.bf16 {" EK_NUMBERS_48
         "}, {%48, %49, %50, %51}, %52, 1, 1, 1, 1;",
         (EK_SUMS_F32_48(d)),
         (EK_HELD_U32(left[0]), EK_HELD_U32(left[1]), EK_HELD_U32(left[2]), EK_HELD_U32(left[3]), EK_IN_U64(right)));
}
__device__ inline void multiply_held_bfloat16(float (&d)[16][4], const uint32_t (&left)[4], uint64_t right) {
  EK_PTX("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" EK_NUMBERS_64
         "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;",
         (EK_SUMS_F32_64(d)),
         (EK_HELD_U32(left[0]), EK_HELD_U32(left[1]), EK_HELD_U32(left[2]), EK_HELD_U32(left[3]), EK_IN_U64(right)));
}
__device__ inline void multiply_held_bfloat16(float (&d)[32][4], const uint32_t (&left)[4], uint64_t right) {
  EK_PTX("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" EK_NUMBERS_128
         "}, {%128, %129, %130, %131}, %132, 1, 1, 1, 1;",
         (EK_SUMS_F32_128(d)),
         (EK_HELD_U32(left[0]), EK_HELD_U32(left[1]), EK_HELD_U32(left[2]), EK_HELD_U32(left[3]), EK_IN_U64(right)));
}
__device__ inline void multiply_held_float16(float (&d)[8][4], const uint32_t (&left)[4], uint64_t right) {
  EK_PTX("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" EK_NUMBERS_32
         "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;",
         (EK_SUMS_F32_32(d)),
         (EK_HELD_U32(left[0]), EK_HELD_U32(left[1]), EK_HELD_U32(left[2]), EK_HELD_U32(left[3]), EK_IN_U64(right)));
}
__device__ inline void multiply_held_float16(float (&d)[12][4], const uint32_t (&left)[4], uint64_t right) {
  EK_PTX("wgmma.mma_async.sync.aligned.m64n96k16.f32.f16.f16 {" EK_NUMBERS_48
         "}, {%48, %49, %50, %51}, %52, 1, 1, 1, 1;",
         (EK_SUMS_F32_48(d)),
         (EK_HELD_U32(left[0]), EK_HELD_U32(left[1]), EK_HELD_U32(left[2]), EK_HELD_U32(left[3]), EK_IN_U64(right)));
}
__device__ inline void multiply_held_float16(float (&d)[16][4], const uint32_t (&left)[4], uint64_t right) {
  EK_PTX("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" EK_NUMBERS_64
         "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;",
         (EK_SUMS_F32_64(d)),
         (EK_HELD_U32(left[0]), EK_HELD_U32(left[1]), EK_HELD_U32(left[2]), EK_HELD_U32(left[3]), EK_IN_U64(right)));
}
__device__ inline void multiply_held_float16(float (&d)[32][4], const uint32_t (&left)[4], uint64_t right) {
  EK_PTX("wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 {" EK_NUMBERS_128
         "}, {%128, %129, %130, %131}, %132, 1, 1, 1, 1;",
         (EK_SUMS_F32_128(d)),
         (EK_HELD_U32(left[0]), EK_HELD_U32(left[1]), EK_HELD_U32(left[2]), EK_HELD_U32(left[3]), EK_IN_U64(right)));
}
// sums [64, 256] = or += ones of (left [64, 256] and right [256, 256]): bits, in shared memory by left's rows and
// right's columns.
__device__ inline void count_common_bits(uint32_t (&d)[32][4], uint64_t left, uint64_t right, uint32_t add) {
  EK_PTX(
      "{ .reg .pred p; setp.ne.u32 p, %130, 0; wgmma.mma_async.sync.aligned.m64n256k256.s32.b1.b1.and.popc "
      "{" EK_NUMBERS_128 "}, %128, %129, p; }",
      (EK_SUMS_U32_128(d)), (EK_IN_U64(left), EK_IN_U64(right), EK_IN_U32(add)));
}

// Keeps the compiler from using sums before the wait that stands above: to it they were ready when they were asked for.
#if defined(__CUDACC__)
__device__ inline void settle(float& sum) { asm volatile("" : "+f"(sum)::"memory"); }
__device__ inline void settle(uint32_t& sum) { asm volatile("" : "+r"(sum)::"memory"); }
template <class Sum, int N>
__device__ inline void settle(Sum (&sums)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) settle(sums[n][i]);
  }
}
#else
inline void settle(uint32_t&) {}
template <class Sum, int N>
inline void settle(Sum (&)[N][4]) {}
#endif

}  // namespace embedding_kernels::ptx

// What g++'s instrumentation calls: every load and store of a .cu file (-fsanitize=thread, linked without its runtime),
// and misaligned accesses and array indices out of range (-fsanitize=alignment,bounds).
#include <cstring>

#include "memory.h"

#define HOOK extern "C" __attribute__((visibility("hidden")))
#define SITE reinterpret_cast<uintptr_t>(__builtin_return_address(0))

namespace {

using emulation::Access;

inline void note(const void* address, size_t bytes, Access kind, uintptr_t site) {
  // host code of the same file is instrumented too
  if (emulation::current_thread != nullptr && !emulation::failing) {
    emulation::access(*emulation::current_thread, reinterpret_cast<uintptr_t>(address), bytes, kind, site);
  }
}

}  // namespace

#define ACCESSES(n)                                                                         \
  HOOK void __tsan_read##n(void* p) { note(p, n, Access::kRead, SITE); }                    \
  HOOK void __tsan_write##n(void* p) { note(p, n, Access::kWrite, SITE); }                  \
  HOOK void __tsan_unaligned_read##n(void* p) { note(p, n, Access::kRead, SITE); }          \
  HOOK void __tsan_unaligned_write##n(void* p) { note(p, n, Access::kWrite, SITE); }        \
  HOOK void __tsan_volatile_read##n(void* p) { note(p, n, Access::kRead, SITE); }           \
  HOOK void __tsan_volatile_write##n(void* p) { note(p, n, Access::kWrite, SITE); }         \
  HOOK void __tsan_unaligned_volatile_read##n(void* p) { note(p, n, Access::kRead, SITE); } \
  HOOK void __tsan_unaligned_volatile_write##n(void* p) { note(p, n, Access::kWrite, SITE); }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)

HOOK void __tsan_read_range(void* p, size_t bytes) { note(p, bytes, Access::kRead, SITE); }
HOOK void __tsan_write_range(void* p, size_t bytes) { note(p, bytes, Access::kWrite, SITE); }
HOOK void __tsan_init() {}
HOOK void __tsan_func_entry(void*) {}
HOOK void __tsan_func_exit() {}
HOOK void __tsan_vptr_update(void**, void*) {}
HOOK void __tsan_vptr_read(void**) {}

// Atomics of host code (reference counts); kernels have none but those of ptx.cuh.
#define ATOMICS(bits, type)                                                                                          \
  HOOK type __tsan_atomic##bits##_load(const volatile type* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); } \
  HOOK void __tsan_atomic##bits##_store(volatile type* p, type v, int) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); } \
  HOOK type __tsan_atomic##bits##_exchange(volatile type* p, type v, int) {                                          \
    return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);                                                              \
  }                                                                                                                  \
  HOOK type __tsan_atomic##bits##_fetch_add(volatile type* p, type v, int) {                                         \
    return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);                                                               \
  }                                                                                                                  \
  HOOK type __tsan_atomic##bits##_fetch_sub(volatile type* p, type v, int) {                                         \
    return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST);                                                               \
  }                                                                                                                  \
  HOOK int __tsan_atomic##bits##_compare_exchange_strong(volatile type* p, type* e, type v, int, int) {              \
    return __atomic_compare_exchange_n(p, e, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                          \
  }                                                                                                                  \
  HOOK int __tsan_atomic##bits##_compare_exchange_weak(volatile type* p, type* e, type v, int, int) {                \
    return __atomic_compare_exchange_n(p, e, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                          \
  }
ATOMICS(8, uint8_t)
ATOMICS(16, uint16_t)
ATOMICS(32, uint32_t)
ATOMICS(64, uint64_t)
HOOK void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
HOOK void __tsan_atomic_signal_fence(int) {}

// The beginning of what the compiler passes; see libsanitizer's ubsan_handlers.h.
struct MismatchData {
  const char* file;
  uint32_t line, column;
  const void* type;
  unsigned char log_alignment, kind;
};
HOOK void __ubsan_handle_type_mismatch_v1(MismatchData* data, uintptr_t address) {
  if (emulation::current_thread == nullptr) return;
  emulation::fail("misaligned: an address that is no multiple of " + std::to_string(1 << data->log_alignment) +
                      " (its remainder is " + std::to_string(address & ((uintptr_t{1} << data->log_alignment) - 1)) +
                      ")",
                  {SITE});
}
HOOK void __ubsan_handle_out_of_bounds(void*, uintptr_t index) {
  if (emulation::current_thread == nullptr) return;
  emulation::fail("index " + std::to_string(static_cast<intptr_t>(index)) + " is outside its array", {SITE});
}

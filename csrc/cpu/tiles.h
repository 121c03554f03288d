// For *_loops.cpp only: the tile unit's state.
#pragma once

#include <cstdint>

#include "level.h"

#if defined(EK_ISA_AMX)

namespace embedding_kernels {
namespace {

// GCC's tile intrinsics do not say which memory they touch: without this, accesses to it may be moved or dropped.
inline void memory_is_used() { __asm__ volatile("" ::: "memory"); }

// Eight tiles of 16 rows of 64 bytes. The unit is to be released at the end of every call into a table of loops.
inline void configure_tiles() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } const configuration;
  __asm__ volatile("" ::"r"(&configuration) : "memory");
  _tile_loadconfig(&configuration);
}

}  // namespace
}  // namespace embedding_kernels

#endif

namespace embedding_kernels {
namespace {

// Before and after a thread's work, at every level.
#if defined(EK_ISA_AMX)
inline void enter_tiles() { configure_tiles(); }
inline void leave_tiles() { _tile_release(); }
#else
inline void enter_tiles() {}
inline void leave_tiles() {}
#endif

}  // namespace
}  // namespace embedding_kernels

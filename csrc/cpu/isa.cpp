#include "isa.h"

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace embedding_kernels {
namespace {

constexpr Isa kLevels[] = {Isa::amx, Isa::avx512, Isa::avx2, Isa::portable};

#if defined(__x86_64__)
// Linux lets a process use the tile unit's state only once it has asked.
bool tiles_available() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  static const bool permitted = __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
                                __builtin_cpu_supports("amx-int8") && __builtin_cpu_supports("gfni") &&
                                syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return permitted;
#else
  return false;
#endif
}
#endif

Isa choose() {
  const char* forced = std::getenv("EMBEDDING_KERNELS_ISA");
  if (forced == nullptr || *forced == '\0') {
    for (Isa level : kLevels) {
      if (isa_available(level)) return level;
    }
  }
  for (Isa level : kLevels) {
    if (std::string(forced) != isa_name(level)) continue;
    if (isa_available(level)) return level;
    throw std::invalid_argument("EMBEDDING_KERNELS_ISA must be a level of this processor and build, got " +
                                std::string(forced));
  }
  throw std::invalid_argument("EMBEDDING_KERNELS_ISA must be portable, avx2, avx512 or amx, got " +
                              std::string(forced));
}

}  // namespace

const char* isa_name(Isa level) {
  switch (level) {
    case Isa::amx:
      return "amx";
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "portable";
  }
}

bool isa_available(Isa level) {
#if defined(__x86_64__)
  switch (level) {
    case Isa::amx:
      return isa_available(Isa::avx512) && tiles_available();
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("avx512bf16");
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
             __builtin_cpu_supports("popcnt");
    default:
      return true;
  }
#else
  return level == Isa::portable;
#endif
}

Isa isa() {
  static const Isa level = choose();
  return level;
}

}  // namespace embedding_kernels

// One line a family: the table of inner loops for the level that isa() chose.
#include "hamming.h"
#include "isa.h"
#include "pooling.h"

namespace embedding_kernels {

#if defined(__x86_64__)
#define EK_DISPATCH(Loops, table) \
  const Loops& table() {          \
    switch (isa()) {              \
      case Isa::avx512:           \
        return table##_avx512;    \
      case Isa::avx2:             \
        return table##_avx2;      \
      default:                    \
        return table##_portable;  \
    }                             \
  }
#else
#define EK_DISPATCH(Loops, table) \
  const Loops& table() { return (void)isa(), table##_portable; }
#endif

EK_DISPATCH(HammingLoops, hamming_loops)
EK_DISPATCH(PoolingLoops, pooling_loops)

}  // namespace embedding_kernels

// One line a family: the table of inner loops for the level that isa() chose.
#include "anchor_scores.h"
#include "attention.h"
#include "hamming.h"
#include "isa.h"
#include "latent_attention.h"
#include "norm.h"
#include "paragraph_vector.h"
#include "pooling.h"
#include "rescore.h"

namespace embedding_kernels {

#if defined(__x86_64__)
// Families whose loops use the tile unit.
#define EK_DISPATCH_AMX(Loops, table) \
  const Loops& table() {              \
    switch (isa()) {                  \
      case Isa::amx:                  \
        return table##_amx;           \
      case Isa::avx512:               \
        return table##_avx512;        \
      case Isa::avx2:                 \
        return table##_avx2;          \
      default:                        \
        return table##_portable;      \
    }                                 \
  }
#define EK_DISPATCH(Loops, table) \
  const Loops& table() {          \
    switch (isa()) {              \
      case Isa::amx:              \
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
#define EK_DISPATCH_AMX EK_DISPATCH
#endif

EK_DISPATCH_AMX(AnchorAttentionLoops, anchor_attention_loops)
EK_DISPATCH(AnchorScoresLoops, anchor_scores_loops)
EK_DISPATCH_AMX(AttentionLoops, attention_loops)
EK_DISPATCH_AMX(AttentionBackwardLoops, attention_backward_loops)
EK_DISPATCH_AMX(HammingLoops, hamming_loops)
EK_DISPATCH(LatentAttentionLoops, latent_attention_loops)
EK_DISPATCH(NormLoops, norm_loops)
EK_DISPATCH(ParagraphVectorLoops, paragraph_vector_loops)
EK_DISPATCH(PoolingLoops, pooling_loops)
EK_DISPATCH(RescoreLoops, rescore_loops)

}  // namespace embedding_kernels

// varlen_attention on Hopper.
#include "attention_hopper.cuh"

namespace embedding_kernels::cuda {}

// Hopper.
#include "launch.cuh"

namespace embedding_kernels::cuda {}

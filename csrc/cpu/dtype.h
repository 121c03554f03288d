// Element types of activations, as the loops' tables are indexed.
#pragma once

#include <cstdint>

namespace embedding_kernels {

enum Dtype { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kDtypes = 3 };

constexpr int64_t dtype_bytes(Dtype dtype) { return dtype == kFloat32 ? 4 : 2; }

}  // namespace embedding_kernels

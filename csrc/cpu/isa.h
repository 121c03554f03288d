// Which instruction set the inner loops use, chosen once.
#pragma once

namespace embedding_kernels {

enum class Isa { portable, avx2, avx512, amx };

// The best level that both the build and the processor have, or the one EMBEDDING_KERNELS_ISA names.
// Throws std::invalid_argument where that one is unknown or not to be had.
Isa isa();

const char* isa_name(Isa level);

// True where this processor can run the level and this library was built with it.
bool isa_available(Isa level);

}  // namespace embedding_kernels

// For *_loops.cpp only: the level that the file is being compiled for (EK_ISA_AMX,
// which has EK_ISA_AVX512 too, EK_ISA_AVX512, EK_ISA_AVX2, or none).
#pragma once

#if defined(EK_ISA_AMX)
#include <immintrin.h>
#define EK_LEVEL_NAME(table) table##_amx
#elif defined(EK_ISA_AVX512)
#include <immintrin.h>
#define EK_LEVEL_NAME(table) table##_avx512
#elif defined(EK_ISA_AVX2)
#include <immintrin.h>
#define EK_LEVEL_NAME(table) table##_avx2
#else
#define EK_LEVEL_NAME(table) table##_portable
#endif

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define TOPKAPI_LEVEL LEVEL_AVX2
#include "kernels.h"

KERNELS(topkapi_avx2, "avx2");
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

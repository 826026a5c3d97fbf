#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avxvnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avxvnni")
#endif
#define TOPKAPI_LEVEL LEVEL_AVX_VNNI
#include "kernels.h"

KERNELS(topkapi_avx_vnni, "avx_vnni");
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#endif
#define TOPKAPI_LEVEL LEVEL_AVX512_VNNI
#include "kernels.h"

KERNELS(topkapi_avx512_vnni, "avx512_vnni");
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

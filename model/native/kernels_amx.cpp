#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,prfchw,amx-tile,amx-int8"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,prfchw,amx-tile,amx-int8")
#endif
#define TOPKAPI_LEVEL LEVEL_AMX
#include "kernels.h"

KERNELS(topkapi_amx, "amx");
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

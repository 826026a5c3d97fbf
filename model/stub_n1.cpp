#include "core.h"
extern "C" const Kernels topkapi_scalar, topkapi_avx2, topkapi_avx_vnni, topkapi_avx512_vnni;
#define S(n) extern "C" const Kernels topkapi_##n = {#n};
S(scalar) S(avx2) S(avx_vnni) S(avx512_vnni)

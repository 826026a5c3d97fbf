#define TOPKAPI_LEVEL LEVEL_SCALAR
#include "kernels.h"

KERNELS(topkapi_scalar, "scalar");

#include "simd_avx512.h"

#define HYBRIDKV_LINEAR_RECORD kLinearAvx512
#include "linear.h"

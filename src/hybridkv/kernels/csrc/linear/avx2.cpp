#include "simd_avx2.h"

#define HYBRIDKV_LINEAR_RECORD kLinearAvx2
#include "linear.h"

#define HYBRIDKV_VNNI
#include "simd_avx2.h"

#define HYBRIDKV_LINEAR_RECORD kLinearAvx2Vnni
#include "linear.h"

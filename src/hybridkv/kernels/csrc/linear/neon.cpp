#include "simd_neon.h"

#define HYBRIDKV_LINEAR_RECORD kLinearNeon
#include "linear.h"

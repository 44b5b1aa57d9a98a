#include "simd_neon.h"

#define HYBRIDKV_LINEAR_RECORD kLinearDotprod
#include "linear.h"

#define HYBRIDKV_DOTPROD  // some compilers offer it to every unit
#include "simd_neon.h"

#define HYBRIDKV_LINEAR_RECORD kLinearDotprod
#include "linear.h"

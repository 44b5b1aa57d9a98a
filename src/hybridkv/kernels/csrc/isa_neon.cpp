#include "simd_neon.h"

#define HYBRIDKV_ISA_RECORD kIsaNeon
#define HYBRIDKV_ISA_NAME "neon"
#define HYBRIDKV_ISA_LINEAR kLinearNeon
#include "isa.h"

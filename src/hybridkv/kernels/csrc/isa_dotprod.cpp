#define HYBRIDKV_DOTPROD  // some compilers offer it to every unit
#include "simd_neon.h"

#define HYBRIDKV_ISA_RECORD kIsaDotprod
#define HYBRIDKV_ISA_NAME "dotprod"
#define HYBRIDKV_ISA_LINEAR kLinearDotprod
#include "isa.h"

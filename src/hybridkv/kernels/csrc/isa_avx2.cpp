#include "simd_avx2.h"

#define HYBRIDKV_ISA_RECORD kIsaAvx2
#define HYBRIDKV_ISA_NAME "avx2"
#define HYBRIDKV_ISA_LINEAR kLinearAvx2
#include "isa.h"

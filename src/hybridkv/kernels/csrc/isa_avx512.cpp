#include "simd_avx512.h"

#define HYBRIDKV_ISA_RECORD kIsaAvx512
#define HYBRIDKV_ISA_NAME "avx512"
#define HYBRIDKV_ISA_LINEAR kLinearAvx512
#include "isa.h"

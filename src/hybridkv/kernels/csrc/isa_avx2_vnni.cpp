#define HYBRIDKV_VNNI
#include "simd_avx2.h"

#define HYBRIDKV_ISA_RECORD kIsaAvx2Vnni
#define HYBRIDKV_ISA_NAME "avx2_vnni"
#define HYBRIDKV_ISA_LINEAR kLinearAvx2Vnni
#include "isa.h"

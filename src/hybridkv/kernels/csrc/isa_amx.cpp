#include "simd_avx512.h"

#define HYBRIDKV_AMX
#define HYBRIDKV_ISA_RECORD kIsaAmx
#define HYBRIDKV_ISA_NAME "amx"
#define HYBRIDKV_ISA_LINEAR kLinearAvx512  // bfloat16 tiles would round weights to eight bits
#include "isa.h"

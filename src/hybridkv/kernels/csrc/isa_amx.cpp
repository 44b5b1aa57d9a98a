#include "simd_avx512.h"

#define HYBRIDKV_AMX
#define HYBRIDKV_ISA_RECORD kIsaAmx
#define HYBRIDKV_ISA_NAME "amx"
#include "isa.h"

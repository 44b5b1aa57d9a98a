#include "simd_portable.h"

#define HYBRIDKV_ISA_RECORD kIsaPortable
#define HYBRIDKV_ISA_NAME "portable"
#include "isa.h"

#include "simd_portable.h"

#define HYBRIDKV_ISA_RECORD kIsaPortable
#define HYBRIDKV_ISA_NAME "portable"
#define HYBRIDKV_ISA_LINEAR kLinearPortable
#include "isa.h"

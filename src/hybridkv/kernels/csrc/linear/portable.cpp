#include "simd_portable.h"

#define HYBRIDKV_LINEAR_RECORD kLinearPortable
#include "linear.h"

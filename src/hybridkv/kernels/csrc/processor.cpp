#include "processor.h"

#if defined(HYBRIDKV_X86)
#include <cpuid.h>
#endif
#include "system.h"

namespace hybridkv {
namespace {

#if defined(HYBRIDKV_X86)
bool runs_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // F16C came before both
}
#endif

#if defined(HYBRIDKV_HAS_AVX2_VNNI)
bool runs_avx2_vnni() {
#if defined(HYBRIDKV_EVEX_VNNI)
    return runs_avx2() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl");
#else
    unsigned a = 0, b = 0, c = 0, d = 0;
    constexpr unsigned kAvxVnni = 1u << 4;
    return runs_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kAvxVnni);
#endif
}
#endif

#if defined(HYBRIDKV_HAS_AVX512)
bool runs_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
}
#endif

#if defined(HYBRIDKV_HAS_AMX)
// The kernel of the operating system hands out tiles on request.
bool runs_amx() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!runs_avx512() || !__builtin_cpu_supports("avx512vbmi") || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    constexpr unsigned kTiles = 1u << 24, kInt8 = 1u << 25, kBf16 = 1u << 22;
    return (d & kTiles) && (d & kInt8) && (d & kBf16) && __builtin_cpu_supports("avx512bf16") &&
           request_tiles();
}
#endif

}  // namespace

// Asking the processor costs microseconds under a hypervisor: once.
const std::vector<const Isa*>& offered() {
    static const std::vector<const Isa*> all = [] {
        std::vector<const Isa*> found;
#if defined(HYBRIDKV_HAS_AMX)
        if (runs_amx()) found.push_back(&kIsaAmx);
#endif
#if defined(HYBRIDKV_HAS_AVX512)
        if (runs_avx512()) found.push_back(&kIsaAvx512);
#endif
#if defined(HYBRIDKV_HAS_AVX2_VNNI)
        if (runs_avx2_vnni()) found.push_back(&kIsaAvx2Vnni);
#endif
#if defined(HYBRIDKV_X86)
        if (runs_avx2()) found.push_back(&kIsaAvx2);
#endif
#if defined(HYBRIDKV_ARM64)
        // NEON, with fused products and float16 in conversions, is a part of every 64-bit ARM.
        if (has_dot_products()) found.push_back(&kIsaDotprod);
        found.push_back(&kIsaNeon);
#endif
        found.push_back(&kIsaPortable);
        return found;
    }();
    return all;
}

}  // namespace hybridkv

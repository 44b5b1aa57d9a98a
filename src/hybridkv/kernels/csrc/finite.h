// Whether floats are finite, by their bits: compilers that assume there is no NaN may drop a comparison.
#pragma once

#include <cstdint>
#include <cstring>

namespace hybridkv {

// Whether none of x[0..n) is a NaN or infinite.
inline bool all_finite(const float* x, int64_t n) {
    constexpr uint32_t kExponent = 0x7f800000u;
    uint32_t found = 0;
    for (int64_t i = 0; i < n; ++i) {
        uint32_t bits;
        std::memcpy(&bits, x + i, 4);
        found |= (bits & kExponent) == kExponent;
    }
    return found == 0;
}

}  // namespace hybridkv

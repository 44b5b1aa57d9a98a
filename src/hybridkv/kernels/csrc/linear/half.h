// float16 and bfloat16 to float32 without SIMD.
#pragma once

#include <cstdint>
#include <cstring>

namespace {
namespace weights {

template <class T>
inline T load_as(const void* p) {
    T value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

inline float float_of_bits(uint32_t bits) { return load_as<float>(&bits); }

inline float half_to_float(uint16_t h) {
    const uint32_t sign = (h & 0x8000u) << 16, body = (h & 0x7fffu) << 13;
    if (body >= 0x0f800000u) return float_of_bits(sign | body | 0x7f800000u);  // infinity or NaN
    const float scaled = float_of_bits(body) * 5.192296858534828e33f;          // 2^112: exact, subnormals included
    return float_of_bits(sign | load_as<uint32_t>(&scaled));
}

inline float bf16_to_float(uint16_t h) { return float_of_bits(static_cast<uint32_t>(h) << 16); }

inline float half_at(const uint8_t* p) { return half_to_float(load_as<uint16_t>(p)); }

}  // namespace weights
}  // namespace

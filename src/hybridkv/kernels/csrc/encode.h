// Storing: rows of floats to the planes of a format, bit for bit what hybridkv/formats computes in torch. Included
// once per instruction set; compiled without contraction, because the order of roundings is the contract.
#pragma once

#include <cmath>

#include "stage.h"

namespace {

inline uint16_t to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return static_cast<uint16_t>((bits >> 16 & 0x8000) | 0x7fc0);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint16_t to_f16(float x) {  // to nearest even; source: the usual magic-number scheme
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
    if (bits >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
    if (bits < 0x38800000) {  // subnormal or zero: let the addition round
        float small;
        std::memcpy(&small, &bits, 4);
        small += 0.5f;
        std::memcpy(&bits, &small, 4);
        return static_cast<uint16_t>(sign | (bits - 0x3f000000));
    }
    bits += 0xc8000fff + (bits >> 13 & 1);
    return static_cast<uint16_t>(sign | bits >> 13);
}

inline void put_f16(uint8_t* p, float x) {
    const uint16_t h = to_f16(x);
    std::memcpy(p, &h, 2);
}

// One row of x as float32, padded to `width` with zeros or, for formats with a minimum, with its last value.
inline void load_row(const EncodeParams& e, int64_t r, int64_t width, float* out) {
    const int64_t t = r % e.n_tokens, bh = r / e.n_tokens;
    const int64_t at = bh / e.n_kv_heads * e.x_stride_b + bh % e.n_kv_heads * e.x_stride_h + t * e.x_stride_t;
    const int64_t dims = e.head_dim;
    if (e.x_type == Code::f32) {
        std::memcpy(out, static_cast<const float*>(e.x) + at, static_cast<size_t>(dims) * sizeof(float));
    } else {
        const uint16_t* x = static_cast<const uint16_t*>(e.x) + at;
        int64_t i = 0;
        for (; i + Simd::lanes <= dims; i += Simd::lanes) {
            e.x_type == Code::f16 ? Simd::from_f16(x + i, out + i) : Simd::from_bf16(x + i, out + i);
        }
        for (; i < dims; ++i) {
            uint16_t lanes[Simd::lanes] = {x[i]};
            float wide[Simd::lanes];
            e.x_type == Code::f16 ? Simd::from_f16(lanes, wide) : Simd::from_bf16(lanes, wide);
            out[i] = wide[0];
        }
    }
    const float fill = e.format->has_min() ? out[dims - 1] : 0.f;
    for (int64_t i = dims; i < width; ++i) out[i] = fill;
}

inline void encode_values(const EncodeParams& e, const float* x, uint8_t* out) {
    const int64_t dims = e.head_dim;
    if (e.format->code == Code::f32) {
        std::memcpy(out, x, static_cast<size_t>(dims) * sizeof(float));
        return;
    }
    for (int64_t i = 0; i < dims; ++i) {
        const uint16_t h = e.format->code == Code::f16 ? to_f16(x[i]) : to_bf16(x[i]);
        std::memcpy(out + 2 * i, &h, 2);
    }
}

void encode(const EncodeParams&, int64_t, int64_t) {}

}  // namespace

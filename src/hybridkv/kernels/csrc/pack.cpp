#include "pack.h"

#include <cmath>
#include <cstring>

namespace hybridkv {
namespace {

template <class T>
T read(const uint8_t* p) {
    T x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

float half_to_float(uint16_t h) {
    const int exponent = h >> 10 & 31, mantissa = h & 1023;
    float x = std::ldexp(static_cast<float>(exponent ? 1024 + mantissa : mantissa), exponent ? exponent - 25 : -24);
    if (exponent == 31) x = mantissa ? NAN : INFINITY;
    return h & 0x8000 ? -x : x;
}

float bf16_to_float(uint16_t h) {
    const uint32_t bits = static_cast<uint32_t>(h) << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

}  // namespace

void unpack_row(const Weight& w, int64_t row, float* out) {
    const uint8_t* panel = w.data + row / kPanel * panel_bytes(w.code, w.n_in);
    const int64_t lane = row % kPanel;
    if (w.code == Code::f32) {
        for (int64_t k = 0; k < w.n_in; ++k) out[k] = read<float>(panel + (k * kPanel + lane) * 4);
        return;
    }
    if (w.code == Code::bf16) {
        for (int64_t k = 0; k < w.n_in; ++k) {
            out[k] = bf16_to_float(read<uint16_t>(panel + k / 2 * kPanel * 4 + lane * 4 + k % 2 * 2));
        }
        return;
    }
    for (int64_t k0 = 0; k0 < w.n_in; k0 += 32) {
        const uint8_t* pair = panel + k0 / 64 * kPairBytes;
        const int64_t block = k0 / 32 % 2;
        const float d = half_to_float(read<uint16_t>(pair + (block * kPanel + lane) * 2));
        const uint8_t* codes = pair + kPairScales + block * kPanel * 32 + lane * 4;
        for (int64_t i = 0; i < 32; ++i) out[k0 + i] = d * static_cast<float>(codes[i / 4 * kPanel * 4 + i % 4] - 128);
    }
}

}  // namespace hybridkv

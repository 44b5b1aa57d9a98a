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

// Whether a number is a float16: from 2^-14 on, 13 bits of its fraction are zeros; below, it is so many times 2^-24.
bool is_half(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (std::fabs(x) >= 0x1p-14f) return (bits & 0x1fff) == 0 && std::fabs(x) <= 65504.f;
    return x * 0x1p24f == static_cast<float>(static_cast<int32_t>(x * 0x1p24f));
}

// Of a number that is one.
uint16_t float_to_half(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000;
    if (std::fabs(x) < 0x1p-14f) return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::fabs(x) * 0x1p24f));
    return static_cast<uint16_t>(sign | ((bits & 0x7fffffff) - (112u << 23)) >> 13);
}

struct Extreme {
    float magnitude;
    bool positive;
    float zeros;  // 1 or -1, the sign of the block's zeros and so of its scale; 0 if it has none
};

Extreme extreme_of(const float* x) {
    float low = 0.f, high = 0.f;
    uint32_t zeros = 0, minus = 0;
    for (int i = 0; i < 32; ++i) {
        uint32_t bits;
        std::memcpy(&bits, x + i, sizeof bits);
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
        zeros |= bits << 1 == 0 ? 1u : 0u;
        minus |= bits == 0x80000000u ? 1u : 0u;
    }
    return {-low > high ? -low : high, high >= -low, zeros ? (minus ? -1.f : 1.f) : 0.f};
}

// Codes of a block for a scale, true if they give every value to the bit. A scale of zero has codes for zeros' signs.
bool codes_of(const float* x, float d, int zero, int8_t* c) {
    const float least = static_cast<float>(-zero), most = static_cast<float>(zero - 1);
    const float inverse = d != 0.f ? 1.f / d : 0.f;
    uint32_t differs = 0;
    for (int i = 0; i < 32; ++i) {
        constexpr float kMagic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
        float q = d != 0.f ? x[i] * inverse : std::signbit(x[i]) ? -1.f : 0.f;
        q = q > least ? (q < most ? q : most) : least;  // a NaN becomes a number, and so differs
        q = (q + kMagic) - kMagic;
        const float value = d * q;
        uint32_t was, is;
        std::memcpy(&was, x + i, sizeof was);
        std::memcpy(&is, &value, sizeof is);
        differs |= was ^ is;
        c[i] = static_cast<int8_t>(q);
    }
    return differs == 0;
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
    const int zero = zero_code(w.code), per_part = 32 / codes_per_byte(w.code), mask = 2 * zero - 1;
    for (int64_t k0 = 0; k0 < w.n_in; k0 += 32) {
        const uint8_t* pair = panel + k0 / 64 * pair_bytes(w.code);
        const int64_t block = k0 / 32 % 2;
        const float d = half_to_float(read<uint16_t>(pair + (block * kPanel + lane) * 2));
        const uint8_t* codes = pair + kPairScales + block * block_bytes(w.code) + lane * 4;
        for (int i = 0; i < 32; ++i) {
            const int byte = codes[i % per_part / 4 * kPanel * 4 + i % 4];
            out[k0 + i] = d * static_cast<float>((byte >> i / per_part * 4 & mask) - zero);
        }
    }
}

// The scale of a block is its largest magnitude over that value's code, which is anything up to `zero`: quantizers that
// search scales leave the largest code unused. Few quotients are float16 numbers, so few candidates are tried in full.
bool exact_codes(Code code, const float* x, int64_t n_in, uint16_t* d, uint8_t* codes) {
    const int zero = zero_code(code);
    int likely = code == Code::nibbles ? 8 : 127;
    for (int64_t k = 0; k < n_in; k += 32, x += 32, ++d, codes += 32 / codes_per_byte(code)) {
        const Extreme top = extreme_of(x);
        int8_t c[32];
        int found = 0;
        for (int i = 0; i <= zero && !found; ++i) {
            const int largest = i == 0 ? likely : zero + 1 - i;  // the last block's first
            const float scale = top.magnitude / static_cast<float>(largest);
            if (!is_half(scale) || scale * static_cast<float>(largest) != top.magnitude) continue;
            // Codes go one further below zero than above.
            const float needed = largest == zero && top.positive ? -1.f : 1.f;
            const float sign = top.magnitude == 0.f ? 1.f : top.zeros != 0.f ? top.zeros : needed;
            if (codes_of(x, std::copysign(scale, sign), zero, c)) {
                *d = float_to_half(std::copysign(scale, sign));
                found = largest;
            }
        }
        if (!found) return false;
        likely = found;
        if (code == Code::bytes) {
            std::memcpy(codes, c, 32);
        } else {
            for (int i = 0; i < 16; ++i) codes[i] = static_cast<uint8_t>((c[i] + zero) | (c[i + 16] + zero) << 4);
        }
    }
    return true;
}

}  // namespace hybridkv

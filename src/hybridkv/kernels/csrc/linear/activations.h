// Activations as products take them. Integers, per row: [unit][256] int16 in the order that the instruction set's
// bring-ups give codes, then [unit] Meta. Floats, per row: the floats and zeros up to a whole unit.
#pragma once

#include <limits>

#include "simd/lanes.h"
#include "types.h"

namespace {
namespace weights {

using hybridkv::Operand;

// What goes with 256 activations: sums of activations per 32 and per 16 inputs, scale included, for minima.
struct Meta {
    float sums[kGroups], half_sums[16];
    float scale, padding[7];
};

constexpr int kUnitBytes = kUnit * 2;
// 32 products with the largest code times scale, 4096, stay below 2^31, and 128 * 127 + 63 is cut into bytes.
constexpr float kLargest = 16319.f;

inline int64_t units_of(int64_t n_in) { return (n_in + kUnit - 1) / kUnit; }

// Not a multiple of a line: rows that are read side by side use other banks, and other sets, of a cache.
template <class Order>
inline int64_t order_stride(int64_t n_in) {
    return units_of(n_in) * (Order::unit_bytes + static_cast<int64_t>(sizeof(Meta))) + 32;
}

inline int64_t floats_stride(int64_t n_in) { return units_of(n_in) * kUnit * 4 + 32; }

// 256 activations, of which `n` are there. A NaN or an infinity among them makes the scale a NaN.
template <class Order>
inline void put_unit(const float* x, int64_t n, uint8_t* codes, Meta& meta) {
    constexpr uint32_t kInfinity = 0x7f800000u;
    float some[kUnit];
    if (n < kUnit) {
        std::memset(some, 0, sizeof some);
        std::memcpy(some, x, static_cast<size_t>(n) * 4);
        x = some;
    }
    uint32_t top = 0;
    for (int i = 0; i < kUnit; ++i) {
        const uint32_t bits = load_as<uint32_t>(x + i) & 0x7fffffffu;
        top = bits > top ? bits : top;
    }
    const float largest = float_of_bits(top);
    meta.scale = largest / kLargest;
    if (largest < 1e-30f) meta.scale = 0.f;  // its inverse may be infinite
    if (top >= kInfinity) meta.scale = std::numeric_limits<float>::quiet_NaN();
    const F inverse = Simd::set1(meta.scale > 0.f ? kLargest / largest : 0.f);
    int32_t c[kUnit] = {};
    if (meta.scale > 0.f) {
        for (int i = 0; i < kUnit; i += L) Simd::storei(c + i, Simd::to_int(Simd::mul(Simd::load(x + i), inverse)));
    }
    float sums[16];  // below 2^24: exact
    for (int g = 0; g < 16; g += L) {
        F each[L];
        for (int i = 0; i < L; ++i) {
            each[i] = Simd::to_float(Simd::loadi(c + 16 * (g + i)));
            for (int k = L; k < 16; k += L) each[i] = Simd::add(each[i], Simd::to_float(Simd::loadi(c + 16 * (g + i) + k)));
        }
        Simd::store(sums + g, Simd::reduce_all(each));
    }
    for (int g = 0; g < 16; ++g) meta.half_sums[g] = sums[g] * meta.scale;
    for (int g = 0; g < kGroups; ++g) meta.sums[g] = (sums[2 * g] + sums[2 * g + 1]) * meta.scale;
    Order::put(c, codes);
    std::memset(meta.padding, 0, sizeof meta.padding);
}

template <class Order>
HYBRIDKV_PHASE void prepare_ints(const float* x, int64_t n_in, uint8_t* out) {
    const int64_t units = units_of(n_in);
    Meta* meta = reinterpret_cast<Meta*>(out + units * Order::unit_bytes);
    for (int64_t u = 0; u < units; ++u) {
        const int64_t left = n_in - u * kUnit;
        put_unit<Order>(x + u * kUnit, left < kUnit ? left : kUnit, out + u * Order::unit_bytes, meta[u]);
    }
}

inline void prepare_floats(const float* x, int64_t n_in, uint8_t* out) {
    std::memcpy(out, x, static_cast<size_t>(n_in) * 4);
    std::memset(out + n_in * 4, 0, static_cast<size_t>(floats_stride(n_in) - n_in * 4));
}

// c = 128 * high + low, and sums of neighbours, for codes that stand above their value: each in the inputs' order.
struct ByteOrder {
    static constexpr int unit_bytes = kUnit * 3, low_at = kUnit, pairs_at = kUnit * 2;

    static void put(const int32_t* c, uint8_t* out) {
        int8_t high[kUnit], low[kUnit];
        int16_t pairs[kUnit / 2];
        for (int i = 0; i < kUnit; ++i) {
            const int32_t h = (c[i] + 64) >> 7;
            high[i] = static_cast<int8_t>(h);
            low[i] = static_cast<int8_t>(c[i] - 128 * h);
        }
        for (int i = 0; i < kUnit / 2; ++i) pairs[i] = static_cast<int16_t>(c[2 * i] + c[2 * i + 1]);
        std::memcpy(out, high, sizeof high);
        std::memcpy(out + low_at, low, sizeof low);
        std::memcpy(out + pairs_at, pairs, sizeof pairs);
    }
};

template <class Order>
inline size_t prepared_bytes(Operand operand, int64_t n_in, int64_t n_rows) {
    const int64_t row = operand == Operand::floats ? floats_stride(n_in)
                        : operand == Operand::ints ? order_stride<Order>(n_in)
                                                   : order_stride<ByteOrder>(n_in);
    return static_cast<size_t>(n_rows * row);
}

template <class Order>
void prepare(Operand operand, const float* x, int64_t x_stride, int64_t n_in, int64_t r0, int64_t r1, void* prepared) {
    const int64_t row = static_cast<int64_t>(prepared_bytes<Order>(operand, n_in, 1));
    for (int64_t r = r0; r < r1; ++r) {
        uint8_t* out = static_cast<uint8_t*>(prepared) + r * row;
        const float* from = x + r * x_stride;
        if (operand == Operand::ints) prepare_ints<Order>(from, n_in, out);
        else if (operand == Operand::bytes) prepare_ints<ByteOrder>(from, n_in, out);
        else prepare_floats(from, n_in, out);
    }
}

}  // namespace weights
}  // namespace

// The weight types of ggml: how a block becomes codes, scales and minima. Portable: decoding, and the products of
// instruction sets without a bring-up of their own, read blocks through this. Layouts: ggml-common.h; gguf-py's
// dequantize is the oracle, to the bit.
#pragma once

#include "grids.h"
#include "half.h"
#include "weight.h"

namespace {
namespace weights {

constexpr int kUnit = 256;   // inputs that are brought up at once
constexpr int kGroup = 32;   // inputs of a float scale
constexpr int kGroups = kUnit / kGroup;

// A unit of a row. Types with integer scales: value = (d * scale) * code - dmin * min, a scale and a minimum per 16
// inputs. Types with float scales: value = group_scale * code + group_min. Past the end of a row all is zero.
struct Unit {
    int16_t code[kUnit];
    float d, dmin;
    int16_t scale[16], min[16];
    float group_scale[kGroups], group_min[kGroups];
};

enum class Scales { ints, floats, none };

constexpr int8_t kIq4nl[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
constexpr int8_t kMxfp4[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// Whether a float16 is neither NaN nor infinite.
inline bool is_number(const uint8_t* half) { return (load_as<uint16_t>(half) & 0x7c00) != 0x7c00; }

// ---- Types with a float scale per 32 values: bring() gives a block's codes, scale and minimum. fine() says
// of every type with scales whether a block's are numbers.

inline void nibbles(const uint8_t* qs, int16_t* code) {
    for (int i = 0; i < 16; ++i) {
        code[i] = qs[i] & 15;
        code[i + 16] = qs[i] >> 4;
    }
}

inline void fifth_bits(uint32_t high, int16_t* code) {
    for (int i = 0; i < 32; ++i) code[i] = static_cast<int16_t>(code[i] | (high >> i & 1) << 4);
}

inline void shift_codes(int16_t* code, int16_t zero) {
    for (int i = 0; i < 32; ++i) code[i] = static_cast<int16_t>(code[i] - zero);
}

inline void look_up(const int8_t* book, int16_t* code) {
    for (int i = 0; i < 32; ++i) code[i] = book[code[i]];
}

struct Q8_0 {
    static constexpr int block = 32, bytes = 34;
    static constexpr Scales scales = Scales::floats;
    static constexpr bool has_min = false;
    static bool fine(const uint8_t* b) { return is_number(b); }
    static void bring(const uint8_t* b, int16_t* code, float& d, float&) {
        d = half_at(b);
        for (int i = 0; i < 32; ++i) code[i] = static_cast<int8_t>(b[2 + i]);
    }
};

struct Q4_0 {
    static constexpr int block = 32, bytes = 18;
    static constexpr Scales scales = Scales::floats;
    static constexpr bool has_min = false;
    static bool fine(const uint8_t* b) { return is_number(b); }
    static void bring(const uint8_t* b, int16_t* code, float& d, float&) {
        d = half_at(b);
        nibbles(b + 2, code);
        shift_codes(code, 8);
    }
};

struct Q4_1 {
    static constexpr int block = 32, bytes = 20;
    static constexpr Scales scales = Scales::floats;
    static constexpr bool has_min = true;
    static bool fine(const uint8_t* b) { return is_number(b) && is_number(b + 2); }
    static void bring(const uint8_t* b, int16_t* code, float& d, float& m) {
        d = half_at(b);
        m = half_at(b + 2);
        nibbles(b + 4, code);
    }
};

struct Q5_0 {
    static constexpr int block = 32, bytes = 22;
    static constexpr Scales scales = Scales::floats;
    static constexpr bool has_min = false;
    static bool fine(const uint8_t* b) { return is_number(b); }
    static void bring(const uint8_t* b, int16_t* code, float& d, float&) {
        d = half_at(b);
        nibbles(b + 6, code);
        fifth_bits(load_as<uint32_t>(b + 2), code);
        shift_codes(code, 16);
    }
};

struct Q5_1 {
    static constexpr int block = 32, bytes = 24;
    static constexpr Scales scales = Scales::floats;
    static constexpr bool has_min = true;
    static bool fine(const uint8_t* b) { return is_number(b) && is_number(b + 2); }
    static void bring(const uint8_t* b, int16_t* code, float& d, float& m) {
        d = half_at(b);
        m = half_at(b + 2);
        nibbles(b + 8, code);
        fifth_bits(load_as<uint32_t>(b + 4), code);
    }
};

struct IQ4_NL {
    static constexpr int block = 32, bytes = 18;
    static constexpr Scales scales = Scales::floats;
    static constexpr bool has_min = false;
    static bool fine(const uint8_t* b) { return is_number(b); }
    static void bring(const uint8_t* b, int16_t* code, float& d, float&) {
        d = half_at(b);
        nibbles(b + 2, code);
        look_up(kIq4nl, code);
    }
};

// 2^(e - 128): codes are doubled
inline float mxfp4_scale(uint8_t e) { return float_of_bits(e < 2 ? 0x00200000u << e : (e - 1u) << 23); }

struct MXFP4 {
    static constexpr int block = 32, bytes = 17;
    static constexpr Scales scales = Scales::floats;
    static constexpr bool has_min = false;
    static bool fine(const uint8_t*) { return true; }
    static void bring(const uint8_t* b, int16_t* code, float& d, float&) {
        d = mxfp4_scale(b[0]);
        nibbles(b + 1, code);
        look_up(kMxfp4, code);
    }
};

// ---- Types of 256 values with integer scales: bring() fills all of a unit but the float scales.

// Some bits of 32 bytes; `times` so much, on top of what is there.
inline void put_bits(const uint8_t* b, int from, int mask, int16_t* code) {
    for (int i = 0; i < kGroup; ++i) code[i] = static_cast<int16_t>(b[i] >> from & mask);
}

inline void add_bits(const uint8_t* b, int from, int mask, int times, int16_t* code) {
    for (int i = 0; i < kGroup; ++i) code[i] = static_cast<int16_t>(code[i] + (b[i] >> from & mask) * times);
}

inline void scales_of_32(const int16_t (&of)[kGroups], int16_t* out) {
    for (int g = 0; g < 16; ++g) out[g] = of[g / 2];
}

// Eight scales and eight minima of 6 bits in 12 bytes.
inline void six_bits(const uint8_t* s, int16_t* scale, int16_t* min) {
    int16_t sc[kGroups], m[kGroups];
    for (int i = 0; i < 4; ++i) {
        sc[i] = s[i] & 63;
        m[i] = s[i + 4] & 63;
        sc[i + 4] = static_cast<int16_t>((s[i + 8] & 15) | (s[i] >> 6) << 4);
        m[i + 4] = static_cast<int16_t>((s[i + 8] >> 4) | (s[i + 4] >> 6) << 4);
    }
    scales_of_32(sc, scale);
    scales_of_32(m, min);
}

struct Q2_K {
    static constexpr int block = 256, bytes = 84;
    static constexpr Scales scales = Scales::ints;
    static constexpr bool has_min = true;
    static constexpr int d_at = 80, dmin_at = 82;
    static bool fine(const uint8_t* b) { return is_number(b + 80) && is_number(b + 82); }
    static void bring(const uint8_t* b, Unit& u) {
        u.d = half_at(b + d_at);
        u.dmin = half_at(b + dmin_at);
        for (int g = 0; g < 16; ++g) {
            u.scale[g] = b[g] & 15;
            u.min[g] = b[g] >> 4;
        }
        for (int g = 0; g < kGroups; ++g) put_bits(b + 16 + g / 4 * 32, g % 4 * 2, 3, u.code + g * kGroup);
    }
};

struct Q3_K {
    static constexpr int block = 256, bytes = 110;
    static constexpr Scales scales = Scales::ints;
    static constexpr bool has_min = false;
    static constexpr int d_at = 108;
    static bool fine(const uint8_t* b) { return is_number(b + 108); }
    static void bring(const uint8_t* b, Unit& u) {
        u.d = half_at(b + d_at);
        const uint8_t* s = b + 96;
        for (int g = 0; g < 16; ++g) {
            const int low = s[g % 8] >> (g / 8 * 4) & 15, high = s[8 + g % 4] >> (g / 4 * 2) & 3;
            u.scale[g] = static_cast<int16_t>((low | high << 4) - 32);
        }
        for (int g = 0; g < kGroups; ++g) {
            put_bits(b + 32 + g / 4 * 32, g % 4 * 2, 3, u.code + g * kGroup);
            add_bits(b, g, 1, 4, u.code + g * kGroup);
            shift_codes(u.code + g * kGroup, 4);
        }
    }
};

struct Q4_K {
    static constexpr int block = 256, bytes = 144;
    static constexpr Scales scales = Scales::ints;
    static constexpr bool has_min = true;
    static constexpr int d_at = 0, dmin_at = 2;
    static bool fine(const uint8_t* b) { return is_number(b) && is_number(b + 2); }
    static void bring(const uint8_t* b, Unit& u) {
        u.d = half_at(b);
        u.dmin = half_at(b + 2);
        six_bits(b + 4, u.scale, u.min);
        for (int g = 0; g < kGroups; ++g) put_bits(b + 16 + g / 2 * 32, g % 2 * 4, 15, u.code + g * kGroup);
    }
};

struct Q5_K {
    static constexpr int block = 256, bytes = 176;
    static constexpr Scales scales = Scales::ints;
    static constexpr bool has_min = true;
    static constexpr int d_at = 0, dmin_at = 2;
    static bool fine(const uint8_t* b) { return is_number(b) && is_number(b + 2); }
    static void bring(const uint8_t* b, Unit& u) {
        u.d = half_at(b);
        u.dmin = half_at(b + 2);
        six_bits(b + 4, u.scale, u.min);
        for (int g = 0; g < kGroups; ++g) {
            put_bits(b + 48 + g / 2 * 32, g % 2 * 4, 15, u.code + g * kGroup);
            add_bits(b + 16, g, 1, 16, u.code + g * kGroup);
        }
    }
};

struct Q6_K {
    static constexpr int block = 256, bytes = 210;
    static constexpr Scales scales = Scales::ints;
    static constexpr bool has_min = false;
    static constexpr int d_at = 208;
    static bool fine(const uint8_t* b) { return is_number(b + 208); }
    static void bring(const uint8_t* b, Unit& u) {
        u.d = half_at(b + d_at);
        for (int g = 0; g < 16; ++g) u.scale[g] = static_cast<int8_t>(b[192 + g]);
        for (int g = 0; g < kGroups; ++g) {
            put_bits(b + g / 4 * 64 + g % 2 * 32, g / 2 % 2 * 4, 15, u.code + g * kGroup);
            add_bits(b + 128 + g / 4 * 32, g % 4 * 2, 3, 16, u.code + g * kGroup);
            shift_codes(u.code + g * kGroup, 32);
        }
    }
};

struct IQ4_XS {
    static constexpr int block = 256, bytes = 136;
    static constexpr Scales scales = Scales::ints;
    static constexpr bool has_min = false;
    static constexpr int d_at = 0;
    static bool fine(const uint8_t* b) { return is_number(b); }
    static void bring(const uint8_t* b, Unit& u) {
        u.d = half_at(b);
        const int high = load_as<uint16_t>(b + 2);
        int16_t s[kGroups];
        for (int g = 0; g < kGroups; ++g) {
            s[g] = static_cast<int16_t>(((b[4 + g / 2] >> (g % 2 * 4) & 15) | (high >> 2 * g & 3) << 4) - 32);
        }
        scales_of_32(s, u.scale);
        for (int g = 0; g < kGroups; ++g) {
            nibbles(b + 8 + 16 * g, u.code + 32 * g);
            look_up(kIq4nl, u.code + 32 * g);
        }
    }
};

// ---- Types with a grid: the same, from values and signs.

template <class T>
struct OfGrid : T {
    static constexpr Scales scales = Scales::ints;
    static constexpr bool has_min = false;
    static bool fine(const uint8_t* b) { return T::d(b) - T::d(b) == 0.f; }
    static void bring(const uint8_t* b, Unit& u) {
        const ScaleBytes s = T::scale_bytes(b);
        u.d = T::d(b);
        for (int i = 0; i < 8; ++i) {
            u.scale[i] = static_cast<int16_t>(s.low >> 8 * i & 255);
            u.scale[i + 8] = static_cast<int16_t>(s.high >> 8 * i & 255);
        }
        for (int g = 0; g < kGroups; ++g) {
            const GridGroup of = T::group(b, g);
            for (int i = 0; i < kGroup; ++i) {
                const int value = static_cast<int>(of.bytes[i / 8] >> (i % 8 * 8) & 255) - T::zero;
                u.code[g * kGroup + i] = static_cast<int16_t>(of.signs >> i & 1 ? -value : value);
            }
        }
    }
};

using IQ2_XXS = OfGrid<IQ2_XXSGrid>;
using IQ2_XS = OfGrid<IQ2_XSGrid>;
using IQ2_S = OfGrid<IQ2_SGrid>;
using IQ3_XXS = OfGrid<IQ3_XXSGrid>;
using IQ3_S = OfGrid<IQ3_SGrid>;
using IQ1_S = OfGrid<IQ1_SGrid>;
using IQ1_M = OfGrid<IQ1_MGrid>;

// ---- Types without scales.

struct F32 {
    static constexpr int block = 1, bytes = 4;
    static constexpr Scales scales = Scales::none;
    static float at(const uint8_t* p) { return load_as<float>(p); }
    static bool fine(const uint8_t* p) { return at(p) - at(p) == 0.f; }
};

struct F16 {
    static constexpr int block = 1, bytes = 2;
    static constexpr Scales scales = Scales::none;
    static float at(const uint8_t* p) { return half_at(p); }
    static bool fine(const uint8_t* p) { return at(p) - at(p) == 0.f; }
};

struct BF16 {
    static constexpr int block = 1, bytes = 2;
    static constexpr Scales scales = Scales::none;
    static float at(const uint8_t* p) { return bf16_to_float(load_as<uint16_t>(p)); }
    static bool fine(const uint8_t* p) { return at(p) - at(p) == 0.f; }
};

// Every type once; X(struct, ggml's name).
#define HYBRIDKV_FLOAT_WEIGHTS(X) X(F32, "f32") X(F16, "f16") X(BF16, "bf16")
#define HYBRIDKV_GROUP_WEIGHTS(X)                                                                              \
    X(Q8_0, "q8_0") X(Q4_0, "q4_0") X(Q4_1, "q4_1") X(Q5_0, "q5_0") X(Q5_1, "q5_1") X(IQ4_NL, "iq4_nl") \
    X(MXFP4, "mxfp4")
#define HYBRIDKV_SCALED_WEIGHTS(X) \
    X(Q2_K, "q2_K") X(Q3_K, "q3_K") X(Q4_K, "q4_K") X(Q5_K, "q5_K") X(Q6_K, "q6_K") X(IQ4_XS, "iq4_xs")
#define HYBRIDKV_WEIGHTS(X) \
    HYBRIDKV_FLOAT_WEIGHTS(X) HYBRIDKV_GROUP_WEIGHTS(X) HYBRIDKV_SCALED_WEIGHTS(X) HYBRIDKV_GRID_WEIGHTS(X)

enum class TypeId : int {
#define HYBRIDKV_ID(T, name) T,
    HYBRIDKV_WEIGHTS(HYBRIDKV_ID)
#undef HYBRIDKV_ID
};

// Unit number `u` of a row of n_in inputs.
template <class T>
inline void bring_unit(const uint8_t* row, int64_t n_in, int64_t u, Unit& out) {
    if constexpr (T::scales == Scales::ints) {
        T::bring(row + u * T::bytes, out);
    } else {
        const int64_t left = n_in / kGroup - u * kGroups;
        const uint8_t* b = row + u * kGroups * T::bytes;
        for (int g = 0; g < kGroups; ++g, b += T::bytes) {
            out.group_scale[g] = out.group_min[g] = 0.f;
            if (g < left) {
                T::bring(b, out.code + g * kGroup, out.group_scale[g], out.group_min[g]);
            } else {
                std::memset(out.code + g * kGroup, 0, kGroup * sizeof(int16_t));
            }
        }
    }
}

}  // namespace weights
}  // namespace

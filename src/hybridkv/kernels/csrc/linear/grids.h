// Types whose codes index groups of values. The tables are gguf-py's: kernels/weights.py hands them over before the first
// use, and nothing of them is written here.
#pragma once

#include <cstdint>

#include "half.h"

namespace hybridkv {

// Bytes of values: magnitudes, those of iq1 as 8 * value + 16.
struct Grids {
    uint64_t iq2_xxs[256], iq2_xs[512], iq2_s[1024], iq1[2048];
    uint32_t iq3_xxs[256], iq3_s[512];
};

extern Grids grids;

}  // namespace hybridkv

namespace {
namespace weights {

using hybridkv::grids;

// 32 values of a block: bytes, and a bit per value that is negative.
struct GridGroup {
    uint64_t bytes[4];
    uint32_t signs;
};

// Seven bits of signs stand for eight whose number is even.
struct EvenSigns {
    uint8_t of[128];

    constexpr EvenSigns() : of() {
        for (int i = 0; i < 128; ++i) {
            int odd = 0;
            for (int bit = 0; bit < 7; ++bit) odd ^= i >> bit & 1;
            of[i] = static_cast<uint8_t>(i | odd << 7);
        }
    }
};
constexpr EvenSigns kEvenSigns;

// Four times seven bits.
inline uint32_t four_signs(uint32_t bits) {
    const uint8_t* of = kEvenSigns.of;
    return of[bits & 127] | static_cast<uint32_t>(of[bits >> 7 & 127]) << 8 |
           static_cast<uint32_t>(of[bits >> 14 & 127]) << 16 | static_cast<uint32_t>(of[bits >> 21 & 127]) << 24;
}

inline uint64_t two_of(const uint32_t* grid, uint32_t first, uint32_t second) {
    return grid[first] | static_cast<uint64_t>(grid[second]) << 32;
}

// Scales count 2s + 1: a byte for each 16 values.
struct ScaleBytes {
    uint64_t low, high;
};

// Eight nibbles to bytes.
inline uint64_t nibbles_to_bytes(uint32_t nibbles) {
    uint64_t x = nibbles;
    x = (x | x << 16) & 0x0000ffff0000ffffu;
    x = (x | x << 8) & 0x00ff00ff00ff00ffu;
    return (x | x << 4) & 0x0f0f0f0f0f0f0f0fu;
}

inline ScaleBytes odd_scales(uint64_t low, uint64_t high) {
    constexpr uint64_t kOnes = 0x0101010101010101u;
    return {low << 1 | kOnes, high << 1 | kOnes};
}

// Sixteen nibbles.
inline ScaleBytes nibble_scales(const uint8_t* s) {
    return odd_scales(nibbles_to_bytes(load_as<uint32_t>(s)), nibbles_to_bytes(load_as<uint32_t>(s + 4)));
}

// Of eight groups of 32: at(g) is a group's.
template <class At>
inline ScaleBytes group_scales(At&& at) {
    uint64_t half[2] = {};
    for (int g = 0; g < 8; ++g) half[g / 4] |= static_cast<uint64_t>(at(g)) * 0x0101 << g % 4 * 16;
    return odd_scales(half[0], half[1]);
}

struct IQ2_XXSGrid {
    static constexpr int block = 256, bytes = 66, zero = 0;
    static float d(const uint8_t* b) { return half_at(b) * 0.125f; }
    static ScaleBytes scale_bytes(const uint8_t* b) {
        return group_scales([&](int g) { return b[2 + 8 * g + 7] >> 4; });
    }
    static GridGroup group(const uint8_t* b, int g) {
        const uint8_t* q = b + 2 + 8 * g;
        const auto& t = grids.iq2_xxs;
        return {{t[q[0]], t[q[1]], t[q[2]], t[q[3]]}, four_signs(load_as<uint32_t>(q + 4))};
    }
};

struct IQ2_XSGrid {
    static constexpr int block = 256, bytes = 74, zero = 0;
    static float d(const uint8_t* b) { return half_at(b) * 0.125f; }
    static ScaleBytes scale_bytes(const uint8_t* b) { return nibble_scales(b + 66); }
    static GridGroup group(const uint8_t* b, int g) {
        GridGroup out{{}, 0};
        for (int k = 0; k < 4; ++k) {
            const uint32_t q = load_as<uint16_t>(b + 2 + 8 * g + 2 * k);
            out.bytes[k] = grids.iq2_xs[q & 511];
            out.signs |= static_cast<uint32_t>(kEvenSigns.of[q >> 9]) << 8 * k;
        }
        return out;
    }
};

struct IQ2_SGrid {
    static constexpr int block = 256, bytes = 82, zero = 0;
    static float d(const uint8_t* b) { return half_at(b) * 0.125f; }
    static ScaleBytes scale_bytes(const uint8_t* b) { return nibble_scales(b + 74); }
    static GridGroup group(const uint8_t* b, int g) {
        GridGroup out{{}, load_as<uint32_t>(b + 34 + 4 * g)};
        const uint32_t high = b[66 + g];
        for (int k = 0; k < 4; ++k) out.bytes[k] = grids.iq2_s[b[2 + 4 * g + k] | (high >> 2 * k & 3) << 8];
        return out;
    }
};

struct IQ3_XXSGrid {
    static constexpr int block = 256, bytes = 98, zero = 0;
    static float d(const uint8_t* b) { return half_at(b) * 0.25f; }
    static ScaleBytes scale_bytes(const uint8_t* b) {
        return group_scales([&](int g) { return b[66 + 4 * g + 3] >> 4; });
    }
    static GridGroup group(const uint8_t* b, int g) {
        const uint8_t* q = b + 2 + 8 * g;
        GridGroup out{{}, four_signs(load_as<uint32_t>(b + 66 + 4 * g))};
        for (int k = 0; k < 4; ++k) out.bytes[k] = two_of(grids.iq3_xxs, q[2 * k], q[2 * k + 1]);
        return out;
    }
};

struct IQ3_SGrid {
    static constexpr int block = 256, bytes = 110, zero = 0;
    static float d(const uint8_t* b) { return half_at(b); }
    static ScaleBytes scale_bytes(const uint8_t* b) {
        return group_scales([&](int g) { return b[106 + g / 2] >> (g % 2 * 4) & 15; });
    }
    static GridGroup group(const uint8_t* b, int g) {
        const uint8_t* q = b + 2 + 8 * g;
        const uint32_t high = b[66 + g];
        GridGroup out{{}, load_as<uint32_t>(b + 74 + 4 * g)};
        for (int k = 0; k < 4; ++k) {
            out.bytes[k] = two_of(grids.iq3_s, q[2 * k] | (high >> 2 * k & 1) << 8,
                                  q[2 * k + 1] | (high >> (2 * k + 1) & 1) << 8);
        }
        return out;
    }
};

// Values of a grid and an eighth more or less: in eighths, bytes of 8 * value + 16 and one more or less.
inline uint64_t with_delta(uint32_t index, uint32_t less) {
    constexpr uint64_t kOnes = 0x0101010101010101u;
    return grids.iq1[index] + kOnes - less * (2 * kOnes);  // no branch: which it is cannot be foreseen
}

struct IQ1_SGrid {
    static constexpr int block = 256, bytes = 50, zero = 16;
    static float d(const uint8_t* b) { return half_at(b) * 0.125f; }
    static ScaleBytes scale_bytes(const uint8_t* b) {
        return group_scales([&](int g) { return b[34 + 2 * g + 1] >> 4 & 7; });
    }
    static GridGroup group(const uint8_t* b, int g) {
        const uint32_t high = load_as<uint16_t>(b + 34 + 2 * g);
        GridGroup out{{}, 0};
        for (int k = 0; k < 4; ++k) {
            out.bytes[k] = with_delta(b[2 + 4 * g + k] | (high >> 3 * k & 7) << 8, high >> 15);
        }
        return out;
    }
};

struct IQ1_MGrid {
    static constexpr int block = 256, bytes = 56, zero = 16;
    static float d(const uint8_t* b) {
        const uint32_t s0 = load_as<uint16_t>(b + 48), s1 = load_as<uint16_t>(b + 50);
        const uint32_t s2 = load_as<uint16_t>(b + 52), s3 = load_as<uint16_t>(b + 54);
        const uint32_t bits = s0 >> 12 | (s1 >> 8 & 0xf0) | (s2 >> 4 & 0xf00) | (s3 & 0xf000);
        return half_to_float(static_cast<uint16_t>(bits)) * 0.125f;
    }
    static ScaleBytes scale_bytes(const uint8_t* b) {
        uint64_t half[2] = {};
        for (int i = 0; i < 16; ++i) {
            const uint64_t scale = load_as<uint16_t>(b + 48 + i / 4 * 2) >> (i % 4 * 3) & 7;
            half[i / 8] |= scale << i % 8 * 8;
        }
        return odd_scales(half[0], half[1]);
    }
    static GridGroup group(const uint8_t* b, int g) {
        GridGroup out{{}, 0};
        for (int k = 0; k < 4; ++k) {
            const uint32_t high = b[32 + 2 * g + k / 2] >> (k % 2 * 4);
            out.bytes[k] = with_delta(b[4 * g + k] | (high & 7) << 8, high >> 3 & 1);
        }
        return out;
    }
};

#define HYBRIDKV_GRID_WEIGHTS(X)                                                                        \
    X(IQ2_XXS, "iq2_xxs") X(IQ2_XS, "iq2_xs") X(IQ2_S, "iq2_s") X(IQ3_XXS, "iq3_xxs") X(IQ3_S, "iq3_s") \
    X(IQ1_S, "iq1_s") X(IQ1_M, "iq1_m")

}  // namespace weights
}  // namespace

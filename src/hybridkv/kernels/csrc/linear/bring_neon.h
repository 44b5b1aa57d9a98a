// Blocks of weights to int8 in NEON registers, two groups of 32 inputs at a time. Activations come as two terms of int8,
// 128 * high + low, so that products are dot products of bytes.
//
// Bring<T>: codes() gives groups 2j and 2j + 1, scales() a scale per group (of types with integer scales: or per 16
// inputs) and min() what is added per group, or per 16 inputs, times sums of activations. Of a type with integer scales:
// d() is the scale of the block. All read whole units: 256 values.
#pragma once

#include "activations.h"

namespace {
namespace weights {

constexpr int kStep = kGroup;
constexpr int kSteps = kUnit / kStep;

// Of 32 inputs the high terms, then the low ones.
struct Order {
    static constexpr int unit_bytes = kUnitBytes;

    static void put(const int32_t* c, uint8_t* out) {
        int8_t* to = reinterpret_cast<int8_t*>(out);
        for (int s = 0; s < kUnit; s += kStep, to += 2 * kStep) {
            for (int i = 0; i < kStep; i += 8) {
                const int16x8_t x = vcombine_s16(vmovn_s32(Simd::loadi(c + s + i)), vmovn_s32(Simd::loadi(c + s + i + 4)));
                Simd::split(x, to + i, to + kStep + i);
            }
        }
    }
};

// 32 codes.
struct Group {
    int8x16_t low, high;
};

template <class T>
struct Bring;

inline Group signed_group(Unpack::Block codes) { return {vreinterpretq_s8_u8(codes.low), vreinterpretq_s8_u8(codes.high)}; }
inline Group less(Unpack::Block codes, int8_t zero) {
    const Group g = signed_group(codes);
    return {vsubq_s8(g.low, vdupq_n_s8(zero)), vsubq_s8(g.high, vdupq_n_s8(zero))};
}
inline Group look_up(int8x16_t book, Unpack::Block codes) {
    return {vqtbl1q_s8(book, codes.low), vqtbl1q_s8(book, codes.high)};
}
inline Unpack::Block bytes_32(const uint8_t* p) { return {vld1q_u8(p), vld1q_u8(p + 16)}; }

// Some bits of 32 bytes, from bit From on, moved to bit To.
template <int From, int To, int Mask>
inline uint8x16_t some_bits(uint8x16_t x) {
    if constexpr (From > To) x = vshrq_n_u8(x, From - To);
    else if constexpr (From < To) x = vshlq_n_u8(x, To - From);
    if constexpr (To == 0 && Mask == 255 >> From) return x;  // nothing stands above
    else return vandq_u8(x, vdupq_n_u8(Mask << To));
}
template <int From, int To, int Mask>
inline Unpack::Block some_bits(Unpack::Block x) {
    return {some_bits<From, To, Mask>(x.low), some_bits<From, To, Mask>(x.high)};
}

inline float half_in(const uint8_t* p) { return Simd::half_to_float(load_as<uint16_t>(p)); }

// Bytes to the integers or floats of as many lanes.
inline void put_ints(int16x8_t x, int32_t* out) {
    Simd::storei(out, vmovl_s16(vget_low_s16(x)));
    Simd::storei(out + 4, vmovl_s16(vget_high_s16(x)));
}
inline void put_ints(int8x16_t x, int32_t* out) {
    put_ints(vmovl_s8(vget_low_s8(x)), out);
    put_ints(vmovl_s8(vget_high_s8(x)), out + 8);
}
inline F floats_at(uint8x8_t bytes, int half) {
    const uint16x8_t x = vmovl_u8(bytes);
    return vcvtq_f32_u32(vmovl_u16(half ? vget_high_u16(x) : vget_low_u16(x)));
}

struct NoMins {
    static constexpr int min_vectors = 0;
    static const float* sums(const Meta& meta) { return meta.sums; }
};

// ---- Integer scales.

// Of types with 6-bit scales and minima behind d and dmin.
struct SixBitScales {
    static constexpr int n_scales = 8, min_vectors = 2;

    struct Bytes {
        uint8x8_t scales, mins;
    };
    // Four scales, four minima, and the upper four of both: nibbles, whose upper bits stand above the first eight.
    static Bytes bytes(const uint8_t* s) {
        const uint8x8_t first = vld1_u8(s), last = vreinterpret_u8_u32(vdup_n_u32(load_as<uint32_t>(s + 8)));
        const int8x8_t down = vcreate_s8(0xfcfcfcfc00000000u);
        const uint8x8_t nibble = vand_u8(vshl_u8(last, down), vdup_n_u8(15));
        const uint8x8_t upper = vorr_u8(nibble, vand_u8(vshr_n_u8(first, 2), vdup_n_u8(48)));
        const uint32x2_t a = vreinterpret_u32_u8(vand_u8(first, vdup_n_u8(63))), b = vreinterpret_u32_u8(upper);
        return {vreinterpret_u8_u32(vtrn1_u32(a, b)), vreinterpret_u8_u32(vtrn2_u32(a, b))};
    }
    static float d(const uint8_t* b) { return half_in(b); }
    static void scales(const uint8_t* b, int32_t* out) {
        put_ints(vreinterpretq_s16_u16(vmovl_u8(bytes(b + 4).scales)), out);
    }
    static void mins(const uint8_t* b, F* out) {
        const F dmin = Simd::set1(-half_in(b + 2));
        const uint8x8_t m = bytes(b + 4).mins;
        for (int i = 0; i < 2; ++i) out[i] = Simd::mul(dmin, floats_at(m, i));
    }
    static const float* sums(const Meta& meta) { return meta.sums; }
};

template <>
struct Bring<Q4_K> : SixBitScales {
    template <class Use>
    static inline __attribute__((always_inline)) void codes(const uint8_t* b, Use&& use) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            const Unpack::Block q = bytes_32(b + 16 + 32 * j);
            use(j, signed_group(some_bits<0, 0, 15>(q)), signed_group(some_bits<4, 0, 15>(q)));
        }
    }
};

template <>
struct Bring<Q5_K> : SixBitScales {
    template <class Use>
    static inline __attribute__((always_inline)) void codes(const uint8_t* b, Use&& use) {
        const Unpack::Block high = bytes_32(b + 16);
        pair<0>(b, high, use);
        pair<1>(b, high, use);
        pair<2>(b, high, use);
        pair<3>(b, high, use);
    }
    template <int J, class Use>
    static inline __attribute__((always_inline)) void pair(const uint8_t* b, Unpack::Block high, Use&& use) {
        const Unpack::Block q = bytes_32(b + 48 + 32 * J);
        use(J, signed_group(Unpack::both(some_bits<0, 0, 15>(q), some_bits<2 * J, 4, 1>(high))),
            signed_group(Unpack::both(some_bits<4, 0, 15>(q), some_bits<2 * J + 1, 4, 1>(high))));
    }
};

template <>
struct Bring<Q6_K> : NoMins {
    static constexpr int n_scales = 16;
    static float d(const uint8_t* b) { return half_in(b + Q6_K::d_at); }
    static void scales(const uint8_t* b, int32_t* out) { put_ints(vreinterpretq_s8_u8(vld1q_u8(b + 192)), out); }
    template <class Use>
    static inline __attribute__((always_inline)) void codes(const uint8_t* b, Use&& use) {
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
            const Unpack::Block a = bytes_32(b + 64 * h), c = bytes_32(b + 64 * h + 32), high = bytes_32(b + 128 + 32 * h);
            use(2 * h, less(Unpack::both(some_bits<0, 0, 15>(a), some_bits<0, 4, 3>(high)), 32),
                less(Unpack::both(some_bits<0, 0, 15>(c), some_bits<2, 4, 3>(high)), 32));
            use(2 * h + 1, less(Unpack::both(some_bits<4, 0, 15>(a), some_bits<4, 4, 3>(high)), 32),
                less(Unpack::both(some_bits<4, 0, 15>(c), some_bits<6, 4, 3>(high)), 32));
        }
    }
};

template <>
struct Bring<Q2_K> {
    static constexpr int n_scales = 16, min_vectors = 4;
    static float d(const uint8_t* b) { return half_in(b + Q2_K::d_at); }
    static void scales(const uint8_t* b, int32_t* out) {
        put_ints(vreinterpretq_s8_u8(vandq_u8(vld1q_u8(b), vdupq_n_u8(15))), out);
    }
    static void mins(const uint8_t* b, F* out) {
        const F dmin = Simd::set1(-half_in(b + Q2_K::dmin_at));
        const uint8x16_t m = vshrq_n_u8(vld1q_u8(b), 4);
        for (int i = 0; i < 4; ++i) out[i] = Simd::mul(dmin, floats_at(i < 2 ? vget_low_u8(m) : vget_high_u8(m), i % 2));
    }
    static const float* sums(const Meta& meta) { return meta.half_sums; }
    template <class Use>
    static inline __attribute__((always_inline)) void codes(const uint8_t* b, Use&& use) {
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
            const Unpack::Block q = bytes_32(b + 16 + 32 * h);
            use(2 * h, signed_group(some_bits<0, 0, 3>(q)), signed_group(some_bits<2, 0, 3>(q)));
            use(2 * h + 1, signed_group(some_bits<4, 0, 3>(q)), signed_group(some_bits<6, 0, 3>(q)));
        }
    }
};

template <>
struct Bring<Q3_K> : NoMins {
    static constexpr int n_scales = 16;
    static float d(const uint8_t* b) { return half_in(b + Q3_K::d_at); }
    static void scales(const uint8_t* b, int32_t* out) {
        const uint8x8_t s = vld1_u8(b + 96);
        const uint8x16_t low = vcombine_u8(vand_u8(s, vdup_n_u8(15)), vshr_n_u8(s, 4));
        const uint8x16_t pairs = vreinterpretq_u8_u32(vdupq_n_u32(load_as<uint32_t>(b + 104)));
        const int8x16_t places = vcombine_s8(vcreate_s8(0x0202020204040404u), vcreate_s8(0xfefefefe00000000u));
        const uint8x16_t high = vandq_u8(vshlq_u8(pairs, places), vdupq_n_u8(48));
        put_ints(vsubq_s8(vreinterpretq_s8_u8(vorrq_u8(low, high)), vdupq_n_s8(32)), out);
    }
    template <class Use>
    static inline __attribute__((always_inline)) void codes(const uint8_t* b, Use&& use) {
        const Unpack::Block bits = bytes_32(b);
        half<0>(b, bits, use);
        half<1>(b, bits, use);
    }
    template <int H, class Use>
    static inline __attribute__((always_inline)) void half(const uint8_t* b, Unpack::Block bits, Use&& use) {
        const Unpack::Block q = bytes_32(b + 32 + 32 * H);
        use(2 * H, less(Unpack::both(some_bits<0, 0, 3>(q), some_bits<4 * H, 2, 1>(bits)), 4),
            less(Unpack::both(some_bits<2, 0, 3>(q), some_bits<4 * H + 1, 2, 1>(bits)), 4));
        use(2 * H + 1, less(Unpack::both(some_bits<4, 0, 3>(q), some_bits<4 * H + 2, 2, 1>(bits)), 4),
            less(Unpack::both(some_bits<6, 0, 3>(q), some_bits<4 * H + 3, 2, 1>(bits)), 4));
    }
};

template <>
struct Bring<IQ4_XS> : NoMins {
    static constexpr int n_scales = 8;
    static float d(const uint8_t* b) { return half_in(b); }
    static void scales(const uint8_t* b, int32_t* out) {
        const uint8x8_t bytes = vreinterpret_u8_u32(vdup_n_u32(load_as<uint32_t>(b + 4)));
        const uint8x8_t low = vand_u8(vzip1_u8(bytes, vshr_n_u8(bytes, 4)), vdup_n_u8(15));
        const int16x8_t places = vcombine_s16(vcreate_s16(0xfffe000000020004u), vcreate_s16(0xfff6fff8fffafffcu));
        const uint16x8_t high = vandq_u16(vshlq_u16(vdupq_n_u16(load_as<uint16_t>(b + 2)), places), vdupq_n_u16(48));
        const int16x8_t both = vreinterpretq_s16_u16(vorrq_u16(vmovl_u8(low), high));
        put_ints(vsubq_s16(both, vdupq_n_s16(32)), out);
    }
    template <class Use>
    static inline __attribute__((always_inline)) void codes(const uint8_t* b, Use&& use) {
        const int8x16_t book = vld1q_s8(kIq4nl);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            use(j, look_up(book, Unpack::nibbles(b + 8 + 32 * j)), look_up(book, Unpack::nibbles(b + 24 + 32 * j)));
        }
    }
};

template <class T>
struct Bring<OfGrid<T>> : NoMins {
    static constexpr int n_scales = 16;
    static float d(const uint8_t* b) { return T::d(b); }
    static void scales(const uint8_t* b, int32_t* out) {
        const ScaleBytes s = T::scale_bytes(b);
        put_ints(vreinterpretq_s8_u8(vcombine_u8(vcreate_u8(s.low), vcreate_u8(s.high))), out);
    }
    template <class Use>
    static inline __attribute__((always_inline)) void codes(const uint8_t* b, Use&& use) {
        for (int j = 0; j < 4; ++j) use(j, group(b, 2 * j), group(b, 2 * j + 1));
    }
    static Group group(const uint8_t* b, int g) {
        const GridGroup of = T::group(b, g);
        const Group values = {vreinterpretq_s8_u8(vcombine_u8(vcreate_u8(of.bytes[0]), vcreate_u8(of.bytes[1]))),
                              vreinterpretq_s8_u8(vcombine_u8(vcreate_u8(of.bytes[2]), vcreate_u8(of.bytes[3])))};
        if (T::zero) return {vsubq_s8(values.low, vdupq_n_s8(T::zero)), vsubq_s8(values.high, vdupq_n_s8(T::zero))};
        uint8_t signs[4];
        std::memcpy(signs, &of.signs, 4);
        const Group minus = signed_group(Unpack::bits(signs, 255));
        return {vsubq_s8(veorq_s8(values.low, minus.low), minus.low),
                vsubq_s8(veorq_s8(values.high, minus.high), minus.high)};
    }
};

// ---- Float scales: a unit is eight blocks.

template <class T>
inline void half_scales(const uint8_t* b, float* out) {
    uint16_t halves[kGroups];
    for (int g = 0; g < kGroups; ++g) halves[g] = load_as<uint16_t>(b + g * T::bytes);
    for (int g = 0; g < kGroups; g += L) Simd::store(out + g, Simd::f16(halves + g));
}

template <class T>
struct HalfScales : NoMins {
    static void scales(const uint8_t* b, float* out) { half_scales<T>(b, out); }
};

// Codes that are not below zero and a minimum of its own.
template <class T>
struct HalfMins {
    static constexpr int min_vectors = 2;
    static void scales(const uint8_t* b, float* out) { half_scales<T>(b, out); }
    static void mins(const uint8_t* b, F* out) {
        float m[kGroups];
        half_scales<T>(b + 2, m);
        for (int i = 0; i < 2; ++i) out[i] = Simd::load(m + i * L);
    }
    static const float* sums(const Meta& meta) { return meta.sums; }
};

template <class T, class Use, class Codes>
inline __attribute__((always_inline)) void four_pairs(const uint8_t* b, Use&& use, Codes&& codes) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) use(j, codes(b + 2 * j * T::bytes), codes(b + (2 * j + 1) * T::bytes));
}

template <>
struct Bring<Q8_0> : HalfScales<Q8_0> {
    template <class Use>
    static inline __attribute__((always_inline)) void codes(const uint8_t* b, Use&& use) {
        four_pairs<Q8_0>(b, use, [](const uint8_t* p) { return signed_group(bytes_32(p + 2)); });
    }
};

template <>
struct Bring<Q4_0> : HalfScales<Q4_0> {
    template <class Use>
    static inline __attribute__((always_inline)) void codes(const uint8_t* b, Use&& use) {
        four_pairs<Q4_0>(b, use, [](const uint8_t* p) { return less(Unpack::nibbles(p + 2), 8); });
    }
};

template <>
struct Bring<Q4_1> : HalfMins<Q4_1> {
    template <class Use>
    static inline __attribute__((always_inline)) void codes(const uint8_t* b, Use&& use) {
        four_pairs<Q4_1>(b, use, [](const uint8_t* p) { return signed_group(Unpack::nibbles(p + 4)); });
    }
};

inline Unpack::Block five_bits(const uint8_t* p) { return Unpack::both(Unpack::nibbles(p + 4), Unpack::bits(p, 16)); }

template <>
struct Bring<Q5_0> : HalfScales<Q5_0> {
    template <class Use>
    static inline __attribute__((always_inline)) void codes(const uint8_t* b, Use&& use) {
        four_pairs<Q5_0>(b, use, [](const uint8_t* p) { return less(five_bits(p + 2), 16); });
    }
};

template <>
struct Bring<Q5_1> : HalfMins<Q5_1> {
    template <class Use>
    static inline __attribute__((always_inline)) void codes(const uint8_t* b, Use&& use) {
        four_pairs<Q5_1>(b, use, [](const uint8_t* p) { return signed_group(five_bits(p + 4)); });
    }
};

template <>
struct Bring<IQ4_NL> : HalfScales<IQ4_NL> {
    template <class Use>
    static inline __attribute__((always_inline)) void codes(const uint8_t* b, Use&& use) {
        const int8x16_t book = vld1q_s8(kIq4nl);
        four_pairs<IQ4_NL>(b, use, [&](const uint8_t* p) { return look_up(book, Unpack::nibbles(p + 2)); });
    }
};

template <>
struct Bring<MXFP4> : NoMins {
    static void scales(const uint8_t* b, float* out) {
        for (int g = 0; g < kGroups; ++g) out[g] = mxfp4_scale(b[g * MXFP4::bytes]);
    }
    template <class Use>
    static inline __attribute__((always_inline)) void codes(const uint8_t* b, Use&& use) {
        const int8x16_t book = vld1q_s8(kMxfp4);
        four_pairs<MXFP4>(b, use, [&](const uint8_t* p) { return look_up(book, Unpack::nibbles(p + 1)); });
    }
};

// The scale of a group in every lane, from eight in memory.
inline F step_scale(const float* scales, int step) { return Simd::set1(scales[step]); }

}  // namespace weights
}  // namespace

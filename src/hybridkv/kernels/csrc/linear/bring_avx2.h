// Blocks of weights to int16 in AVX2 registers. A step is 32 inputs: the even ones in one vector, the odd ones in the
// next, as bytes are widened without moving them across the register. maddubs widens, and multiplies by a scale of a
// byte, in one instruction: code * scale + next code * 0.
//
// Bring<T> of a type with integer scales: words() gives codes times scales, d() the scale of the block, mins() what is
// added per group of 32 (or 16) sums of activations. Of a type with float scales: words() gives codes, scales() a scale
// per 32, mins() the same as above. All read whole units: 256 values.
#pragma once

#include "activations.h"

namespace {
namespace weights {

constexpr int kStep = 4 * L;  // inputs of two vectors
constexpr int kSteps = kUnit / kStep;
constexpr int kStepBlocks = kStep / kGroup;

// A step's even inputs, then its odd ones.
struct Order {
    static constexpr int unit_bytes = kUnitBytes;

    static void put(const int32_t* c, uint8_t* to) {
        int16_t* out = reinterpret_cast<int16_t*>(to);
        for (int s = 0; s < kUnit; s += kStep) {
            for (int i = 0; i < kStep / 2; ++i) out[s + i] = static_cast<int16_t>(c[s + 2 * i]);
            for (int i = 0; i < kStep / 2; ++i) out[s + kStep / 2 + i] = static_cast<int16_t>(c[s + 2 * i + 1]);
        }
    }
};

template <class T>
struct Bring;

inline I load_bytes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const I*>(p)); }
inline __m128i load_half(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline I mask(I x, int8_t bits) { return _mm256_and_si256(x, _mm256_set1_epi8(bits)); }

// Bytes shifted by whole bits; what crosses into a neighbour is for the mask to take off.
template <int Bits>
inline I shift(I x) {
    if constexpr (Bits > 0) return _mm256_slli_epi16(x, Bits);
    else if constexpr (Bits < 0) return _mm256_srli_epi16(x, -Bits);
    else return x;
}

// Where the scales of a group go: byte g, or bytes 2g and 2g + 1, to the even bytes of each half. In memory, for
// compilers would rather make each anew from a general register, by three instructions.
struct Spread {
    alignas(32) uint16_t to[2][kGroups][16];

    constexpr Spread() : to() {
        for (int g = 0; g < kGroups; ++g) {
            for (int i = 0; i < 16; ++i) {
                to[0][g][i] = static_cast<uint16_t>(0x8000 | g);
                to[1][g][i] = static_cast<uint16_t>(0x8000 | (2 * g + i / 8));
            }
        }
    }
};
constexpr Spread kSpread;

// Scales of a byte, in both halves: eight, of 32 inputs each, or sixteen.
template <bool Sixteen>
struct ByteScales {
    I all;
    const Spread* spread;

    explicit ByteScales(__m128i scales) : all(_mm256_broadcastsi128_si256(scales)), spread(&kSpread) {
        asm("" : "+r"(spread));
    }
    // Of group g in the even bytes, zeros in the odd ones.
    I even(int g) const {
        return _mm256_shuffle_epi8(all, _mm256_load_si256(reinterpret_cast<const I*>(spread->to[Sixteen][g])));
    }
};
using Scales32 = ByteScales<false>;
using Scales16 = ByteScales<true>;

template <class S, class Use>
inline __attribute__((always_inline)) void scaled(int g, I codes, const S& scales, Use&& use) {
    const I even = scales.even(g);
    use(g, _mm256_maddubs_epi16(codes, even), _mm256_maddubs_epi16(codes, _mm256_slli_epi16(even, 8)));
}

// The same for codes that stand `2^ZeroLog2` above their value.
template <int ZeroLog2, class S, class Use>
inline __attribute__((always_inline)) void scaled_above(int g, I codes, const S& scales, Use&& use) {
    const I even = scales.even(g), odd = _mm256_slli_epi16(even, 8), zero = _mm256_srai_epi16(odd, 8 - ZeroLog2);
    use(g, _mm256_sub_epi16(_mm256_maddubs_epi16(codes, even), zero),
        _mm256_sub_epi16(_mm256_maddubs_epi16(codes, odd), zero));
}

template <class Use>
inline __attribute__((always_inline)) void unsigned_words(int g, I bytes, Use&& use) {
    use(g, _mm256_and_si256(bytes, _mm256_set1_epi16(255)), _mm256_srli_epi16(bytes, 8));
}

template <class Use>
inline __attribute__((always_inline)) void signed_words(int g, I bytes, Use&& use) {
    use(g, _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8), _mm256_srai_epi16(bytes, 8));
}

// Sixteen bytes: low nibbles, then high nibbles.
inline I nibbles_32(const uint8_t* qs) {
    const I both = _mm256_broadcastsi128_si256(load_half(qs));
    return mask(_mm256_srlv_epi32(both, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4)), 15);
}

inline F floats_of_bytes(uint64_t bytes) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(bytes))));
}

// ---- Integer scales.

struct SixBits {
    uint64_t scales, mins;

    explicit SixBits(const uint8_t* s) {
        const uint32_t a = load_as<uint32_t>(s), b = load_as<uint32_t>(s + 4), c = load_as<uint32_t>(s + 8);
        const uint32_t scales_high = (c & 0x0f0f0f0fu) | (a >> 2 & 0x30303030u);
        const uint32_t mins_high = (c >> 4 & 0x0f0f0f0fu) | (b >> 2 & 0x30303030u);
        scales = (a & 0x3f3f3f3fu) | static_cast<uint64_t>(scales_high) << 32;
        mins = (b & 0x3f3f3f3fu) | static_cast<uint64_t>(mins_high) << 32;
    }

    Scales32 bytes() const { return Scales32(_mm_cvtsi64_si128(static_cast<int64_t>(scales))); }
};

inline float half_in(const uint8_t* p) { return Simd::half_to_float(load_as<uint16_t>(p)); }

// Of types with 6-bit scales and minima behind d and dmin.
struct SixBitMins {
    static constexpr int min_vectors = 1;
    static float d(const uint8_t* b) { return half_in(b); }
    static void mins(const uint8_t* b, F* out) {
        out[0] = Simd::mul(Simd::set1(-half_in(b + 2)), floats_of_bytes(SixBits(b + 4).mins));
    }
    template <class M>
    static const float* sums(const M& meta) { return meta.sums; }
};

struct NoMins {
    static constexpr int min_vectors = 0;
    template <class M>
    static const float* sums(const M& meta) { return meta.sums; }
};

// The words of a type of codes and scales of a byte: `zero_log2` says how far codes stand above their value, if they do.
template <class B>
struct ScaledCodes {
    template <class Use>
    static __attribute__((always_inline)) void words(const uint8_t* b, Use&& use) {
        const auto scales = B::scales(b);
        B::codes(b, [&](int g, I codes) __attribute__((always_inline)) {
            if constexpr (B::zero_log2 > 0) scaled_above<B::zero_log2>(g, codes, scales, use);
            else scaled(g, codes, scales, use);
        });
    }
};

template <>
struct Bring<Q4_K> : SixBitMins, ScaledCodes<Bring<Q4_K>> {
    static constexpr int zero_log2 = 0;
    static Scales32 scales(const uint8_t* b) { return SixBits(b + 4).bytes(); }
    template <class Use>
    static __attribute__((always_inline)) void codes(const uint8_t* b, Use&& use) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            I q = load_bytes(b + 16 + 32 * j);
            Simd::settle(q);
            use(2 * j, mask(q, 15));
            use(2 * j + 1, mask(shift<-4>(q), 15));
        }
    }
};

template <>
struct Bring<Q5_K> : SixBitMins, ScaledCodes<Bring<Q5_K>> {
    static constexpr int zero_log2 = 0;
    static Scales32 scales(const uint8_t* b) { return SixBits(b + 4).bytes(); }
    template <class Use>
    static __attribute__((always_inline)) void codes(const uint8_t* b, Use&& use) {
        const I high = load_bytes(b + 16);
        pair<0>(b, high, use);
        pair<1>(b, high, use);
        pair<2>(b, high, use);
        pair<3>(b, high, use);
    }
    template <int J, class Use>
    static __attribute__((always_inline)) void pair(const uint8_t* b, I high, Use&& use) {
        I q = load_bytes(b + 48 + 32 * J);
        Simd::settle(q);
        use(2 * J, _mm256_or_si256(mask(q, 15), mask(shift<4 - 2 * J>(high), 16)));
        use(2 * J + 1, _mm256_or_si256(mask(shift<-4>(q), 15), mask(shift<3 - 2 * J>(high), 16)));
    }
};

template <>
struct Bring<Q6_K> : NoMins, ScaledCodes<Bring<Q6_K>> {
    static constexpr int zero_log2 = 5;
    static float d(const uint8_t* b) { return half_in(b + Q6_K::d_at); }
    static Scales16 scales(const uint8_t* b) { return Scales16(load_half(b + 192)); }
    template <class Use>
    static __attribute__((always_inline)) void codes(const uint8_t* b, Use&& use) {
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
            I a = load_bytes(b + 64 * h), c = load_bytes(b + 64 * h + 32), high = load_bytes(b + 128 + 32 * h);
            Simd::settle(a);
            Simd::settle(c);
            Simd::settle(high);
            use(4 * h, _mm256_or_si256(mask(a, 15), mask(shift<4>(high), 48)));
            use(4 * h + 1, _mm256_or_si256(mask(c, 15), mask(shift<2>(high), 48)));
            use(4 * h + 2, _mm256_or_si256(mask(shift<-4>(a), 15), mask(high, 48)));
            use(4 * h + 3, _mm256_or_si256(mask(shift<-4>(c), 15), mask(shift<-2>(high), 48)));
        }
    }
};

template <>
struct Bring<Q2_K> : ScaledCodes<Bring<Q2_K>> {
    static constexpr int zero_log2 = 0;
    static constexpr int min_vectors = 2;
    static float d(const uint8_t* b) { return half_in(b + Q2_K::d_at); }
    static void mins(const uint8_t* b, F* out) {
        const F dmin = Simd::set1(-half_in(b + Q2_K::dmin_at));
        const uint64_t low = load_as<uint64_t>(b) >> 4, high = load_as<uint64_t>(b + 8) >> 4;
        out[0] = Simd::mul(dmin, floats_of_bytes(low & 0x0f0f0f0f0f0f0f0fu));
        out[1] = Simd::mul(dmin, floats_of_bytes(high & 0x0f0f0f0f0f0f0f0fu));
    }
    template <class M>
    static const float* sums(const M& meta) { return meta.half_sums; }
    static Scales16 scales(const uint8_t* b) { return Scales16(_mm_and_si128(load_half(b), _mm_set1_epi8(15))); }
    template <class Use>
    static __attribute__((always_inline)) void codes(const uint8_t* b, Use&& use) {
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
            const I q = load_bytes(b + 16 + 32 * h);
            use(4 * h, mask(q, 3));
            use(4 * h + 1, mask(shift<-2>(q), 3));
            use(4 * h + 2, mask(shift<-4>(q), 3));
            use(4 * h + 3, mask(shift<-6>(q), 3));
        }
    }
};

template <>
struct Bring<Q3_K> : NoMins, ScaledCodes<Bring<Q3_K>> {
    static constexpr int zero_log2 = 2;
    static float d(const uint8_t* b) { return half_in(b + Q3_K::d_at); }
    static __m128i scale_bytes(const uint8_t* b) {
        const uint32_t x = load_as<uint32_t>(b + 96), y = load_as<uint32_t>(b + 100), z = load_as<uint32_t>(b + 104);
        constexpr uint32_t low = 0x0f0f0f0fu, high = 0x30303030u;
        const __m128i s = _mm_set_epi32(static_cast<int32_t>((y >> 4 & low) | (z >> 2 & high)),
                                        static_cast<int32_t>((x >> 4 & low) | (z & high)),
                                        static_cast<int32_t>((y & low) | (z << 2 & high)),
                                        static_cast<int32_t>((x & low) | (z << 4 & high)));
        return _mm_sub_epi8(s, _mm_set1_epi8(32));
    }
    static Scales16 scales(const uint8_t* b) { return Scales16(scale_bytes(b)); }
    template <class Use>
    static __attribute__((always_inline)) void codes(const uint8_t* b, Use&& use) {
        const I bits = load_bytes(b);
        half<0>(b, bits, use);
        half<1>(b, bits, use);
    }
    template <int H, class Use>
    static __attribute__((always_inline)) void half(const uint8_t* b, I bits, Use&& use) {
        const I q = load_bytes(b + 32 + 32 * H);
        use(4 * H, _mm256_or_si256(mask(q, 3), mask(shift<2 - 4 * H>(bits), 4)));
        use(4 * H + 1, _mm256_or_si256(mask(shift<-2>(q), 3), mask(shift<1 - 4 * H>(bits), 4)));
        use(4 * H + 2, _mm256_or_si256(mask(shift<-4>(q), 3), mask(shift<-4 * H>(bits), 4)));
        use(4 * H + 3, _mm256_or_si256(mask(shift<-6>(q), 3), mask(shift<-1 - 4 * H>(bits), 4)));
    }
};

inline I book_of(const int8_t* book) { return _mm256_broadcastsi128_si256(load_half(reinterpret_cast<const uint8_t*>(book))); }

template <>
struct Bring<IQ4_XS> : NoMins {
    static float d(const uint8_t* b) { return half_in(b); }
    template <class Use>
    static __attribute__((always_inline)) void words(const uint8_t* b, Use&& use) {
        const __m128i low = _mm_cvtsi32_si128(load_as<int32_t>(b + 4));
        const __m128i nibble = _mm_and_si128(_mm_unpacklo_epi8(low, _mm_srli_epi16(low, 4)), _mm_set1_epi8(15));
        const __m128i places = _mm_setr_epi16(1 << 14, 1 << 12, 1 << 10, 1 << 8, 1 << 6, 1 << 4, 1 << 2, 1);
        const __m128i pairs = _mm_srli_epi16(_mm_mullo_epi16(_mm_set1_epi16(load_as<int16_t>(b + 2)), places), 14);
        const __m128i high = _mm_slli_epi16(_mm_packus_epi16(pairs, pairs), 4);
        const __m128i s = _mm_sub_epi8(_mm_or_si128(nibble, high), _mm_set1_epi8(32));
        const Scales32 scales(s);
        const I book = _mm256_add_epi8(book_of(kIq4nl), _mm256_set1_epi8(-128));
#pragma GCC unroll 8
        for (int g = 0; g < kGroups; ++g) {
            scaled_above<7>(g, _mm256_shuffle_epi8(book, nibbles_32(b + 8 + 16 * g)), scales, use);
        }
    }
};

// Bytes of values, and signs as bits, to signed bytes.
inline I signed_bytes(const GridGroup& of, int zero) {
    const auto at = [&](int k) { return static_cast<int64_t>(of.bytes[k]); };
    const I values = _mm256_setr_epi64x(at(0), at(1), at(2), at(3));
    if (zero) return _mm256_sub_epi8(values, _mm256_set1_epi8(static_cast<char>(zero)));
    const I minus = Unpack::bits(reinterpret_cast<const uint8_t*>(&of.signs), -1);
    return _mm256_sub_epi8(_mm256_xor_si256(values, minus), minus);
}

template <class T>
struct Bring<OfGrid<T>> : NoMins {
    static float d(const uint8_t* b) { return T::d(b); }
    template <class Use>
    static __attribute__((always_inline)) void words(const uint8_t* b, Use&& use) {
        const ScaleBytes s = T::scale_bytes(b);
        const Scales16 scales(_mm_set_epi64x(static_cast<int64_t>(s.high), static_cast<int64_t>(s.low)));
#pragma GCC unroll 1
        for (int g = 0; g < kGroups; ++g) {
            const I codes = signed_bytes(T::group(b, g), T::zero), even = scales.even(g);
            use(g, _mm256_maddubs_epi16(even, codes), _mm256_maddubs_epi16(_mm256_slli_epi16(even, 8), codes));
        }
    }
};

// ---- Float scales: a unit is eight blocks, of which the last of a row has perhaps fewer: the first `n_steps` steps.

template <class T>
inline __attribute__((always_inline)) F half_scales(const uint8_t* b, int n_steps) {
    const auto at = [&](int g) { return g < n_steps * kStepBlocks ? load_as<int16_t>(b + g * T::bytes) : int16_t{0}; };
    return _mm256_cvtph_ps(_mm_setr_epi16(at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7)));
}

template <class T>
struct HalfScales : NoMins {
    static F scales(const uint8_t* b, int n_steps = kSteps) { return half_scales<T>(b, n_steps); }
};

// Codes that are not below zero and a minimum of its own.
template <class T>
struct HalfMins {
    static constexpr int min_vectors = 1;
    static F scales(const uint8_t* b, int n_steps = kSteps) { return half_scales<T>(b, n_steps); }
    static void mins(const uint8_t* b, F, F* out, int n_steps = kSteps) { out[0] = half_scales<T>(b + 2, n_steps); }
    template <class M>
    static const float* sums(const M& meta) { return meta.sums; }
};

// Codes that stand `Zero` above their value: a minimum of -Zero scales.
template <class T, int Zero>
struct Above {
    static constexpr int min_vectors = 1;
    static F scales(const uint8_t* b, int n_steps = kSteps) { return half_scales<T>(b, n_steps); }
    static void mins(const uint8_t*, F scales, F* out, int = kSteps) {
        out[0] = Simd::mul(scales, Simd::set1(static_cast<float>(-Zero)));
    }
    template <class M>
    static const float* sums(const M& meta) { return meta.sums; }
};

// The words of a type of codes that are not below zero.
template <class B>
struct UnsignedCodes {
    template <class Use>
    static __attribute__((always_inline)) void words(const uint8_t* b, Use&& use, int n_steps = kSteps) {
        B::codes(b, [&](int g, I codes) __attribute__((always_inline)) { unsigned_words(g, codes, use); }, n_steps);
    }
};

template <>
struct Bring<Q8_0> : HalfScales<Q8_0> {
    template <class Use>
    static __attribute__((always_inline)) void words(const uint8_t* b, Use&& use, int n_steps = kSteps) {
#pragma GCC unroll 8
        for (int g = 0; g < n_steps; ++g) signed_words(g, load_bytes(b + g * Q8_0::bytes + 2), use);
    }
};

template <>
struct Bring<Q4_0> : Above<Q4_0, 8>, UnsignedCodes<Bring<Q4_0>> {
    template <class Use>
    static __attribute__((always_inline)) void codes(const uint8_t* b, Use&& use, int n_steps) {
#pragma GCC unroll 8
        for (int g = 0; g < n_steps; ++g) use(g, nibbles_32(b + g * Q4_0::bytes + 2));
    }
};

template <>
struct Bring<Q4_1> : HalfMins<Q4_1>, UnsignedCodes<Bring<Q4_1>> {
    template <class Use>
    static __attribute__((always_inline)) void codes(const uint8_t* b, Use&& use, int n_steps) {
#pragma GCC unroll 8
        for (int g = 0; g < n_steps; ++g) use(g, nibbles_32(b + g * Q4_1::bytes + 4));
    }
};

template <class T, int At, class Use>
inline __attribute__((always_inline)) void five_bits(const uint8_t* b, Use&& use, int n_steps) {
#pragma GCC unroll 8
    for (int g = 0; g < n_steps; ++g, b += T::bytes) {
        use(g, _mm256_or_si256(nibbles_32(b + At + 4), Unpack::bits(b + At, 16)));
    }
}

template <>
struct Bring<Q5_0> : Above<Q5_0, 16>, UnsignedCodes<Bring<Q5_0>> {
    template <class Use>
    static __attribute__((always_inline)) void codes(const uint8_t* b, Use&& use, int n_steps) {
        five_bits<Q5_0, 2>(b, use, n_steps);
    }
};

template <>
struct Bring<Q5_1> : HalfMins<Q5_1>, UnsignedCodes<Bring<Q5_1>> {
    template <class Use>
    static __attribute__((always_inline)) void codes(const uint8_t* b, Use&& use, int n_steps) {
        five_bits<Q5_1, 4>(b, use, n_steps);
    }
};

template <>
struct Bring<IQ4_NL> : HalfScales<IQ4_NL> {
    template <class Use>
    static __attribute__((always_inline)) void words(const uint8_t* b, Use&& use, int n_steps = kSteps) {
        const I book = book_of(kIq4nl);
#pragma GCC unroll 8
        for (int g = 0; g < n_steps; ++g, b += IQ4_NL::bytes) {
            signed_words(g, _mm256_shuffle_epi8(book, nibbles_32(b + 2)), use);
        }
    }
};

template <>
struct Bring<MXFP4> : NoMins {
    static F scales(const uint8_t* b, int n_steps = kSteps) {
        float s[kGroups] = {};
        for (int g = 0; g < n_steps; ++g) s[g] = mxfp4_scale(b[g * MXFP4::bytes]);
        return Simd::load(s);
    }
    template <class Use>
    static __attribute__((always_inline)) void words(const uint8_t* b, Use&& use, int n_steps = kSteps) {
        const I book = book_of(kMxfp4);
#pragma GCC unroll 8
        for (int g = 0; g < n_steps; ++g, b += MXFP4::bytes) {
            signed_words(g, _mm256_shuffle_epi8(book, nibbles_32(b + 1)), use);
        }
    }
};

inline I add_ints(I a, I b) { return _mm256_add_epi32(a, b); }

inline void store_scales(float* out, F scales) { Simd::store(out, scales); }

// The scale of a step in every lane, from eight in memory.
inline F step_scale(const float* scales, int step) { return _mm256_broadcast_ss(scales + step); }

}  // namespace weights
}  // namespace

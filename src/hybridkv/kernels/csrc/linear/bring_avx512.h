// Blocks of weights to int16 in AVX-512 registers, as bring_avx2.h does it with half as wide ones: a step is 64 inputs,
// two groups side by side, the even inputs of both in one vector and the odd ones in the next.
#pragma once

#include "activations.h"

namespace {
namespace weights {

constexpr int kStep = 4 * L;
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

using Half = __m256i;

inline Half load_bytes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const Half*>(p)); }
inline __m128i load_half(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline I both(Half low, Half high) { return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1); }
inline I mask(I x, int8_t bits) { return _mm512_and_si512(x, _mm512_set1_epi8(bits)); }

// 32 bytes, shifted right by Low bits in the lower half and by High bits in the upper one. Negative: to the left. What
// crosses into a neighbour is for the mask to take off.
template <int Low, int High>
inline I shifts(Half x) {
    const I wide = _mm512_broadcast_i64x4(x);
    constexpr int base = (Low < High ? Low : High) < 0 ? (Low < High ? Low : High) : 0;
    const I counts = both(_mm256_set1_epi64x(Low - base), _mm256_set1_epi64x(High - base));
    return _mm512_srlv_epi64(base < 0 ? _mm512_slli_epi64(wide, -base) : wide, counts);
}

// Where the scales of a step go: byte g of each half's group, or bytes 2g and 2g + 1, to the even bytes.
struct Spread {
    alignas(64) uint16_t to[2][kSteps][32];

    constexpr Spread() : to() {
        for (int s = 0; s < kSteps; ++s) {
            for (int i = 0; i < 32; ++i) {
                to[0][s][i] = static_cast<uint16_t>(0x8000 | (2 * s + i / 16));
                to[1][s][i] = static_cast<uint16_t>(0x8000 | (4 * s + i / 8));
            }
        }
    }
};
constexpr Spread kSpread;

// Scales of a byte, in all quarters: eight, of 32 inputs each, or sixteen.
template <bool Sixteen>
struct ByteScales {
    I all;
    const Spread* spread;

    explicit ByteScales(__m128i scales) : all(_mm512_broadcast_i32x4(scales)), spread(&kSpread) {
        asm("" : "+r"(spread));
    }
    I even(int step) const { return _mm512_shuffle_epi8(all, _mm512_load_si512(spread->to[Sixteen][step])); }
};
using Scales32 = ByteScales<false>;
using Scales16 = ByteScales<true>;

template <class S, class Use>
inline __attribute__((always_inline)) void scaled(int step, I codes, const S& scales, Use&& use) {
    const I even = scales.even(step);
    use(step, _mm512_maddubs_epi16(codes, even), _mm512_maddubs_epi16(codes, _mm512_slli_epi16(even, 8)));
}

// The same for codes that stand `2^ZeroLog2` above their value.
template <int ZeroLog2, class S, class Use>
inline __attribute__((always_inline)) void scaled_above(int step, I codes, const S& scales, Use&& use) {
    const I even = scales.even(step), odd = _mm512_slli_epi16(even, 8), zero = _mm512_srai_epi16(odd, 8 - ZeroLog2);
    use(step, _mm512_sub_epi16(_mm512_maddubs_epi16(codes, even), zero),
        _mm512_sub_epi16(_mm512_maddubs_epi16(codes, odd), zero));
}

template <class Use>
inline __attribute__((always_inline)) void unsigned_words(int step, I bytes, Use&& use) {
    use(step, _mm512_and_si512(bytes, _mm512_set1_epi16(255)), _mm512_srli_epi16(bytes, 8));
}

template <class Use>
inline __attribute__((always_inline)) void signed_words(int step, I bytes, Use&& use) {
    use(step, _mm512_srai_epi16(_mm512_slli_epi16(bytes, 8), 8), _mm512_srai_epi16(bytes, 8));
}

// Twice sixteen bytes: low nibbles, then high nibbles, of each.
inline I nibbles_64(const uint8_t* a, const uint8_t* b) {
    const I wide = both(_mm256_broadcastsi128_si256(load_half(a)), _mm256_broadcastsi128_si256(load_half(b)));
    return mask(_mm512_srlv_epi64(wide, _mm512_setr_epi64(0, 0, 4, 4, 0, 0, 4, 4)), 15);
}

inline F floats_of_bytes(__m128i bytes) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)); }

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

// Minima meet sums of sixteen activations, each twice if they are of 32.
struct NoMins {
    static constexpr int min_vectors = 0;
    static const float* sums(const Meta& meta) { return meta.half_sums; }
};

struct OneMin : NoMins {
    static constexpr int min_vectors = 1;
};

struct SixBitMins : OneMin {
    static float d(const uint8_t* b) { return half_in(b); }
    static void mins(const uint8_t* b, F* out) {
        const __m128i m = _mm_cvtsi64_si128(static_cast<int64_t>(SixBits(b + 4).mins));
        out[0] = Simd::mul(Simd::set1(-half_in(b + 2)), floats_of_bytes(_mm_unpacklo_epi8(m, m)));
    }
};

template <>
struct Bring<Q4_K> : SixBitMins {
    template <class Use>
    static __attribute__((always_inline)) void words(const uint8_t* b, Use&& use) {
        const Scales32 scales = SixBits(b + 4).bytes();
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) scaled(j, mask(shifts<0, 4>(load_bytes(b + 16 + 32 * j)), 15), scales, use);
    }
};

template <>
struct Bring<Q5_K> : SixBitMins {
    template <class Use>
    static __attribute__((always_inline)) void words(const uint8_t* b, Use&& use) {
        const Scales32 scales = SixBits(b + 4).bytes();
        const Half high = load_bytes(b + 16);
        pair<0>(b, high, scales, use);
        pair<1>(b, high, scales, use);
        pair<2>(b, high, scales, use);
        pair<3>(b, high, scales, use);
    }
    template <int J, class Use>
    static __attribute__((always_inline)) void pair(const uint8_t* b, Half high, const Scales32& scales, Use&& use) {
        const I low = mask(shifts<0, 4>(load_bytes(b + 48 + 32 * J)), 15);
        scaled(J, _mm512_or_si512(low, mask(shifts<2 * J - 4, 2 * J - 3>(high), 16)), scales, use);
    }
};

template <>
struct Bring<Q6_K> : NoMins {
    static float d(const uint8_t* b) { return half_in(b + Q6_K::d_at); }
    template <class Use>
    static __attribute__((always_inline)) void words(const uint8_t* b, Use&& use) {
        const Scales16 scales(load_half(b + 192));
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
            const I q = _mm512_loadu_si512(b + 64 * h);
            const Half high = load_bytes(b + 128 + 32 * h);
            scaled_above<5>(2 * h, _mm512_or_si512(mask(q, 15), mask(shifts<-4, -2>(high), 48)), scales, use);
            scaled_above<5>(2 * h + 1, _mm512_or_si512(mask(_mm512_srli_epi16(q, 4), 15), mask(shifts<0, 2>(high), 48)),
                            scales, use);
        }
    }
};

template <>
struct Bring<Q2_K> : OneMin {
    static float d(const uint8_t* b) { return half_in(b + Q2_K::d_at); }
    static void mins(const uint8_t* b, F* out) {
        const __m128i m = _mm_and_si128(_mm_srli_epi16(load_half(b), 4), _mm_set1_epi8(15));
        out[0] = Simd::mul(Simd::set1(-half_in(b + Q2_K::dmin_at)), floats_of_bytes(m));
    }
    template <class Use>
    static __attribute__((always_inline)) void words(const uint8_t* b, Use&& use) {
        const Scales16 scales(_mm_and_si128(load_half(b), _mm_set1_epi8(15)));
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
            const Half q = load_bytes(b + 16 + 32 * h);
            scaled(2 * h, mask(shifts<0, 2>(q), 3), scales, use);
            scaled(2 * h + 1, mask(shifts<4, 6>(q), 3), scales, use);
        }
    }
};

template <>
struct Bring<Q3_K> : NoMins {
    static float d(const uint8_t* b) { return half_in(b + Q3_K::d_at); }
    template <class Use>
    static __attribute__((always_inline)) void words(const uint8_t* b, Use&& use) {
        const uint32_t x = load_as<uint32_t>(b + 96), y = load_as<uint32_t>(b + 100), z = load_as<uint32_t>(b + 104);
        constexpr uint32_t low = 0x0f0f0f0fu, high = 0x30303030u;
        const __m128i s = _mm_set_epi32(static_cast<int32_t>((y >> 4 & low) | (z >> 2 & high)),
                                        static_cast<int32_t>((x >> 4 & low) | (z & high)),
                                        static_cast<int32_t>((y & low) | (z << 2 & high)),
                                        static_cast<int32_t>((x & low) | (z << 4 & high)));
        const Scales16 scales(_mm_sub_epi8(s, _mm_set1_epi8(32)));
        const Half bits = load_bytes(b);
        half<0>(b, bits, scales, use);
        half<1>(b, bits, scales, use);
    }
    template <int H, class Use>
    static __attribute__((always_inline)) void half(const uint8_t* b, Half bits, const Scales16& scales, Use&& use) {
        const Half q = load_bytes(b + 32 + 32 * H);
        const I first = mask(shifts<4 * H - 2, 4 * H - 1>(bits), 4), second = mask(shifts<4 * H, 4 * H + 1>(bits), 4);
        scaled_above<2>(2 * H, _mm512_or_si512(mask(shifts<0, 2>(q), 3), first), scales, use);
        scaled_above<2>(2 * H + 1, _mm512_or_si512(mask(shifts<4, 6>(q), 3), second), scales, use);
    }
};

inline I book_of(const int8_t* book) { return _mm512_broadcast_i32x4(load_half(reinterpret_cast<const uint8_t*>(book))); }

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
        const Scales32 scales(_mm_sub_epi8(_mm_or_si128(nibble, high), _mm_set1_epi8(32)));
        const I book = _mm512_add_epi8(book_of(kIq4nl), _mm512_set1_epi8(-128));
#pragma GCC unroll 4
        for (int s = 0; s < kSteps; ++s) {
            const uint8_t* qs = b + 8 + 32 * s;
            scaled_above<7>(s, _mm512_shuffle_epi8(book, nibbles_64(qs, qs + 16)), scales, use);
        }
    }
};

// Bytes of values, and signs as bits, to signed bytes.
inline I signed_bytes(const GridGroup& a, const GridGroup& b, int zero) {
    const auto at = [](const GridGroup& of, int k) { return static_cast<int64_t>(of.bytes[k]); };
    const I values = _mm512_setr_epi64(at(a, 0), at(a, 1), at(a, 2), at(a, 3), at(b, 0), at(b, 1), at(b, 2), at(b, 3));
    if (zero) return _mm512_sub_epi8(values, _mm512_set1_epi8(static_cast<char>(zero)));
    const uint64_t minus = a.signs | static_cast<uint64_t>(b.signs) << 32;
    return _mm512_mask_sub_epi8(values, minus, _mm512_setzero_si512(), values);
}

template <class T>
struct Bring<OfGrid<T>> : NoMins {
    static float d(const uint8_t* b) { return T::d(b); }
    template <class Use>
    static __attribute__((always_inline)) void words(const uint8_t* b, Use&& use) {
        const ScaleBytes s = T::scale_bytes(b);
        const Scales16 scales(_mm_set_epi64x(static_cast<int64_t>(s.high), static_cast<int64_t>(s.low)));
#pragma GCC unroll 1
        for (int i = 0; i < kSteps; ++i) {
            const I codes = signed_bytes(T::group(b, 2 * i), T::group(b, 2 * i + 1), T::zero), even = scales.even(i);
            use(i, _mm512_maddubs_epi16(even, codes), _mm512_maddubs_epi16(_mm512_slli_epi16(even, 8), codes));
        }
    }
};

// ---- Float scales: a unit is eight blocks, of which the last of a row has perhaps fewer: the first `n_steps` steps.

using Eight = __m256;

template <class T>
inline __attribute__((always_inline)) Eight half_scales(const uint8_t* b, int n_steps) {
    const auto at = [&](int g) { return g < n_steps * kStepBlocks ? load_as<int16_t>(b + g * T::bytes) : int16_t{0}; };
    return _mm256_cvtph_ps(_mm_setr_epi16(at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7)));
}

inline F twice(Eight x) {
    const I places = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    return _mm512_permutexvar_ps(places, _mm512_castps256_ps512(x));
}

template <class T>
struct HalfScales : NoMins {
    static Eight scales(const uint8_t* b, int n_steps = kSteps) { return half_scales<T>(b, n_steps); }
};

// Codes that are not below zero and a minimum of its own.
template <class T>
struct HalfMins : OneMin {
    static Eight scales(const uint8_t* b, int n_steps = kSteps) { return half_scales<T>(b, n_steps); }
    static void mins(const uint8_t* b, Eight, F* out, int n_steps = kSteps) { out[0] = twice(half_scales<T>(b + 2, n_steps)); }
};

// Codes that stand `Zero` above their value: a minimum of -Zero scales.
template <class T, int Zero>
struct Above : OneMin {
    static Eight scales(const uint8_t* b, int n_steps = kSteps) { return half_scales<T>(b, n_steps); }
    static void mins(const uint8_t*, Eight scales, F* out, int = kSteps) {
        out[0] = twice(_mm256_mul_ps(scales, _mm256_set1_ps(static_cast<float>(-Zero))));
    }
};

template <>
struct Bring<Q8_0> : HalfScales<Q8_0> {
    template <class Use>
    static __attribute__((always_inline)) void words(const uint8_t* b, Use&& use, int n_steps = kSteps) {
#pragma GCC unroll 4
        for (int s = 0; s < n_steps; ++s, b += 2 * Q8_0::bytes) {
            signed_words(s, both(load_bytes(b + 2), load_bytes(b + Q8_0::bytes + 2)), use);
        }
    }
};

// Two blocks of 16 bytes of nibbles at `At`.
template <class T, int At>
inline I two_blocks(const uint8_t* b) { return nibbles_64(b + At, b + T::bytes + At); }

template <>
struct Bring<Q4_0> : Above<Q4_0, 8> {
    template <class Use>
    static __attribute__((always_inline)) void words(const uint8_t* b, Use&& use, int n_steps = kSteps) {
#pragma GCC unroll 4
        for (int s = 0; s < n_steps; ++s, b += 2 * Q4_0::bytes) unsigned_words(s, two_blocks<Q4_0, 2>(b), use);
    }
};

template <>
struct Bring<Q4_1> : HalfMins<Q4_1> {
    template <class Use>
    static __attribute__((always_inline)) void words(const uint8_t* b, Use&& use, int n_steps = kSteps) {
#pragma GCC unroll 4
        for (int s = 0; s < n_steps; ++s, b += 2 * Q4_1::bytes) unsigned_words(s, two_blocks<Q4_1, 4>(b), use);
    }
};

template <class T, int At, class Use>
inline __attribute__((always_inline)) void five_bits(const uint8_t* b, Use&& use, int n_steps) {
#pragma GCC unroll 4
    for (int s = 0; s < n_steps; ++s, b += 2 * T::bytes) {
        const uint64_t bits = load_as<uint32_t>(b + At) | static_cast<uint64_t>(load_as<uint32_t>(b + T::bytes + At)) << 32;
        const I low = two_blocks<T, At + 4>(b);
        unsigned_words(s, _mm512_mask_add_epi8(low, bits, low, _mm512_set1_epi8(16)), use);
    }
}

template <>
struct Bring<Q5_0> : Above<Q5_0, 16> {
    template <class Use>
    static __attribute__((always_inline)) void words(const uint8_t* b, Use&& use, int n_steps = kSteps) { five_bits<Q5_0, 2>(b, use, n_steps); }
};

template <>
struct Bring<Q5_1> : HalfMins<Q5_1> {
    template <class Use>
    static __attribute__((always_inline)) void words(const uint8_t* b, Use&& use, int n_steps = kSteps) { five_bits<Q5_1, 4>(b, use, n_steps); }
};

template <>
struct Bring<IQ4_NL> : HalfScales<IQ4_NL> {
    template <class Use>
    static __attribute__((always_inline)) void words(const uint8_t* b, Use&& use, int n_steps = kSteps) {
        const I book = book_of(kIq4nl);
#pragma GCC unroll 4
        for (int s = 0; s < n_steps; ++s, b += 2 * IQ4_NL::bytes) {
            signed_words(s, _mm512_shuffle_epi8(book, two_blocks<IQ4_NL, 2>(b)), use);
        }
    }
};

template <>
struct Bring<MXFP4> : NoMins {
    static Eight scales(const uint8_t* b, int n_steps = kSteps) {
        float s[kGroups] = {};
        for (int g = 0; g < n_steps * kStepBlocks; ++g) s[g] = mxfp4_scale(b[g * MXFP4::bytes]);
        return _mm256_loadu_ps(s);
    }
    template <class Use>
    static __attribute__((always_inline)) void words(const uint8_t* b, Use&& use, int n_steps = kSteps) {
        const I book = book_of(kMxfp4);
#pragma GCC unroll 4
        for (int s = 0; s < n_steps; ++s, b += 2 * MXFP4::bytes) {
            signed_words(s, _mm512_shuffle_epi8(book, two_blocks<MXFP4, 1>(b)), use);
        }
    }
};

inline I add_ints(I a, I b) { return _mm512_add_epi32(a, b); }

inline void store_scales(float* out, Eight scales) { _mm256_storeu_ps(out, scales); }

// The scales of a step's two groups, each in its half, from eight in memory.
inline F step_scale(const float* scales, int step) {
    const Eight low = _mm256_broadcast_ss(scales + 2 * step), high = _mm256_broadcast_ss(scales + 2 * step + 1);
    return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
}

}  // namespace weights
}  // namespace

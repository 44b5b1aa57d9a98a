// Activations of 8 bits, and weights as they meet them, AVX2. A scale per 32 activations; weights keep their levels, as
// bytes that are not below zero, so that vpmaddubsw multiplies 32 pairs in an instruction, and several products are added
// in 16 bits before a scale is met: eight of q4_K's levels (30480 at most), four of q5_K's, two of q6_K's.
//
// That asks for lanes of one scale: a vector has four inputs of each group of 32, a group to a lane, and a unit of 256
// inputs is eight vectors. What is behind the last sum, scales of groups, of activations and minima, is once a unit.
#pragma once

#include <array>
#include <type_traits>

#include "bring_avx2.h"

namespace {
namespace weights {

// Of 256 activations of 8 bits: scales per 32; sums per 32 and per 16 for minima, scale included; sums per 16 alone.
struct Int8Meta {
    float sums[kGroups], half_sums[16], scales[kGroups];
    int16_t halves[16];
};

constexpr int kVectors = 8;  // of a unit
constexpr float kLargestInt8 = 127.f;

inline int64_t int8_stride(int64_t n_in) { return units_of(n_in) * (kUnit + static_cast<int64_t>(sizeof(Int8Meta))) + 32; }

// The order of groups in lanes: even ones, then odd ones, as low and high nibbles of q4_K are.
constexpr int kLaneGroup[kGroups] = {0, 2, 4, 6, 1, 3, 5, 7};
constexpr int kGroupLane[kGroups] = {0, 4, 1, 5, 2, 6, 3, 7};

// The scale of 32 activations, and its inverse. A NaN or an infinity among them makes the scale a NaN.
inline void int8_scale(const F (&x)[4], float& scale, float& inverse) {
    I top = Simd::set1i(0);
    for (const F& v : x) top = _mm256_max_epu32(top, _mm256_castps_si256(Simd::abs(v)));
    __m128i t = _mm_max_epu32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
    t = _mm_max_epu32(t, _mm_shuffle_epi32(t, 0x4e));
    t = _mm_max_epu32(t, _mm_shuffle_epi32(t, 0xb1));
    const uint32_t bits = static_cast<uint32_t>(_mm_cvtsi128_si32(t));
    const float largest = float_of_bits(bits);
    const bool number = bits < 0x7f800000u, some = number && largest >= 1e-30f;  // below, the inverse may be infinite
    scale = some ? largest / kLargestInt8 : number ? 0.f : std::numeric_limits<float>::quiet_NaN();
    inverse = some ? kLargestInt8 / largest : 0.f;
}

// 32 activations as bytes, in order.
inline I int8_bytes(const F (&x)[4], float inverse) {
    I c[4];
    for (int i = 0; i < 4; ++i) c[i] = inverse == 0.f ? Simd::set1i(0) : Simd::to_int(Simd::mul(x[i], Simd::set1(inverse)));
    const I all = _mm256_packs_epi16(_mm256_packs_epi32(c[0], c[1]), _mm256_packs_epi32(c[2], c[3]));
    return _mm256_permutevar8x32_epi32(all, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

// Of 256 activations, of which `n` are there: lane g of vector v has inputs 4 v .. 4 v + 3 of group kLaneGroup[g].
inline void put_int8_unit(const float* x, int64_t n, uint8_t* out, Int8Meta& meta) {
    float some[kUnit];
    if (n < kUnit) {
        std::memset(some, 0, sizeof some);
        std::memcpy(some, x, static_cast<size_t>(n) * 4);
        x = some;
    }
    alignas(32) uint8_t groups[kGroups][kGroup];
    for (int g = 0; g < kGroups; ++g, x += kGroup) {
        const F values[4] = {Simd::load(x), Simd::load(x + L), Simd::load(x + 2 * L), Simd::load(x + 3 * L)};
        float inverse;
        int8_scale(values, meta.scales[kGroupLane[g]], inverse);
        _mm256_store_si256(reinterpret_cast<I*>(groups[kGroupLane[g]]), int8_bytes(values, inverse));
    }
    I lanes[kVectors], half[2] = {Simd::set1i(0), Simd::set1i(0)};
    Simd::transpose8(groups, kGroup, lanes);
    for (int v = 0; v < kVectors; ++v) {
        Unpack::put(reinterpret_cast<int8_t*>(out) + v * kGroup, lanes[v]);
        const I pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), lanes[v]);
        half[v / 4] = Simd::dot2(half[v / 4], pairs, _mm256_set1_epi16(1));
    }
    Unpack::put(reinterpret_cast<int8_t*>(meta.halves), _mm256_blend_epi16(half[0], _mm256_slli_epi32(half[1], 16), 0xaa));
    float sums[3][kGroups];
    const F scales = Simd::load(meta.scales);
    Simd::store(sums[0], Simd::mul(Simd::to_float(half[0]), scales));
    Simd::store(sums[1], Simd::mul(Simd::to_float(half[1]), scales));
    Simd::store(sums[2], Simd::mul(Simd::to_float(_mm256_add_epi32(half[0], half[1])), scales));
    for (int lane = 0; lane < kGroups; ++lane) {
        const int g = kLaneGroup[lane];
        meta.half_sums[2 * g] = sums[0][lane];
        meta.half_sums[2 * g + 1] = sums[1][lane];
        meta.sums[g] = sums[2][lane];
    }
}

inline HYBRIDKV_PHASE void prepare_int8(const float* x, int64_t x_stride, int64_t n_in, int64_t r0, int64_t r1, uint8_t* out) {
    const int64_t units = units_of(n_in), stride = int8_stride(n_in);
    for (int64_t r = r0; r < r1; ++r) {
        uint8_t* to = out + r * stride;
        Int8Meta* meta = reinterpret_cast<Int8Meta*>(to + units * kUnit);
        for (int64_t u = 0; u < units; ++u) {
            const int64_t left = n_in - u * kUnit;
            put_int8_unit(x + r * x_stride + u * kUnit, left < kUnit ? left : kUnit, to + u * kUnit, meta[u]);
        }
    }
}

// The largest level of a type; 0 of one without such products. Of q8_0 and iq4, levels of 8 bits, not even two products
// fit 16 bits.
template <class T>
constexpr int kLargestLevel = 0;
#define HYBRIDKV_LEVEL(T, level) \
    template <>                  \
    constexpr int kLargestLevel<T> = level;
HYBRIDKV_LEVEL(Q4_0, 15)
HYBRIDKV_LEVEL(Q4_1, 15)
HYBRIDKV_LEVEL(Q5_0, 31)
HYBRIDKV_LEVEL(Q5_1, 31)
HYBRIDKV_LEVEL(Q2_K, 3)
HYBRIDKV_LEVEL(Q3_K, 7)
HYBRIDKV_LEVEL(Q4_K, 15)
HYBRIDKV_LEVEL(Q5_K, 31)
HYBRIDKV_LEVEL(Q6_K, 63)
#undef HYBRIDKV_LEVEL

// Types with a scale per 16 inputs, which are four vectors.
template <class T>
constexpr bool kSixteen = std::is_same_v<T, Q2_K> || std::is_same_v<T, Q3_K> || std::is_same_v<T, Q6_K>;

// Vectors whose products are added in 16 bits.
template <class T>
constexpr int summed() {
    if (kLargestLevel<T> == 0) return 0;
    for (int n = kSixteen<T> ? 4 : 8; n > 1; n /= 2) {
        if (n * 2 * 127 * kLargestLevel<T> <= 32767) return n;
    }
    return 1;
}
template <class T>
constexpr int kSummed = summed<T>();

inline F in_lanes(F of_groups) {
    return _mm256_permutevar8x32_ps(of_groups, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
}

// A unit's levels, a vector of lanes each.
template <class T>
struct Levels {
    static inline __attribute__((always_inline)) void get(const uint8_t* b, I (&out)[kVectors], int n_steps = kSteps) {
        alignas(32) uint8_t groups[kGroups][kGroup];
        const auto keep = [&](int g, I codes) __attribute__((always_inline)) {
            _mm256_store_si256(reinterpret_cast<I*>(groups[kGroupLane[g]]), codes);
        };
        if constexpr (T::block == kUnit) {
            Bring<T>::codes(b, keep);
        } else {
            Bring<T>::codes(b, keep, n_steps);
            for (int g = n_steps; g < kGroups; ++g) keep(g, Simd::set1i(0));
        }
        Simd::transpose8(groups, kGroup, out);
    }
};

// Where a type's nibbles move together, they do before they are parted: four vectors of lanes, each twice the levels.
inline __attribute__((always_inline)) void lanes_of_nibbles(const I (&row)[4], I (&out)[4]) {
    const I a = _mm256_unpacklo_epi32(row[0], row[1]), b = _mm256_unpackhi_epi32(row[0], row[1]);
    const I c = _mm256_unpacklo_epi32(row[2], row[3]), d = _mm256_unpackhi_epi32(row[2], row[3]);
    out[0] = _mm256_unpacklo_epi64(a, c);
    out[1] = _mm256_unpackhi_epi64(a, c);
    out[2] = _mm256_unpacklo_epi64(b, d);
    out[3] = _mm256_unpackhi_epi64(b, d);
}

// 32 bytes are the low nibbles of a group and the high ones of the next.
template <>
struct Levels<Q4_K> {
    static inline __attribute__((always_inline)) void get(const uint8_t* b, I (&out)[kVectors], int = kSteps) {
        const uint8_t* p = b + 16;
        const I rows[4] = {load_bytes(p), load_bytes(p + 32), load_bytes(p + 64), load_bytes(p + 96)};
        I both[4];  // halves: vector `v` of four groups, and `v` + 4
        lanes_of_nibbles(rows, both);
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
            const I low = mask(both[v], 15), high = mask(shift<-4>(both[v]), 15);
            out[v] = _mm256_permute2x128_si256(low, high, 0x20);
            out[v + 4] = _mm256_permute2x128_si256(low, high, 0x31);
        }
    }
};

// 16 bytes are the low and the high nibbles of one group.
template <class T, int At>
struct LevelsOfHalves {
    static inline __attribute__((always_inline)) void get(const uint8_t* b, I (&out)[kVectors], int n_steps = kSteps) {
        const auto half = [&](int lane) {
            const int g = kLaneGroup[lane];
            return g < n_steps ? load_half(b + g * T::bytes + At) : _mm_setzero_si128();
        };
        I rows[4], both[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) rows[i] = _mm256_set_m128i(half(i + 4), half(i));
        lanes_of_nibbles(rows, both);
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
            out[v] = mask(both[v], 15);
            out[v + 4] = mask(shift<-4>(both[v]), 15);
        }
    }
};
template <>
struct Levels<Q4_0> : LevelsOfHalves<Q4_0, 2> {};
template <>
struct Levels<Q4_1> : LevelsOfHalves<Q4_1, 4> {};

// With the fifth bits of a group in 32 bits before its nibbles.
template <class T, int At>
struct LevelsOfFifths {
    static inline __attribute__((always_inline)) void get(const uint8_t* b, I (&out)[kVectors], int n_steps = kSteps) {
        LevelsOfHalves<T, At + 4>::get(b, out, n_steps);
        const auto of = [&](int lane) {  // into registers one by one: what is stored in pieces is not loaded whole at once
            const int g = kLaneGroup[lane];
            return g < n_steps ? load_as<int32_t>(b + g * T::bytes + At) : 0;
        };
        constexpr int32_t k4 = 0x04040404;
        const I dwords = _mm256_setr_epi32(0, k4, 2 * k4, 3 * k4, 0, k4, 2 * k4, 3 * k4);
        const I bits = _mm256_setr_epi32(of(0), of(1), of(2), of(3), of(4), of(5), of(6), of(7));
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
            const I byte = _mm256_shuffle_epi8(bits, _mm256_add_epi8(dwords, _mm256_set1_epi8(static_cast<char>(v / 2))));
            const I bit = _mm256_set1_epi32(static_cast<int32_t>(v % 2 ? 0x80402010u : 0x08040201u));
            const I set = _mm256_cmpeq_epi8(_mm256_and_si256(byte, bit), bit);
            out[v] = _mm256_or_si256(out[v], mask(set, 16));
        }
    }
};
template <>
struct Levels<Q5_0> : LevelsOfFifths<Q5_0, 2> {};
template <>
struct Levels<Q5_1> : LevelsOfFifths<Q5_1, 4> {};

// Scales of a byte as words of a lane: eight, of 32 inputs each, or the first (`Second` = 0) or second of sixteen.
template <bool Sixteen, int Second>
inline I lane_scales(__m128i bytes) {
    alignas(32) static constexpr auto table = [] {
        std::array<uint16_t, 16> t{};
        for (int i = 0; i < 16; ++i) {
            const int g = kLaneGroup[i / 2];
            t[static_cast<size_t>(i)] = static_cast<uint16_t>((Sixteen ? 2 * g + Second : g) << 8 | 0x80);
        }
        return t;
    }();
    const I all = _mm256_broadcastsi128_si256(bytes);
    return _mm256_srai_epi16(_mm256_shuffle_epi8(all, _mm256_load_si256(reinterpret_cast<const I*>(table.data()))), 8);
}

inline __m128i eight_bytes(uint64_t x) { return _mm_cvtsi64_si128(static_cast<int64_t>(x)); }

template <class T>
inline __m128i scale_bytes(const uint8_t* b) {
    if constexpr (std::is_same_v<T, Q3_K>) return Bring<Q3_K>::scale_bytes(b);
    else if constexpr (std::is_same_v<T, Q6_K>) return load_half(b + 192);
    else if constexpr (std::is_same_v<T, Q2_K>) return _mm_and_si128(load_half(b), _mm_set1_epi8(15));
    else return eight_bytes(SixBits(b + 4).scales);
}

template <class T>
constexpr int zero_of() {
    if constexpr (T::scales == Scales::ints) return Bring<T>::zero_log2;
    else return 0;
}
template <class T>
constexpr bool kAboveZero = zero_of<T>() > 0;

// What goes with the levels of a unit: integer scales as words, what they add for codes that stand above their value, float
// scales in lanes, minima.
template <class T>
struct Int8Scales {
    static constexpr int n_mins = Bring<T>::min_vectors, room = n_mins > 0 ? n_mins : 1;
    I scales[kSixteen<T> ? 2 : 1], zeros;
    F lanes, mins[room];

    inline __attribute__((always_inline)) explicit Int8Scales(const uint8_t* b, int n_steps = kSteps) {
        if constexpr (T::scales == Scales::ints) {
            const __m128i bytes = scale_bytes<T>(b);
            scales[0] = lane_scales<kSixteen<T>, 0>(bytes);
            if constexpr (kSixteen<T>) scales[1] = lane_scales<true, 1>(bytes);
            if constexpr (kAboveZero<T>) {
                const I both = _mm256_blend_epi16(scales[0], scales[1], 0xaa);
                zeros = _mm256_slli_epi16(_mm256_sub_epi16(_mm256_setzero_si256(), both), zero_of<T>());
            }
            lanes = Simd::set1(Bring<T>::d(b));
            if constexpr (n_mins > 0) Bring<T>::mins(b, mins);
        } else {
            scales[0] = _mm256_set1_epi16(1);
            const F of_groups = Bring<T>::scales(b, n_steps);
            if constexpr (n_mins > 0) Bring<T>::mins(b, of_groups, mins, n_steps);
            lanes = in_lanes(of_groups);
        }
    }
};

}  // namespace weights
}  // namespace

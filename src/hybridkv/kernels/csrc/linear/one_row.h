// Products with one row of activations for types of small codes with integer scales, AVX2. A code of six bits meets the
// two bytes of an activation as it is, sixteen products in an instruction; what is left to do for 32 inputs, scales
// included, are eight. The sums are those of few_rows.h, integers in the same lanes: the results are the same bits.
#pragma once

#include <type_traits>

#include "few_rows.h"

namespace {
namespace weights {

// Where a group's two scales go, from [even ones][odd ones] as words.
struct WordSpread {
    alignas(32) uint16_t to[kGroups][16];

    constexpr WordSpread() : to() {
        for (int g = 0; g < kGroups; ++g) {
            for (int i = 0; i < 16; ++i) to[g][i] = static_cast<uint16_t>((2 * g + 1) << 8 | 2 * g);
        }
    }
};
constexpr WordSpread kWordSpread;

// Sixteen signed scales of a byte as words, for all pairs of a group of 32.
struct SignedScales {
    I words;
    const WordSpread* spread;

    explicit SignedScales(const uint8_t* b) : spread(&kWordSpread) {
        const __m128i apart = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
        words = _mm256_cvtepi8_epi16(_mm_shuffle_epi8(load_half(b), apart));
        asm("" : "+r"(spread));
    }
    I even(int g) const {
        return _mm256_shuffle_epi8(words, _mm256_load_si256(reinterpret_cast<const I*>(spread->to[g])));
    }
};

// Words of a group's scales: zero-extended bytes are words already.
template <class T>
inline auto word_scales(const uint8_t* b) { return Bring<T>::scales(b); }
template <>
inline auto word_scales<Q6_K>(const uint8_t* b) { return SignedScales(b + 192); }
template <>
inline auto word_scales<Q3_K>(const uint8_t* b) {
    const __m128i s = Bring<Q3_K>::scale_bytes(b);
    return SignedScales(reinterpret_cast<const uint8_t*>(&s));
}

template <class T>
constexpr bool kOneRow = std::is_same_v<T, Q2_K> || std::is_same_v<T, Q3_K> || std::is_same_v<T, Q4_K> ||
                         std::is_same_v<T, Q5_K> || std::is_same_v<T, Q6_K>;

// acc += products of one unit
template <class T>
inline __attribute__((always_inline)) void one_unit(const uint8_t* b, const uint8_t* x, const Meta& meta, F& acc) {
    using B = Bring<T>;
    constexpr bool above = B::zero_log2 > 0;
    const auto scales = word_scales<T>(b);
    I high = Simd::set1i(0), low = high, zero = high;
    B::codes(b, [&](int g, I codes) __attribute__((always_inline)) {
        const I scale = scales.even(g);
        Simd::add_dot2(high, _mm256_maddubs_epi16(codes, load_bytes(x + kGroup * g)), scale);
        Simd::add_dot2(low, _mm256_maddubs_epi16(codes, load_bytes(x + ByteOrder::low_at + kGroup * g)), scale);
        if constexpr (above) Simd::add_dot2(zero, load_bytes(x + ByteOrder::pairs_at + kGroup * g), scale);
    });
    I sum = add_ints(_mm256_slli_epi32(high, 7), low);
    if constexpr (above) sum = _mm256_sub_epi32(sum, _mm256_slli_epi32(zero, B::zero_log2));
    acc = Simd::fma(Simd::to_float(sum), Simd::mul(Simd::set1(B::d(b)), Simd::set1(meta.scale)), acc);
    if constexpr (B::min_vectors > 0) {
        F mins[B::min_vectors];
        B::mins(b, mins);
        for (int v = 0; v < B::min_vectors; ++v) acc = Simd::fma(mins[v], Simd::load(B::sums(meta) + v * L), acc);
    }
}

template <class T>
HYBRIDKV_PHASE void one_row(const Matrix& w, const uint8_t* x, int64_t row0, int64_t row1, const Output& out) {
    const int64_t units = units_of(w.n_in);
    const Meta* meta = reinterpret_cast<const Meta*>(x + units * ByteOrder::unit_bytes);
    stream<T, 1>(
        w, 0, row0, row1, out,
        [&](const uint8_t* b, int64_t u, F(&acc)[1])
            __attribute__((always_inline)) { one_unit<T>(b, x + u * ByteOrder::unit_bytes, meta[u], acc[0]); },
        [](const uint8_t*, F(&)[1]) {});  // blocks are units
}

}  // namespace weights
}  // namespace

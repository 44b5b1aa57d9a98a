// Eight lanes: AVX2, FMA and F16C, with AVX-VNNI if HYBRIDKV_VNNI is defined. See simd_portable.h for what each operation
// means.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "unpack_x86.h"

namespace {

struct Simd {
    using Codes32 = Unpack;
    static constexpr int lanes = 8;
    static constexpr int rows_q = 4;
    static constexpr int cols = 2;
    static constexpr bool masked = false;  // comparisons make masks
    static constexpr bool nibble_pairs = true;  // pairs of codes straight from packed nibbles
    using F = __m256;
    using I = __m256i;

    static F load(const float* p) { return _mm256_loadu_ps(p); }
    static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
    static F set1(float x) { return _mm256_set1_ps(x); }
    static I loadi(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const I*>(p)); }
    static void storei(int32_t* p, I v) { _mm256_storeu_si256(reinterpret_cast<I*>(p), v); }
    static I set1i(int32_t x) { return _mm256_set1_epi32(x); }
    // Of four bytes in memory: one load, where a way through a general register costs two shuffles.
    static I set1i(const uint8_t* p) { return _mm256_castps_si256(_mm256_broadcast_ss(reinterpret_cast<const float*>(p))); }
    // A sum that the compiler may not put off: it would keep the products of a whole block in memory until then.
    static void settle(I& x) { asm("" : "+x"(x)); }
    static I dot2(I acc, I a, I b) { return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b)); }
    // acc = dot2(acc, a, b), where it stands: not put off, and without a copy of the sum.
    static void add_dot2(I& acc, I a, I b) {
#if defined(HYBRIDKV_EVEX_VNNI)
        // The same instruction in AVX-512's encoding, for a processor that has only this one; all else stays as it is.
        asm("%{evex%} vpdpwssd %2, %1, %0" : "+x"(acc) : "x"(a), "xm"(b));
#elif defined(HYBRIDKV_VNNI)
        asm("%{vex%} vpdpwssd %2, %1, %0" : "+x"(acc) : "x"(a), "xm"(b));
#else
        const I product = _mm256_madd_epi16(a, b);
        asm("vpaddd %1, %0, %0" : "+x"(acc) : "x"(product));
#endif
    }
    // A value that the compiler may not load, or make, again.
    static void keep(F& x) { asm("" : "+x"(x)); }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static F add(F a, F b) { return _mm256_add_ps(a, b); }
    static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static F div(F a, F b) { return _mm256_div_ps(a, b); }
    static F max(F a, F b) { return _mm256_max_ps(a, b); }
    static F abs(F a) { return _mm256_andnot_ps(set1(-0.f), a); }
    static F if_eq(F a, F b, F yes, F no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_EQ_OQ)); }
    static F if_ge(F a, F b, F yes, F no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_GE_OQ)); }
    static F add_if_ge(F sum, F term, F a, F b) {
        return _mm256_add_ps(sum, _mm256_and_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ), term));
    }
    static I count_if_ge(I n, F a, F b) {  // n + 1 where a >= b
        return _mm256_sub_epi32(n, _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_GE_OQ)));
    }
    static I mul_q15(I a, I b) { return _mm256_mulhrs_epi16(a, b); }
    static F to_float(I a) { return _mm256_cvtepi32_ps(a); }
    static F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static I to_int(F a) { return _mm256_cvtps_epi32(a); }
    static I truncate(F a) { return _mm256_cvttps_epi32(a); }
    static F pow2(F n) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(to_int(n), set1i(127)), 23));
    }
    static void store_i16(int16_t* p, I v) {
        const __m128i packed = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
    }
    static float reduce_max(F a) {
        __m128 m = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        m = _mm_max_ps(m, _mm_movehl_ps(m, m));
        return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
    }
    static float reduce_add(F a) {
        __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        s = _mm_add_ps(s, _mm_movehl_ps(s, s));
        return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
    }

    // As _mm256_hadd_ps(a, b), which takes three times as long.
    static F add_pairs(F a, F b) { return add(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd)); }
    static F reduce_all(const F (&v)[8]) {
        const F a = add_pairs(add_pairs(v[0], v[1]), add_pairs(v[2], v[3]));
        const F b = add_pairs(add_pairs(v[4], v[5]), add_pairs(v[6], v[7]));
        return add(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
    }

    // a * b + c by way of float64
    static F fused(F a, F b, F c) {
        const auto half = [](__m128 x, __m128 y, __m128 z) {
            return _mm256_cvtpd_ps(_mm256_add_pd(_mm256_mul_pd(_mm256_cvtps_pd(x), _mm256_cvtps_pd(y)), _mm256_cvtps_pd(z)));
        };
        const auto upper = [](F x) { return _mm256_extractf128_ps(x, 1); };
        const __m128 low = half(_mm256_castps256_ps128(a), _mm256_castps256_ps128(b), _mm256_castps256_ps128(c));
        return _mm256_insertf128_ps(_mm256_castps128_ps256(low), half(upper(a), upper(b), upper(c)), 1);
    }
    // table[i] of 16
    static F look_up(const float* table, I i) {
        const F low = _mm256_permutevar8x32_ps(load(table), i), high = _mm256_permutevar8x32_ps(load(table + 8), i);
        return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
    }
    static F as_float(I a) { return _mm256_castsi256_ps(a); }

    static float half_to_float(uint16_t h) { return _cvtsh_ss(h); }
    static F f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
    static F bf16(const uint16_t* p) {
        const I wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
    }
    static inline __attribute__((always_inline)) void transpose8(const void* src, int64_t stride, I (&out)[8]) {
        const char* p = static_cast<const char*>(src);
        for (int h = 0; h < 2; ++h) {
            F z[4], u[4];
            for (int r = 0; r < 4; ++r) {  // four values of rows r and r + 4 share a register
                const __m128 low = _mm_loadu_ps(reinterpret_cast<const float*>(p + r * stride) + 4 * h);
                const float* high = reinterpret_cast<const float*>(p + (r + 4) * stride) + 4 * h;
                z[r] = _mm256_insertf128_ps(_mm256_castps128_ps256(low), _mm_loadu_ps(high), 1);
            }
            // Of the instructions that could do it, this one runs on the most ports.
            u[0] = _mm256_shuffle_ps(z[0], z[1], 0x88);
            u[1] = _mm256_shuffle_ps(z[0], z[1], 0xdd);
            u[2] = _mm256_shuffle_ps(z[2], z[3], 0x88);
            u[3] = _mm256_shuffle_ps(z[2], z[3], 0xdd);
            out[4 * h] = _mm256_castps_si256(_mm256_shuffle_ps(u[0], u[2], 0x88));
            out[4 * h + 1] = _mm256_castps_si256(_mm256_shuffle_ps(u[1], u[3], 0x88));
            out[4 * h + 2] = _mm256_castps_si256(_mm256_shuffle_ps(u[0], u[2], 0xdd));
            out[4 * h + 3] = _mm256_castps_si256(_mm256_shuffle_ps(u[1], u[3], 0xdd));
        }
    }
    // Four packed bytes of a row: the lower nibbles of bytes 0 and 2, of 1 and 3, and the upper ones.
    static void split_nibbles(I x, I& low_even, I& low_odd, I& high_even, I& high_odd) {
        const I mask = _mm256_set1_epi16(15);
        low_even = _mm256_and_si256(x, mask);
        low_odd = _mm256_and_si256(_mm256_srli_epi16(x, 8), mask);
        high_even = _mm256_and_si256(_mm256_srli_epi16(x, 4), mask);
        high_odd = _mm256_srli_epi16(x, 12);
    }
    // interleave() of two blocks of packed nibbles, less `zero`.
    static void interleave_nibbles(const int8_t* a, const int8_t* b, int8_t zero, int32_t* out) {
        const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a));
        const __m128i y = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b));
        const I mask = _mm256_set1_epi16(15), offset = _mm256_set1_epi16(zero);
        const I first = _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(x, y)), second = _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(x, y));
        storei(out, _mm256_sub_epi16(_mm256_and_si256(first, mask), offset));
        storei(out + 8, _mm256_sub_epi16(_mm256_and_si256(second, mask), offset));
        storei(out + 16, _mm256_sub_epi16(_mm256_srli_epi16(first, 4), offset));
        storei(out + 24, _mm256_sub_epi16(_mm256_srli_epi16(second, 4), offset));
    }
    static I even_codes(I x) { return _mm256_maddubs_epi16(_mm256_set1_epi16(1), x); }  // 1 * even + 0 * odd
    static I odd_codes(I x) { return _mm256_srai_epi16(x, 8); }
    static void interleave(const int8_t* a, const int8_t* b, int32_t* out) {
        for (int i = 0; i < 32; i += 16, out += 16) {
            const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a + i));
            const __m128i y = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b + i));
            storei(out, _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(x, y)));
            storei(out + 8, _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(x, y)));
        }
    }
};

}  // namespace

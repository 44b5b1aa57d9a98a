// Sixteen lanes: AVX-512 F, BW, VL, DQ and VNNI. See simd_portable.h for what each operation means.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "unpack_avx512.h"

namespace {

struct Simd {
    using Codes32 = UnpackWide;
    static constexpr int lanes = 16;
    static constexpr int rows_q = 8;
    static constexpr int cols = 2;
    static constexpr bool masked = true;  // comparisons make masks
    static constexpr bool nibble_pairs = false;  // pairs of codes straight from packed nibbles
    using F = __m512;
    using I = __m512i;

    static F load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
    static F set1(float x) { return _mm512_set1_ps(x); }
    static I loadi(const int32_t* p) { return _mm512_loadu_si512(p); }
    static void storei(int32_t* p, I v) { _mm512_storeu_si512(p, v); }
    static I set1i(int32_t x) { return _mm512_set1_epi32(x); }
    static void settle(I& x) { asm("" : "+v"(x)); }
    static void add_dot2(I& acc, I a, I b) { acc = _mm512_dpwssd_epi32(acc, a, b); }
    static void keep(F& x) { asm("" : "+v"(x)); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F div(F a, F b) { return _mm512_div_ps(a, b); }
    static F max(F a, F b) { return _mm512_max_ps(a, b); }
    static F abs(F a) { return _mm512_abs_ps(a); }
    static F if_eq(F a, F b, F yes, F no) {
        return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ), no, yes);
    }
    static F if_ge(F a, F b, F yes, F no) {
        return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GE_OQ), no, yes);
    }
    static F add_if_ge(F sum, F term, F a, F b) {
        return _mm512_mask_add_ps(sum, _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ), sum, term);
    }
    static I count_if_ge(I n, F a, F b) {
        return _mm512_mask_add_epi32(n, _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ), n, _mm512_set1_epi32(1));
    }
    static I dot2(I acc, I a, I b) { return _mm512_dpwssd_epi32(acc, a, b); }
    static I mul_q15(I a, I b) { return _mm512_mulhrs_epi16(a, b); }
    static F to_float(I a) { return _mm512_cvtepi32_ps(a); }
    static F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static I to_int(F a) { return _mm512_cvtps_epi32(a); }
    static I truncate(F a) { return _mm512_cvttps_epi32(a); }
    static F pow2(F n) { return _mm512_scalef_ps(_mm512_set1_ps(1.f), n); }
    static void store_i16(int16_t* p, I v) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtsepi32_epi16(v));
    }
    static float reduce_max(F a) { return _mm512_reduce_max_ps(a); }
    static float reduce_add(F a) { return _mm512_reduce_add_ps(a); }

    // Each vector's sum to one lane, in order.
    static F reduce_all(const F (&v)[16]) {
        F s[8], t[4];
        for (int i = 0; i < 8; ++i) {
            s[i] = add(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
        }
        for (int i = 0; i < 4; ++i) {
            const __m512d a = _mm512_castps_pd(s[2 * i]), b = _mm512_castps_pd(s[2 * i + 1]);
            t[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
        }
        const auto lanes = [](F a, F b) {
            return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
        };
        return lanes(lanes(t[0], t[1]), lanes(t[2], t[3]));
    }

    static F fused(F a, F b, F c) {
        const auto half = [](__m256 x, __m256 y, __m256 z) {
            return _mm512_cvtpd_ps(_mm512_add_pd(_mm512_mul_pd(_mm512_cvtps_pd(x), _mm512_cvtps_pd(y)), _mm512_cvtps_pd(z)));
        };
        const auto upper = [](F x) { return _mm512_extractf32x8_ps(x, 1); };
        const __m256 low = half(_mm512_castps512_ps256(a), _mm512_castps512_ps256(b), _mm512_castps512_ps256(c));
        return _mm512_insertf32x8(_mm512_castps256_ps512(low), half(upper(a), upper(b), upper(c)), 1);
    }
    static F look_up(const float* table, I i) { return _mm512_permutexvar_ps(i, load(table)); }
    static F as_float(I a) { return _mm512_castsi512_ps(a); }

    static float half_to_float(uint16_t h) { return _cvtsh_ss(h); }
    static F f16(const uint16_t* p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static F bf16(const uint16_t* p) {
        const I wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
        return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    }
    static I two_rows(const char* a, const char* b) {
        const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a));
        return _mm512_inserti64x4(_mm512_castsi256_si512(low),
                                  _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)), 1);
    }
    static inline __attribute__((always_inline)) void transpose8(const void* src, int64_t stride, I (&out)[8]) {
        // Rows r and r + 4 share a register, so that after two unpack stages the four 128-bit lanes hold
        // rows 0-3 and 4-7 (first half of z) or 8-11 and 12-15 (second half), of dwords i and i + 4.
        const char* p = static_cast<const char*>(src);
        I z[8], u[8];
        for (int r = 0; r < 4; ++r) {
            z[r] = two_rows(p + r * stride, p + (r + 4) * stride);
            z[r + 4] = two_rows(p + (r + 8) * stride, p + (r + 12) * stride);
        }
        for (int h = 0; h < 8; h += 4) {
            u[h] = _mm512_unpacklo_epi32(z[h], z[h + 1]);
            u[h + 1] = _mm512_unpackhi_epi32(z[h], z[h + 1]);
            u[h + 2] = _mm512_unpacklo_epi32(z[h + 2], z[h + 3]);
            u[h + 3] = _mm512_unpackhi_epi32(z[h + 2], z[h + 3]);
            z[h] = _mm512_unpacklo_epi64(u[h], u[h + 2]);
            z[h + 1] = _mm512_unpackhi_epi64(u[h], u[h + 2]);
            z[h + 2] = _mm512_unpacklo_epi64(u[h + 1], u[h + 3]);
            z[h + 3] = _mm512_unpackhi_epi64(u[h + 1], u[h + 3]);
        }
        for (int i = 0; i < 4; ++i) {
            out[i] = _mm512_shuffle_i64x2(z[i], z[i + 4], 0x88);
            out[i + 4] = _mm512_shuffle_i64x2(z[i], z[i + 4], 0xdd);
        }
    }
    static void split_nibbles(I, I&, I&, I&, I&) {}
    static void interleave_nibbles(const int8_t*, const int8_t*, int8_t, int32_t*) {}
    static I even_codes(I x) { return _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8); }
    static I odd_codes(I x) { return _mm512_srai_epi16(x, 8); }
    static void interleave(const int8_t* a, const int8_t* b, int32_t* out) {
        for (int i = 0; i < 32; i += 16) {
            const I lo = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(a + i)));
            const I hi = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(b + i)));
            _mm512_storeu_si512(out + i, _mm512_mask_blend_epi16(0xaaaaaaaa, lo, _mm512_slli_epi32(hi, 16)));
        }
    }
};

}  // namespace

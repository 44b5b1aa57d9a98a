// Eight lanes: AVX2, FMA and F16C. See simd_portable.h for what each operation means.
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
    // acc = dot2(acc, a, b), where it stands: not put off, and without a copy of the sum.
    static void add_dot2(I& acc, I a, I b) {
        const I product = _mm256_madd_epi16(a, b);
        asm("vpaddd %1, %0, %0" : "+x"(acc) : "x"(product));
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
    static F add_if_ge(F sum, F term, F a, F b) {
        return _mm256_add_ps(sum, _mm256_and_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ), term));
    }
    static I dot2(I acc, I a, I b) { return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b)); }
    static I mul_q15(I a, I b) { return _mm256_mulhrs_epi16(a, b); }
    static F to_float(I a) { return _mm256_cvtepi32_ps(a); }
    static F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static I to_int(F a) { return _mm256_cvtps_epi32(a); }
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

    static F reduce_all(const F (&v)[8]) {
        const F a = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
        const F b = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
        return add(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
    }

    static float half_to_float(uint16_t h) { return _cvtsh_ss(h); }
    static F f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
    static F bf16(const uint16_t* p) {
        const I wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
    }
    static inline __attribute__((always_inline)) void transpose8(const void* src, int64_t stride, I (&out)[8]) {
        const char* p = static_cast<const char*>(src);
        I z[8], u[8];
        for (int r = 0; r < 8; ++r) z[r] = _mm256_loadu_si256(reinterpret_cast<const I*>(p + r * stride));
        for (int h = 0; h < 8; h += 4) {
            u[h] = _mm256_unpacklo_epi32(z[h], z[h + 1]);
            u[h + 1] = _mm256_unpackhi_epi32(z[h], z[h + 1]);
            u[h + 2] = _mm256_unpacklo_epi32(z[h + 2], z[h + 3]);
            u[h + 3] = _mm256_unpackhi_epi32(z[h + 2], z[h + 3]);
            z[h] = _mm256_unpacklo_epi64(u[h], u[h + 2]);
            z[h + 1] = _mm256_unpackhi_epi64(u[h], u[h + 2]);
            z[h + 2] = _mm256_unpacklo_epi64(u[h + 1], u[h + 3]);
            z[h + 3] = _mm256_unpackhi_epi64(u[h + 1], u[h + 3]);
        }
        for (int i = 0; i < 4; ++i) {
            out[i] = _mm256_permute2x128_si256(z[i], z[i + 4], 0x20);
            out[i + 4] = _mm256_permute2x128_si256(z[i], z[i + 4], 0x31);
        }
    }
    static I even_codes(I x) { return _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8); }
    static I odd_codes(I x) { return _mm256_srai_epi16(x, 8); }
    static void interleave(const int8_t* a, const int8_t* b, int32_t* out) {
        for (int i = 0; i < 32; i += 8) {
            const I lo = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(a + i)));
            const I hi = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(b + i)));
            storei(out + i, _mm256_blend_epi16(lo, _mm256_slli_epi32(hi, 16), 0xaa));
        }
    }
};

}  // namespace

// Four lanes: NEON of every 64-bit ARM, with the dot products of newer ones if HYBRIDKV_DOTPROD is defined. See
// simd_portable.h for what each operation means.
#pragma once

#define HYBRIDKV_NEON

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "unpack_neon.h"

namespace {

struct Simd {
    using Codes32 = Unpack;
    static constexpr int lanes = 4;
    static constexpr int rows_q = 4;
    static constexpr int cols = 4;
    static constexpr bool masked = false;        // comparisons make masks
    static constexpr bool nibble_pairs = false;  // pairs of codes straight from packed nibbles
    using F = float32x4_t;
    using I = int32x4_t;

    static F load(const float* p) { return vld1q_f32(p); }
    static void store(float* p, F v) { vst1q_f32(p, v); }
    static F set1(float x) { return vdupq_n_f32(x); }
    static I loadi(const int32_t* p) { return vld1q_s32(p); }
    static void storei(int32_t* p, I v) { vst1q_s32(p, v); }
    static I set1i(int32_t x) { return vdupq_n_s32(x); }
    static void settle(I& x) { asm("" : "+w"(x)); }
    static void keep(F& x) { asm("" : "+w"(x)); }
    static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
    static F add(F a, F b) { return vaddq_f32(a, b); }
    static F sub(F a, F b) { return vsubq_f32(a, b); }
    static F mul(F a, F b) { return vmulq_f32(a, b); }
    static F div(F a, F b) { return vdivq_f32(a, b); }
    static F max(F a, F b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }  // b if either is NaN, as elsewhere
    static F abs(F a) { return vabsq_f32(a); }
    static F if_eq(F a, F b, F yes, F no) { return vbslq_f32(vceqq_f32(a, b), yes, no); }
    static F if_ge(F a, F b, F yes, F no) { return vbslq_f32(vcgeq_f32(a, b), yes, no); }
    static I count_if_ge(I n, F a, F b) { return vsubq_s32(n, vreinterpretq_s32_u32(vcgeq_f32(a, b))); }
    static F add_if_ge(F sum, F term, F a, F b) {
        const uint32x4_t kept = vandq_u32(vcgeq_f32(a, b), vreinterpretq_u32_f32(term));
        return vaddq_f32(sum, vreinterpretq_f32_u32(kept));
    }
    static I dot2(I acc, I a, I b) {
        const int16x8_t x = vreinterpretq_s16_s32(a), y = vreinterpretq_s16_s32(b);
        const I low = vmull_s16(vget_low_s16(x), vget_low_s16(y)), high = vmull_high_s16(x, y);
        return vaddq_s32(acc, vpaddq_s32(low, high));
    }
    static void add_dot2(I& acc, I a, I b) { acc = dot2(acc, a, b); }
    // acc plus the products of sixteen bytes, of four neighbours to a lane. Without dot products: to any lane, and one
    // operand stays within -127 to 127.
    static I dot4(I acc, int8x16_t a, int8x16_t b) {
#if defined(HYBRIDKV_DOTPROD)
        return vdotq_s32(acc, a, b);
#else
        return vpadalq_s16(acc, vmlal_high_s8(vmull_s8(vget_low_s8(a), vget_low_s8(b)), a, b));
#endif
    }
    // Eight numbers of at most 128 * 127 + 63 to two terms, 128 * high + low.
    static void split(int16x8_t x, int8_t* high, int8_t* low) {
        const int8x8_t h = vrshrn_n_s16(x, 7);
        vst1_s8(high, h);
        vst1_s8(low, vmovn_s16(vsubq_s16(x, vshll_n_s8(h, 7))));
    }
    static I mul_q15(I a, I b) {
        return vreinterpretq_s32_s16(vqrdmulhq_s16(vreinterpretq_s16_s32(a), vreinterpretq_s16_s32(b)));
    }
    static F to_float(I a) { return vcvtq_f32_s32(a); }
    static F round(F a) { return vrndnq_f32(a); }
    static I to_int(F a) { return vcvtnq_s32_f32(a); }
    static I truncate(F a) { return vcvtq_s32_f32(a); }
    static F as_float(I a) { return vreinterpretq_f32_s32(a); }
    // a * b + c by way of float64.
    static F fused(F a, F b, F c) {
        const auto half = [](float32x2_t x, float32x2_t y, float32x2_t z) {
            return vcvt_f32_f64(vaddq_f64(vmulq_f64(vcvt_f64_f32(x), vcvt_f64_f32(y)), vcvt_f64_f32(z)));
        };
        return vcombine_f32(half(vget_low_f32(a), vget_low_f32(b), vget_low_f32(c)),
                            half(vget_high_f32(a), vget_high_f32(b), vget_high_f32(c)));
    }
    static F look_up(const float* table, I i) {  // of 16
        const I places = vaddq_s32(vmulq_n_s32(i, 0x04040404), vdupq_n_s32(0x03020100));
        return vreinterpretq_f32_u8(vqtbl4q_u8(vld1q_u8_x4(reinterpret_cast<const uint8_t*>(table)), vreinterpretq_u8_s32(places)));
    }
    static F pow2(F n) { return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(to_int(n), set1i(127)), 23)); }
    static void store_i16(int16_t* p, I v) { vst1_s16(p, vqmovn_s32(v)); }
    static float reduce_max(F a) {
        const F m = max(a, vextq_f32(a, a, 2));
        const float x = vgetq_lane_f32(m, 0), y = vgetq_lane_f32(m, 1);
        return x > y ? x : y;
    }
    static float reduce_add(F a) { return vaddv_f32(vadd_f32(vget_low_f32(a), vget_high_f32(a))); }

    // Each vector's sum to one lane, in order.
    static F reduce_all(const F (&v)[4]) { return vpaddq_f32(vpaddq_f32(v[0], v[1]), vpaddq_f32(v[2], v[3])); }

    static float half_to_float(uint16_t h) {
        __fp16 x;
        std::memcpy(&x, &h, sizeof x);
        return static_cast<float>(x);
    }
    static F f16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
    static F bf16(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }

    static inline __attribute__((always_inline)) void transpose8(const void* src, int64_t stride, I (&out)[8]) {
        const char* p = static_cast<const char*>(src);
        const auto at = [&](int r, int i) { return vld1q_s32(reinterpret_cast<const int32_t*>(p + r * stride) + i); };
        for (int i = 0; i < 8; i += 4) {
            const I a = vtrn1q_s32(at(0, i), at(1, i)), b = vtrn2q_s32(at(0, i), at(1, i));
            const I c = vtrn1q_s32(at(2, i), at(3, i)), d = vtrn2q_s32(at(2, i), at(3, i));
            out[i] = halves<0>(a, c);
            out[i + 1] = halves<0>(b, d);
            out[i + 2] = halves<1>(a, c);
            out[i + 3] = halves<1>(b, d);
        }
    }
    template <int High>
    static I halves(I a, I b) {
        const int64x2_t x = vreinterpretq_s64_s32(a), y = vreinterpretq_s64_s32(b);
        return vreinterpretq_s32_s64(High ? vtrn2q_s64(x, y) : vtrn1q_s64(x, y));
    }
    static I even_codes(I x) {
        return vreinterpretq_s32_s16(vshrq_n_s16(vshlq_n_s16(vreinterpretq_s16_s32(x), 8), 8));
    }
    static I odd_codes(I x) { return vreinterpretq_s32_s16(vshrq_n_s16(vreinterpretq_s16_s32(x), 8)); }
    static void split_nibbles(I, I&, I&, I&, I&) {}
    static void interleave_nibbles(const int8_t*, const int8_t*, int8_t, int32_t*) {}
    static void interleave(const int8_t* a, const int8_t* b, int32_t* out) {
        int16_t* to = reinterpret_cast<int16_t*>(out);
        for (int i = 0; i < 32; i += 8) {
            const int16x8_t x = vmovl_s8(vld1_s8(a + i)), y = vmovl_s8(vld1_s8(b + i));
            vst1q_s16(to + 2 * i, vzip1q_s16(x, y));
            vst1q_s16(to + 2 * i + 8, vzip2q_s16(x, y));
        }
    }
};

}  // namespace

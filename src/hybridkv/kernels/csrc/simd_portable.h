// Vectors of four lanes in the compiler's own vector extension: SSE2 or NEON, or scalar code elsewhere.
// The operations are those that simd_avx2.h and simd_avx512.h offer; the kernels are written once over them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "unpack_portable.h"

namespace {

struct Simd {
    using Codes32 = Unpack;
    static constexpr int lanes = 4;
    static constexpr int rows_q = 4;   // query rows in a micro-kernel
    static constexpr int cols = 2;     // vectors of stored rows in a micro-kernel of rows_q
    static constexpr bool masked = false;  // comparisons make masks
    static constexpr bool nibble_pairs = false;  // pairs of codes straight from packed nibbles
    typedef float F __attribute__((vector_size(16)));
    typedef int32_t I __attribute__((vector_size(16)));

    static F load(const float* p) { F v; std::memcpy(&v, p, sizeof v); return v; }
    static void store(float* p, F v) { std::memcpy(p, &v, sizeof v); }
    static F set1(float x) { return F{x, x, x, x}; }
    static I loadi(const int32_t* p) { I v; std::memcpy(&v, p, sizeof v); return v; }
    static void storei(int32_t* p, I v) { std::memcpy(p, &v, sizeof v); }
    static I set1i(int32_t x) { return I{x, x, x, x}; }
    static void settle(I&) {}
    static void keep(F&) {}
    static void add_dot2(I& acc, I a, I b) { acc = dot2(acc, a, b); }
    static I set1i(const uint8_t* p) {
        int32_t x;
        std::memcpy(&x, p, 4);
        return set1i(x);
    }
    static F fma(F a, F b, F c) { return a * b + c; }
    static F add(F a, F b) { return a + b; }
    static F sub(F a, F b) { return a - b; }
    static F mul(F a, F b) { return a * b; }
    static F div(F a, F b) { return a / b; }
    static F max(F a, F b) { return a > b ? a : b; }  // b if either is NaN
    static F abs(F a) { return (F)((I)a & 0x7fffffff); }
    static F if_eq(F a, F b, F yes, F no) { return a == b ? yes : no; }
    static F if_ge(F a, F b, F yes, F no) { return a >= b ? yes : no; }
    static F add_if_ge(F sum, F term, F a, F b) {  // sum + term where a >= b
        return sum + (F)((I)(a >= b) & (I)term);
    }
    static I count_if_ge(I n, F a, F b) { return n - (I)(a >= b); }  // n + 1 where a >= b
    static I dot2(I acc, I a, I b) {  // acc + a.lo16 * b.lo16 + a.hi16 * b.hi16
        return acc + ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
    }
    static I mul_q15(I a, I b) {  // int16 lanes: a * b / 2^15, rounded
        I lo = (((a << 16) >> 16) * ((b << 16) >> 16) + 0x4000) >> 15, hi = ((a >> 16) * (b >> 16) + 0x4000) >> 15;
        return (lo & 0xffff) | (hi << 16);
    }
    static F to_float(I a) { return __builtin_convertvector(a, F); }
    static F round(F a) {  // to nearest even, |a| < 2^22
        F magic = set1(12582912.f);
        return (a + magic) - magic;
    }
    static I to_int(F a) { return __builtin_convertvector(round(a), I); }
    static I truncate(F a) { return __builtin_convertvector(a, I); }
    static F pow2(F n) { return (F)((to_int(n) + 127) << 23); }  // n in [-127, 127]
    static void store_i16(int16_t* p, I v) {
        for (int i = 0; i < lanes; ++i) p[i] = static_cast<int16_t>(v[i]);
    }
    static float reduce_max(F a) {
        float m = a[0];
        for (int i = 1; i < lanes; ++i) m = a[i] > m ? a[i] : m;
        return m;
    }
    static float reduce_add(F a) { return (a[0] + a[2]) + (a[1] + a[3]); }  // half onto half, as elsewhere

    static F reduce_all(const F (&v)[4]) {  // each vector's sum to one lane, in order
        return F{reduce_add(v[0]), reduce_add(v[1]), reduce_add(v[2]), reduce_add(v[3])};
    }

    static F fused(F a, F b, F c) {  // a * b + c by way of float64
        for (int i = 0; i < lanes; ++i) c[i] = static_cast<float>(static_cast<double>(a[i]) * b[i] + c[i]);
        return c;
    }
    static F look_up(const float* table, I i) { return F{table[i[0]], table[i[1]], table[i[2]], table[i[3]]}; }  // of 16
    static F as_float(I a) { return (F)a; }

    static float half_to_float(uint16_t h) {
        const uint32_t sign = (h & 0x8000u) << 16, body = (h & 0x7fffu) << 13;
        uint32_t bits;
        float scaled;
        if (body >= 0x0f800000u) {  // infinity or NaN
            bits = body | 0x7f800000u;
        } else {
            std::memcpy(&scaled, &body, 4);
            scaled *= 5.192296858534828e33f;  // 2^112: exact, subnormals included
            std::memcpy(&bits, &scaled, 4);
        }
        bits |= sign;
        std::memcpy(&scaled, &bits, 4);
        return scaled;
    }
    static F f16(const uint16_t* p) {
        return F{half_to_float(p[0]), half_to_float(p[1]), half_to_float(p[2]), half_to_float(p[3])};
    }
    static F bf16(const uint16_t* p) { return (F)(I{p[0], p[1], p[2], p[3]} << 16); }
    // out[i][r] = src[r][i] for `lanes` rows r and 8 dwords i; the stride in bytes.
    static inline __attribute__((always_inline)) void transpose8(const void* src, int64_t stride, I (&out)[8]) {
        for (int r = 0; r < lanes; ++r) {
            int32_t row[8];
            std::memcpy(row, static_cast<const char*>(src) + r * stride, 32);
            for (int i = 0; i < 8; ++i) out[i][r] = row[i];
        }
    }
    // Codes of one dword to pairs: (0, 2) and (1, 3), each sign-extended to 16 bits.
    static void split_nibbles(I, I&, I&, I&, I&) {}
    static void interleave_nibbles(const int8_t*, const int8_t*, int8_t, int32_t*) {}
    static I even_codes(I x) { return pair(x, 0, 16); }
    static I odd_codes(I x) { return pair(x, 8, 24); }
    static I pair(I x, int lo, int hi) {
        I a = (x << (24 - lo)) >> 24, b = (x << (24 - hi)) >> 24;
        return (a & 0xffff) | (b << 16);
    }
    // out[i] = (a[i], b[i]) as 16-bit pairs for 32 codes
    static void interleave(const int8_t* a, const int8_t* b, int32_t* out) {
        for (int i = 0; i < 32; ++i) {
            out[i] = (static_cast<int32_t>(a[i]) & 0xffff) | static_cast<int32_t>(static_cast<uint32_t>(b[i]) << 16);
        }
    }
};

}  // namespace

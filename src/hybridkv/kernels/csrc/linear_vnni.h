// Sums of products of a block of codes in AVX-512 VNNI: four products of unsigned codes and signed activations to a
// lane. Activations are two int8 terms, 128 * high + low.
#pragma once

#include "dots.h"

namespace {

struct Dots {
    static constexpr bool bytes = true;  // products of bytes: faster than float32
    static constexpr float units = 16319.f;  // 127 * 128 + 63: the largest number in two terms

    // One block of activations: [32] high terms, [32] low terms.
    static void put(const int32_t* c, uint8_t* out) {
        for (int i = 0; i < 32; ++i) {
            const int32_t high = (c[i] + 64) >> 7;
            out[i] = static_cast<uint8_t>(high);
            out[32 + i] = static_cast<uint8_t>(c[i] - high * 128);
        }
    }

    // sums[q] += sum over the block of code * activation, for the 16 rows of a panel; rows of x are `stride` apart
    template <int NQ, int NV>
    static inline __attribute__((always_inline)) void block(const uint8_t* codes, const uint8_t* x, int64_t stride,
                                                            I (&sums)[NQ][NV]) {
        static_assert(NV == 1, "a vector is a panel");
        I high[NQ];
#pragma GCC unroll 8
        for (I& h : high) h = Simd::set1i(0);
#pragma GCC unroll 8
        for (int quad = 0; quad < 8; ++quad) {
            const I w = _mm512_loadu_si512(codes + 64 * quad);
#pragma GCC unroll 8
            for (int q = 0; q < NQ; ++q) {
                int32_t h, l;
                std::memcpy(&h, x + q * stride + 4 * quad, 4);
                std::memcpy(&l, x + q * stride + 4 * quad + 32, 4);
                high[q] = _mm512_dpbusd_epi32(high[q], w, Simd::set1i(h));
                sums[q][0] = _mm512_dpbusd_epi32(sums[q][0], w, Simd::set1i(l));
            }
        }
#pragma GCC unroll 8
        for (int q = 0; q < NQ; ++q) sums[q][0] = _mm512_add_epi32(sums[q][0], _mm512_slli_epi32(high[q], 7));
    }
};

}  // namespace

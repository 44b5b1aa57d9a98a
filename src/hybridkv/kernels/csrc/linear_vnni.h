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

    // sums[q][v] += sum over the block of code * activation, for the 16 rows of each of NV panels, `next` bytes apart;
    // rows of x are `stride` apart
    template <Code C, int NQ, int NV>
    static inline __attribute__((always_inline)) void block(const uint8_t* codes, int64_t next, const uint8_t* x,
                                                            int64_t stride, I (&sums)[NQ][NV]) {
        I high[NQ][NV];
#pragma GCC unroll 8
        for (auto& row : high) for (I& h : row) h = Simd::set1i(0);
#pragma GCC unroll 8
        for (int quad = 0; quad < 8; ++quad) {
            constexpr int lines = 8 / codes_per_byte(C);
            I w[NV];
#pragma GCC unroll 2
            for (int v = 0; v < NV; ++v) {
                w[v] = _mm512_loadu_si512(codes + 64 * (quad % lines) + v * next);
                if (quad >= lines) w[v] = _mm512_srli_epi32(w[v], 4);
                if (C == Code::nibbles) w[v] = _mm512_and_si512(w[v], _mm512_set1_epi8(15));
            }
#pragma GCC unroll 8
            for (int q = 0; q < NQ; ++q) {
                int32_t h, l;
                std::memcpy(&h, x + q * stride + 4 * quad, 4);
                std::memcpy(&l, x + q * stride + 4 * quad + 32, 4);
#pragma GCC unroll 2
                for (int v = 0; v < NV; ++v) {
                    high[q][v] = _mm512_dpbusd_epi32(high[q][v], w[v], Simd::set1i(h));
                    sums[q][v] = _mm512_dpbusd_epi32(sums[q][v], w[v], Simd::set1i(l));
                }
            }
        }
#pragma GCC unroll 8
        for (int q = 0; q < NQ; ++q) {
#pragma GCC unroll 2
            for (int v = 0; v < NV; ++v) {
                sums[q][v] = _mm512_add_epi32(sums[q][v], _mm512_slli_epi32(high[q][v], 7));
            }
        }
    }
};

}  // namespace

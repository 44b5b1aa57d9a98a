// Sums of products of a block of codes where there are no products of bytes: pairs of int16, over the vector
// operations of simd_avx2.h and simd_portable.h. Activations are int16.
#pragma once

#include "dots.h"

namespace {

struct Dots {
    static constexpr bool bytes = false;
    static constexpr float units = 32767.f;

    // One block of activations: inputs 0, 2, 1, 3 of each quad, as the codes are split into even and odd bytes.
    static void put(const int32_t* c, uint8_t* out) {
        int16_t words[32];
        for (int i = 0; i < 32; ++i) words[i] = static_cast<int16_t>(c[i / 4 * 4 + i % 2 * 2 + i % 4 / 2]);
        std::memcpy(out, words, sizeof words);
    }

    // sums[q][v] += sum over the block of code * activation, for NV vectors of output rows, `next` bytes apart; rows of
    // x are `stride` apart
    template <Code C, int NQ, int NV>
    static inline __attribute__((always_inline)) void block(const uint8_t* codes, int64_t next, const uint8_t* x,
                                                            int64_t stride, I (&sums)[NQ][NV]) {
        typedef uint16_t Words __attribute__((vector_size(sizeof(I))));
        constexpr int lines = 8 / codes_per_byte(C);
        constexpr uint16_t mask = 2 * zero_code(C) - 1;
#pragma GCC unroll 8
        for (int quad = 0; quad < 8; ++quad) {
            I even[NV], odd[NV];
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) {
                const uint8_t* line = codes + 64 * (quad % lines) + v * next;
                const Words w = (Words)Simd::loadi(reinterpret_cast<const int32_t*>(line)) >> (quad < lines ? 0 : 4);
                even[v] = (I)(w & mask);
                odd[v] = (I)(w >> 8 & mask);
            }
#pragma GCC unroll 4
            for (int q = 0; q < NQ; ++q) {
                const I first = Simd::set1i(x + q * stride + 8 * quad), second = Simd::set1i(x + q * stride + 8 * quad + 4);
#pragma GCC unroll 4
                for (int v = 0; v < NV; ++v) {
                    sums[q][v] = Simd::dot2(sums[q][v], even[v], first);
                    sums[q][v] = Simd::dot2(sums[q][v], odd[v], second);
                    Simd::settle(sums[q][v]);
                }
            }
        }
    }
};

}  // namespace

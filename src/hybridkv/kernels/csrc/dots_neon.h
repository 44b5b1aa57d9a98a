// The products of codes on ARM with dot products of int8: four codes and four terms of a query, or of probabilities, to a
// lane. A number of 15 bits is two terms of int8, 128 * high + low, as with AMX; rows of values go the plain way.
#pragma once

#include "plain.h"

namespace {

constexpr float kTermUnits = 16319.f;  // 127 * 128 + 63: the largest number in two terms

// Operands of NQ rows, high terms and low terms, against NV vectors of four codes to a lane.
template <int NQ, int NV>
struct TermSums {
    I high[NQ][NV], low[NQ][NV];

    inline __attribute__((always_inline)) TermSums() {
#pragma GCC unroll 4
        for (int i = 0; i < NQ; ++i) {
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) high[i][v] = low[i][v] = Simd::set1i(0);
        }
    }

    // Sixteen terms of each row; row i begins at i * terms_stride, and its low terms lie low_at behind. Vectors of codes of
    // neighbouring quadruples lie `stride` apart.
    inline __attribute__((always_inline)) void add(const int8_t* terms, int64_t terms_stride, int64_t low_at,
                                                   const int32_t* codes, int64_t stride) {
        int8x16_t h[NQ], l[NQ];
#pragma GCC unroll 4
        for (int i = 0; i < NQ; ++i) {
            h[i] = vld1q_s8(terms + i * terms_stride);
            l[i] = vld1q_s8(terms + i * terms_stride + low_at);
        }
        quad<0>(h, l, codes);
        quad<1>(h, l, codes + stride);
        quad<2>(h, l, codes + 2 * stride);
        quad<3>(h, l, codes + 3 * stride);
    }

    I of(int i, int v) const { return vaddq_s32(vshlq_n_s32(high[i][v], 7), low[i][v]); }

private:
    template <int Quad>
    inline __attribute__((always_inline)) void quad(const int8x16_t (&h)[NQ], const int8x16_t (&l)[NQ],
                                                    const int32_t* codes) {
        int8x16_t x[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) x[v] = vreinterpretq_s8_s32(Simd::loadi(codes + v * L));
#pragma GCC unroll 4
        for (int i = 0; i < NQ; ++i) {
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) {
                high[i][v] = vdotq_laneq_s32(high[i][v], x[v], h[i], Quad);
                low[i][v] = vdotq_laneq_s32(low[i][v], x[v], l[i], Quad);
            }
        }
    }
};

constexpr int kQuadRows = 16;  // rows of K staged at a time: they stay in the first cache until the last query has had them

// As k_codes, for kQuadRows rows. q: [q][block][high or low][32]; k: [quadruple of dims][kQuadRows]
template <int NQ, bool HasMin>
HYBRIDKV_PHASE void k_terms(const int8_t* q, int64_t q_stride, const int32_t* k, const float* d, const float* m,
                            const float* qsum, int64_t blocks, float* scores) {
    constexpr int NV = NQ >= 4 ? 2 : 4;
    for (int v0 = 0; v0 < kQuadRows; v0 += NV * L) {
        for (int64_t b = 0; b < blocks; ++b) {
            TermSums<NQ, NV> sums;
            const int32_t* codes = k + b * 8 * kQuadRows + v0;
            sums.add(q + b * 2 * kBlock, q_stride, kBlock, codes, kQuadRows);
            sums.add(q + b * 2 * kBlock + 16, q_stride, kBlock, codes + 4 * kQuadRows, kQuadRows);
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) {
                const int64_t at = b * kTile + v0 + v * L;
                const F dv = Simd::load(d + at);
                F mv = dv;
                if constexpr (HasMin) mv = Simd::load(m + at);
#pragma GCC unroll 4
                for (int i = 0; i < NQ; ++i) {
                    float* s = scores + i * kTile + v0 + v * L;
                    F next = Simd::fma(Simd::to_float(sums.of(i, v)), dv, b ? Simd::load(s) : Simd::set1(0.f));
                    if constexpr (HasMin) next = Simd::fma(mv, Simd::set1(qsum[i * blocks + b]), next);
                    Simd::store(s, next);
                }
            }
        }
    }
}

// As v_codes. p: [q][high or low][kTile]; v: [quadruple of rows][32]
template <int NQ>
HYBRIDKV_PHASE void v_terms(const int8_t* p, const int32_t* v, const float* unit, const float* bias, float* acc,
                            int64_t acc_stride) {
    constexpr int NV = NQ >= 4 ? 2 : 4;
    for (int e = 0; e < kBlock; e += NV * L) {
        TermSums<NQ, NV> sums;
        for (int j = 0; j < kTile; j += 16) sums.add(p + j, 2 * kTile, kTile, v + j / 4 * kBlock + e, kBlock);
#pragma GCC unroll 4
        for (int i = 0; i < NQ; ++i) {
#pragma GCC unroll 4
            for (int c = 0; c < NV; ++c) {
                float* a = acc + i * acc_stride + e + c * L;
                const F old = Simd::add(Simd::load(a), Simd::set1(bias[i]));
                Simd::store(a, Simd::fma(Simd::to_float(sums.of(i, c)), Simd::set1(unit[i]), old));
            }
        }
    }
}

struct Products : PlainProducts {
    static constexpr float q_units = kTermUnits;
    static constexpr float d_units = kTermUnits;  // so is a probability times a scale

    using PlainProducts::PlainProducts;

    void stage_query_codes(int r, const int32_t* codes) {
        int8_t* out = reinterpret_cast<int8_t*>(s.q) + r * 2 * dk;
        for (int64_t e = 0; e < dk; e += 8) {
            const int16x8_t x = vcombine_s16(vmovn_s32(Simd::loadi(codes + e)), vmovn_s32(Simd::loadi(codes + e + 4)));
            int8_t* high = out + e / kBlock * 2 * kBlock + e % kBlock;
            Simd::split(x, high, high + kBlock);
        }
    }

    void scores(int64_t j, int n) {
        if (!k_int) return PlainProducts::scores(j, n);
        Prefetch ahead = ahead_of_v(j, n, kTile / kQuadRows);
        score_codes(seg.shift + j, n, ahead);
    }

    HYBRIDKV_PHASE void score_codes(int64_t row, int n, Prefetch& ahead) {
        const Codes codes = stage_codes(seg.k, head, row, n, s.codes);
        stage_scales(seg.k, head, row, n, s.flat, s.k_d, s.k_m);
        int32_t* quads = reinterpret_cast<int32_t*>(s.k);
        const int64_t blocks = dk / kBlock;
        for (int first = 0; first < kTile; first += kQuadRows) {
            ahead.step();
            for (int64_t b = 0; b < blocks; ++b) stage_k_quads(codes, first, b, quads + b * 8 * kQuadRows);
            for_row_groups(rows, [&](auto group, int r) {
                constexpr int NQ = decltype(group)::count;
                const int8_t* q = reinterpret_cast<const int8_t*>(s.q) + r * 2 * dk;
                const auto f = seg.k.format->has_min() ? k_terms<NQ, true> : k_terms<NQ, false>;
                f(q, 2 * dk, quads, s.k_d + first, s.k_m + first, s.q_sum + r * blocks, blocks, s.scores + r * kTile + first);
            });
        }
    }

    // Block b of kQuadRows rows of codes to [8 quadruples of dims][kQuadRows].
    static void stage_k_quads(const Codes& codes, int first, int64_t b, int32_t* quads) {
        for (int r = 0; r < kQuadRows; r += L, quads += L) {
            I dims[8];
            Simd::transpose8(codes.row(first + r) + b * kBlock, codes.stride, dims);
            for (int i = 0; i < 8; ++i) Simd::storei(quads + i * kQuadRows, dims[i]);
        }
    }

    void values(int64_t j, int n) {
        if (!v_int) return PlainProducts::values(j, n);
        Prefetch ahead = ahead_of_k(j, dv / kBlock);
        weigh_codes(seg.shift + j, n, ahead);
    }

    HYBRIDKV_PHASE void weigh_codes(int64_t row, int n, Prefetch& ahead) {
        const Codes codes = stage_codes(seg.v, head, row, n, s.codes);
        int32_t* quads = reinterpret_cast<int32_t*>(s.v);
        for (int64_t b = 0; b < dv / kBlock; ++b) {
            ahead.step();
            if (!(s.d_block[b] < kInf)) {
                accumulate_unmasked_codes(codes, b);
                continue;
            }
            for (int i = 0; i < kTile; i += 4) interleave_rows(codes, i, b, quads + i / 4 * kBlock);
            for (int r = 0; r < rows; ++r) split_p(r, b);
            for_row_groups(rows, [&](auto group, int r) {
                v_terms<decltype(group)::count>(reinterpret_cast<const int8_t*>(s.pd16 + r * kTile), quads, s.unit + r,
                                                s.bias + r, s.acc + r * dv + b * kBlock, dv);
            });
        }
    }

    // Four rows of a block: a byte of each to a lane.
    static void interleave_rows(const Codes& codes, int i, int64_t b, int32_t* out) {
        for (int e = 0; e < kBlock; e += 16, out += 16) {
            int8x16_t row[4];
            for (int r = 0; r < 4; ++r) row[r] = vld1q_s8(codes.row(i + r) + b * kBlock + e);
            const int16x8_t a = vreinterpretq_s16_s8(vzip1q_s8(row[0], row[1]));
            const int16x8_t c = vreinterpretq_s16_s8(vzip1q_s8(row[2], row[3]));
            const int16x8_t x = vreinterpretq_s16_s8(vzip2q_s8(row[0], row[1]));
            const int16x8_t y = vreinterpretq_s16_s8(vzip2q_s8(row[2], row[3]));
            Simd::storei(out, vreinterpretq_s32_s16(vzip1q_s16(a, c)));
            Simd::storei(out + 4, vreinterpretq_s32_s16(vzip2q_s16(a, c)));
            Simd::storei(out + 8, vreinterpretq_s32_s16(vzip1q_s16(x, y)));
            Simd::storei(out + 12, vreinterpretq_s32_s16(vzip2q_s16(x, y)));
        }
    }

    // p times the scale of block b, in terms.
    HYBRIDKV_PHASE void split_p(int r, int64_t b) {
        int8_t* out = reinterpret_cast<int8_t*>(s.pd16 + r * kTile);
        for (int i = 0; i < kTile; i += 8) {
            const int16x8_t p = vld1q_s16(s.p16 + r * kTile + i), d = vld1q_s16(s.d16 + b * kTile + i);
            Simd::split(vqrdmulhq_s16(p, d), out + i, out + kTile + i);
        }
        s.unit[r] = s.p_unit[r] * s.d_block[b];
        s.bias[r] = seg.v.format->has_min() ? bias(r, b) : 0.f;
    }
};

}  // namespace

// Micro-kernels: NQ query rows against one tile, over the vector operations of one instruction set. Queries and
// probabilities are int16 beside int8 codes (products and sums exact in int32), float32 beside float values.
#pragma once

#include <initializer_list>

#include "ops/math.h"
#include "stage.h"

namespace {

// Calls f(std::integral_constant-like tag, first row) for groups of rows_q, 4, 2 and 1 query rows.
template <class Fn>
inline void for_row_groups(int n, Fn&& f) {
    int r = 0;
    if constexpr (Simd::rows_q == 8) {
        for (; n - r >= 8; r += 8) f(Rows<8>{}, r);
    }
    for (; n - r >= 4; r += 4) f(Rows<4>{}, r);
    if (n - r >= 2) { f(Rows<2>{}, r); r += 2; }
    if (n - r >= 1) f(Rows<1>{}, r);
}

// kPairedK of scores[q][kTile] = sum_b d[b] * (start[b] + q16 . codes of block b) + m[b] * qsum[b]
// q: [q][q_stride] pairs of int16; k: [pair][kPairedK] pairs; d, m: [block][kTile]; qsum, start: [q][blocks]
template <int NQ, bool HasMin>
HYBRIDKV_PHASE void k_codes(const int32_t* q, int64_t q_stride, const int32_t* k, const float* d, const float* m,
                            const float* qsum, const int32_t* start, int64_t blocks, float* scores) {
    constexpr int NV = kPairedK / L;
    for (int64_t b = 0; b < blocks; ++b) {
        I acc[NQ][NV];
        for (int i = 0; i < NQ; ++i) for (I& a : acc[i]) a = Simd::set1i(start[i * blocks + b]);
        const int32_t* kb = k + b * 16 * kPairedK;
        const int32_t* qb = q + b * 16;
        for (int p = 0; p < 16; ++p, kb += kPairedK) {
            I kv[NV];
            for (int v = 0; v < NV; ++v) Simd::settle(kv[v] = Simd::loadi(kb + v * L));
            for (int i = 0; i < NQ; ++i) {
                const I qv = Simd::set1i(qb[i * q_stride + p]);
                for (int v = 0; v < NV; ++v) Simd::add_dot2(acc[i][v], kv[v], qv);
            }
        }
        for (int v = 0; v < NV; ++v) {
            const F dv = Simd::load(d + b * kTile + v * L);
            F mv = dv;
            if constexpr (HasMin) mv = Simd::load(m + b * kTile + v * L);
            for (int i = 0; i < NQ; ++i) {
                float* s = scores + i * kTile + v * L;
                const F sum = b ? Simd::load(s) : Simd::set1(0.f);
                F next = Simd::fma(Simd::to_float(acc[i][v]), dv, sum);
                if constexpr (HasMin) next = Simd::fma(mv, Simd::set1(qsum[i * blocks + b]), next);
                Simd::store(s, next);
            }
        }
    }
}

// scores[q][kTile] = q . k over `dims` float32 values; k: [dim][kTile]
template <int NQ>
HYBRIDKV_PHASE void k_values(const float* q, int64_t q_stride, const float* k, int64_t dims, float* scores) {
    constexpr int NV = NQ >= Simd::rows_q ? Simd::cols : 2 * Simd::cols;
    for (int v0 = 0; v0 < kTile; v0 += NV * L) {
        F acc[NQ][NV];
        for (auto& row : acc) for (F& a : row) a = Simd::set1(0.f);
        const float* kd = k + v0;
        for (int64_t e = 0; e < dims; ++e, kd += kTile) {
            F kv[NV];
            for (int v = 0; v < NV; ++v) kv[v] = Simd::load(kd + v * L);
            for (int i = 0; i < NQ; ++i) {
                const F qv = Simd::set1(q[i * q_stride + e]);
                for (int v = 0; v < NV; ++v) acc[i][v] = Simd::fma(kv[v], qv, acc[i][v]);
            }
        }
        for (int i = 0; i < NQ; ++i) {
            for (int v = 0; v < NV; ++v) Simd::store(scores + i * kTile + v0 + v * L, acc[i][v]);
        }
    }
}

// acc[q][32] += unit[q] * (p16 . codes) + bias[q], for one block of 32 dims over a tile
// p: [q][kTile] int16; v: [kTile / 2][32] pairs of int16
template <int NQ>
HYBRIDKV_PHASE void v_codes(const int16_t* p, const int32_t* v, const float* unit, const float* bias, float* acc,
                            int64_t acc_stride) {
    constexpr int NV = Simd::cols;
    for (int e = 0; e < kBlock; e += NV * L) {
        I sum[NQ][NV];
        for (auto& row : sum) for (I& a : row) a = Simd::set1i(0);
        for (int j = 0; j < kTile / 2; ++j) {
            I vv[NV];
            for (int c = 0; c < NV; ++c) Simd::settle(vv[c] = Simd::loadi(v + j * kBlock + e + c * L));
            for (int i = 0; i < NQ; ++i) {
                int32_t pair;
                std::memcpy(&pair, p + i * kTile + 2 * j, 4);
                const I pv = Simd::set1i(pair);
                for (int c = 0; c < NV; ++c) Simd::add_dot2(sum[i][c], vv[c], pv);
            }
        }
        for (int i = 0; i < NQ; ++i) {
            for (int c = 0; c < NV; ++c) {
                float* a = acc + i * acc_stride + e + c * L;
                const F old = Simd::add(Simd::load(a), Simd::set1(bias[i]));
                Simd::store(a, Simd::fma(Simd::to_float(sum[i][c]), Simd::set1(unit[i]), old));
            }
        }
    }
}

// acc[q][32] += p . v for 32 dims of float32 values; p: [q][kTile]; v: [kTile][32]
template <int NQ>
HYBRIDKV_PHASE void v_values(const float* p, const float* v, float* acc, int64_t acc_stride) {
    constexpr int NV = Simd::cols;
    for (int e = 0; e < kBlock; e += NV * L) {
        F sum[NQ][NV];
        for (int i = 0; i < NQ; ++i) {
            for (int c = 0; c < NV; ++c) {
                sum[i][c] = Simd::load(acc + i * acc_stride + e + c * L);
            }
        }
        for (int j = 0; j < kTile; ++j) {
            F vv[NV];
            for (int c = 0; c < NV; ++c) vv[c] = Simd::load(v + j * kBlock + e + c * L);
            for (int i = 0; i < NQ; ++i) {
                const F pv = Simd::set1(p[i * kTile + j]);
                for (int c = 0; c < NV; ++c) sum[i][c] = Simd::fma(vv[c], pv, sum[i][c]);
            }
        }
        for (int i = 0; i < NQ; ++i) {
            for (int c = 0; c < NV; ++c) Simd::store(acc + i * acc_stride + e + c * L, sum[i][c]);
        }
    }
}

// 0 stays exact at -inf only through the caller's select.
inline F exp(F x) { return hybridkv::exp_of<Simd>(x); }

}  // namespace

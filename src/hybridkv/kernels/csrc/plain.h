// The two products of a tile over the plain vector operations: every instruction set but AMX, which has amx.h.
#pragma once

#include "few_rows.h"

namespace {

struct Products : Task {
    static constexpr float q_units = 32767.f;  // integer units of a query row's largest value
    static constexpr float p_units = 32767.f;  // and of the largest probability times scale of a row in a tile
    static constexpr float d_units = 32767.f;  // and of the largest scale of a block and row of V

    const bool k_few = !k_int && FewRows::takes(seg.k, rows, j1 - j0), v_few = !v_int && FewRows::takes(seg.v, rows, j1 - j0);

    using Task::Task;

    void start() {}
    void end() {}

    // Codes of one query row, in the order in which stage_k_pairs lays out pairs of codes.
    void put_codes(int r, const int32_t* codes) {
        int16_t* out = reinterpret_cast<int16_t*>(s.q) + r * dk;
        for (int64_t e = 0; e < dk; e += 4) {
            out[e] = static_cast<int16_t>(codes[e]);
            out[e + 1] = static_cast<int16_t>(codes[e + 2]);
            out[e + 2] = static_cast<int16_t>(codes[e + 1]);
            out[e + 3] = static_cast<int16_t>(codes[e + 3]);
        }
    }

    void put_values(int r, const float* q) { std::memcpy(s.q + r * dk, q, static_cast<size_t>(dk) * sizeof(float)); }

    void scores(int64_t j, int n) {
        Prefetch ahead = ahead_of_v(j, n, k_few ? kTile / FewRows::step : dk / kBlock);
        if (k_few) return FewRows::all_scores(*this, seg.shift + j, n, ahead);
        return k_int ? score_codes(seg.shift + j, n, ahead) : score_values(seg.shift + j, n, ahead);
    }

    HYBRIDKV_PHASE void score_codes(int64_t row, int n, Prefetch& ahead) {
        const Codes codes = stage_codes(seg.k, head, row, n, s.codes);
        stage_scales(seg.k, head, row, n, s.flat, s.k_d, s.k_m);
        int32_t* pairs = reinterpret_cast<int32_t*>(s.k);
        for (int64_t b = 0; b < dk / kBlock; ++b) {
            ahead.step();
            stage_k_pairs(codes, b, pairs + b * 16 * kTile);
        }
        const auto dot = [&](auto group, int r) {
            constexpr int NQ = decltype(group)::count;
            const int32_t* q = reinterpret_cast<const int32_t*>(s.q) + r * (dk / 2);
            const auto f = seg.k.format->has_min() ? k_codes<NQ, true> : k_codes<NQ, false>;
            f(q, dk / 2, pairs, s.k_d, s.k_m, s.q_sum + r * (dk / kBlock), dk / kBlock, s.scores + r * kTile);
        };
        for_row_groups(rows, dot);
    }

    HYBRIDKV_PHASE void score_values(int64_t row, int n, Prefetch& ahead) {
        for (int64_t e = 0; e < dk; e += kBlock) {
            ahead.step();
            stage_values(seg.k, head, row, n, e, s.v, kTile);
            for (int i = 0; i < kBlock; i += 8) {
                for (int r = 0; r < kTile; r += L) {
                    I dims[8];
                    Simd::transpose8(s.v + r * kBlock + i, kBlock * sizeof(float), dims);
                    int32_t* out = reinterpret_cast<int32_t*>(s.k) + (e + i) * kTile + r;
                    for (int k = 0; k < 8; ++k) Simd::storei(out + k * kTile, dims[k]);
                }
            }
        }
        for_row_groups(rows, [&](auto group, int r) {
            k_values<decltype(group)::count>(s.q + r * dk, dk, s.k, dk, s.scores + r * kTile);
        });
    }

    // Block b of the tile's codes to [16 pairs of dims][kTile].
    HYBRIDKV_PHASE static void stage_k_pairs(const Codes& codes, int64_t b, int32_t* pairs) {
        for (int r = 0; r < kTile; r += L, pairs += L) {
            I quads[8];
            Simd::transpose8(codes.row(r) + b * kBlock, codes.stride, quads);
            for (int i = 0; i < 8; ++i) {
                Simd::storei(pairs + 2 * i * kTile, Simd::even_codes(quads[i]));
                Simd::storei(pairs + (2 * i + 1) * kTile, Simd::odd_codes(quads[i]));
            }
        }
    }

    void values(int64_t j, int n) {
        Prefetch ahead = ahead_of_k(j, dv / kBlock);
        if (v_few) return FewRows::all_weigh(*this, seg.shift + j, n, ahead);
        return v_int ? weigh_codes(seg.shift + j, n, ahead) : weigh_values(seg.shift + j, n, ahead);
    }

    HYBRIDKV_PHASE void weigh_values(int64_t row, int n, Prefetch& ahead) {
        for (int64_t b = 0; b < dv / kBlock; ++b) {
            float* acc = s.acc + b * kBlock;
            ahead.step();
            if (!stage_values(seg.v, head, row, n, b * kBlock, s.v, kTile)) {
                careful_values(b, 0, rows);
                continue;
            }
            for_row_groups(rows, [&](auto group, int r) {
                v_values<decltype(group)::count>(s.scores + r * kTile, s.v, acc + r * dv, dv);
            });
        }
    }

    HYBRIDKV_PHASE void weigh_codes(int64_t row, int n, Prefetch& ahead) {
        const Codes codes = stage_codes(seg.v, head, row, n, s.codes);
        int32_t* pairs = reinterpret_cast<int32_t*>(s.v);
        for (int64_t b = 0; b < dv / kBlock; ++b) {
            ahead.step();
            if (!(s.d_block[b] < kInf)) {
                careful_block(codes, b);
                continue;
            }
            for (int i = 0; i < kTile; i += 2) {
                Simd::interleave(codes.row(i) + b * kBlock, codes.row(i + 1) + b * kBlock, pairs + i / 2 * kBlock);
            }
            for (int r = 0; r < rows; ++r) quantize_p(r, b);
            for_row_groups(rows, [&](auto group, int r) {
                v_codes<decltype(group)::count>(s.pd16 + r * kTile, pairs, s.unit + r, s.bias + r,
                                                s.acc + r * dv + b * kBlock, dv);
            });
        }
    }

    // p times the scale of block b.
    HYBRIDKV_PHASE void quantize_p(int r, int64_t b) {
        const int16_t *p = s.p16 + r * kTile, *d = s.d16 + b * kTile;
        int32_t* out = reinterpret_cast<int32_t*>(s.pd16 + r * kTile);
        for (int i = 0; i < kTile; i += 2 * L) {
            const auto load = [&](const int16_t* x) { return Simd::loadi(reinterpret_cast<const int32_t*>(x + i)); };
            Simd::storei(out + i / 2, Simd::mul_q15(load(p), load(d)));
        }
        s.unit[r] = s.p_unit[r] * s.d_block[b];
        s.bias[r] = seg.v.format->has_min() ? bias(r, b) : 0.f;
    }
};

}  // namespace

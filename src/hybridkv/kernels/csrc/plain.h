// The two products of a tile over the plain vector operations: every instruction set but AMX, which has amx.h.
#pragma once

#include "few_rows.h"

namespace {

struct PlainProducts : Task {
    static constexpr float q_units = 32767.f;  // integer units of a query row's largest value
    static constexpr float p_units = 32767.f;  // and of the largest probability times scale of a row in a tile
    static constexpr float d_units = 32767.f;  // and of the largest scale of a block and row of V

    const bool k_few = !k_int && FewRows::takes(seg.k, rows, j1 - j0), v_few = !v_int && FewRows::takes(seg.v, rows, j1 - j0);

    // Nibbles are read as they lie where two blocks of them fill a vector; a code is its nibble less `zero` then.
    static bool plain_nibbles(const Stored& k) {
        const Format& f = *k.format;
        return Simd::nibble_pairs && f.layout == BitLayout::nibbles && !f.codebook && k.head_dim % (2 * kBlock) == 0;
    }
    const bool k_nibbles = plain_nibbles(seg.k), v_nibbles = plain_nibbles(seg.v);

    using Task::Task;

    void start() {}
    void end() {}

    // Codes of one query row, in the order in which stage_k_pairs lays out pairs of codes.
    void stage_query_codes(int r, const int32_t* codes) {
        for (int64_t i = r * (dk / kBlock); i < (r + 1) * (dk / kBlock); ++i) {
            s.q_start[i] = k_nibbles ? -seg.k.format->zero * static_cast<int32_t>(s.q_sum[i]) : 0;
        }
        int16_t* out = reinterpret_cast<int16_t*>(s.q) + r * dk;
        for (int64_t e = 0; e < dk; e += 4) {
            out[e] = static_cast<int16_t>(codes[e]);
            out[e + 1] = static_cast<int16_t>(codes[e + 2]);
            out[e + 2] = static_cast<int16_t>(codes[e + 1]);
            out[e + 3] = static_cast<int16_t>(codes[e + 3]);
        }
    }

    void stage_query_values(int r, const float* q) {
        std::memcpy(s.q + r * dk, q, static_cast<size_t>(dk) * sizeof(float));
    }

    void scores(int64_t j, int n) {
        Prefetch ahead = ahead_of_v(j, n, k_few ? kTile / FewRows::step : k_int ? kTile / kPairedK : dk / kBlock);
        if (k_few) return FewRows::all_scores(*this, seg.shift + j, n, ahead);
        return k_int ? score_codes(seg.shift + j, n, ahead) : score_values(seg.shift + j, n, ahead);
    }

    HYBRIDKV_PHASE void score_codes(int64_t row, int n, Prefetch& ahead) {
        const Codes codes = k_nibbles ? packed_codes(seg.k, row, n) : stage_codes(seg.k, head, row, n, s.codes);
        stage_scales(seg.k, head, row, n, s.flat, s.k_d, s.k_m);
        int32_t* pairs = reinterpret_cast<int32_t*>(s.k);
        for (int first = 0; first < kTile; first += kPairedK) {
            ahead.step();
            if (k_nibbles) {
                for (int64_t b = 0; b < dk / kBlock; b += 2) stage_k_nibbles(codes, first, b, pairs + b * 16 * kPairedK);
            } else {
                for (int64_t b = 0; b < dk / kBlock; ++b) stage_k_pairs(codes, first, b, pairs + b * 16 * kPairedK);
            }
            for_row_groups(rows, [&](auto group, int r) {
                constexpr int NQ = decltype(group)::count;
                const int32_t* q = reinterpret_cast<const int32_t*>(s.q) + r * (dk / 2);
                const int64_t blocks = dk / kBlock;
                const auto f = seg.k.format->has_min() ? k_codes<NQ, true> : k_codes<NQ, false>;
                f(q, dk / 2, pairs, s.k_d + first, s.k_m + first, s.q_sum + r * blocks, s.q_start + r * blocks, blocks,
                  s.scores + r * kTile + first);
            });
        }
    }

    // Rows of nibbles as they lie; a tile that is not full is copied, for what lies behind the rows is not ours.
    Codes packed_codes(const Stored& stored, int64_t row, int n) const {
        const uint8_t* codes = plane_row(stored, stored.format->plane_codes, head, row);
        const int64_t stride = plane_row_bytes(*stored.format, stored.format->plane_codes, stored.head_dim);
        if (n == kTile) return {reinterpret_cast<const int8_t*>(codes), stride};
        int8_t* copy = s.codes + padded(stored.head_dim) * kTile;
        std::memcpy(copy, codes, static_cast<size_t>(n * stride));
        std::memset(copy + n * stride, 0, static_cast<size_t>((kTile - n) * stride));
        return {copy, stride};
    }

    // Blocks b and b + 1 of kPairedK rows of nibbles, each to [16 pairs of dims][kPairedK].
    static void stage_k_nibbles(const Codes& codes, int first, int64_t b, int32_t* pairs) {
        for (int r = 0; r < kPairedK; r += L, pairs += L) {
            I quads[8];
            Simd::transpose8(codes.row(first + r) + b * (kBlock / 2), codes.stride, quads);
            for (int i = 0; i < 8; ++i) {
                I low_even, low_odd, high_even, high_odd;
                Simd::split_nibbles(quads[i], low_even, low_odd, high_even, high_odd);
                int32_t* out = pairs + (i / 4 * 16 + i % 4 * 2) * kPairedK;
                Simd::storei(out, low_even);
                Simd::storei(out + kPairedK, low_odd);
                Simd::storei(out + 8 * kPairedK, high_even);
                Simd::storei(out + 9 * kPairedK, high_odd);
            }
        }
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

    // Block b of kPairedK rows of codes to [16 pairs of dims][kPairedK].
    static void stage_k_pairs(const Codes& codes, int first, int64_t b, int32_t* pairs) {
        for (int r = 0; r < kPairedK; r += L, pairs += L) {
            I quads[8];
            Simd::transpose8(codes.row(first + r) + b * kBlock, codes.stride, quads);
            for (int i = 0; i < 8; ++i) {
                Simd::storei(pairs + 2 * i * kPairedK, Simd::even_codes(quads[i]));
                Simd::storei(pairs + (2 * i + 1) * kPairedK, Simd::odd_codes(quads[i]));
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
                accumulate_unmasked(b, 0, rows);
                continue;
            }
            for_row_groups(rows, [&](auto group, int r) {
                v_values<decltype(group)::count>(s.scores + r * kTile, s.v, acc + r * dv, dv);
            });
        }
    }

    HYBRIDKV_PHASE void weigh_codes(int64_t row, int n, Prefetch& ahead) {
        const Codes codes = v_nibbles ? packed_codes(seg.v, row, n) : stage_codes(seg.v, head, row, n, s.codes);
        int32_t* pairs = reinterpret_cast<int32_t*>(s.v);
        for (int64_t b = 0; b < dv / kBlock; ++b) {
            ahead.step();
            if (!(s.d_block[b] < kInf)) {
                accumulate_unmasked_codes(v_nibbles ? stage_codes(seg.v, head, row, n, s.codes) : codes, b);
                continue;
            }
            for (int i = 0; v_nibbles && i < kTile; i += 2) {
                Simd::interleave_nibbles(codes.row(i) + b * (kBlock / 2), codes.row(i + 1) + b * (kBlock / 2),
                                         seg.v.format->zero, pairs + i / 2 * kBlock);
            }
            for (int i = 0; !v_nibbles && i < kTile; i += 2) {
                Simd::interleave(codes.row(i) + b * kBlock, codes.row(i + 1) + b * kBlock, pairs + i / 2 * kBlock);
            }
            quantize_p(b);
            for_row_groups(rows, [&](auto group, int r) {
                v_codes<decltype(group)::count>(s.pd16 + r * kTile, pairs, s.unit + r, s.bias + r,
                                                s.acc + r * dv + b * kBlock, dv);
            });
        }
    }

    // p times the scale of block b.
    HYBRIDKV_PHASE void quantize_p(int64_t b) {
        constexpr int vectors = kTile / (2 * L);
        const auto at = [](const int16_t* x, int i) { return reinterpret_cast<const int32_t*>(x) + i * L; };
        I d[vectors];
        for (int i = 0; i < vectors; ++i) Simd::settle(d[i] = Simd::loadi(at(s.d16 + b * kTile, i)));
        for (int r = 0; r < rows; ++r) {
            int32_t* out = reinterpret_cast<int32_t*>(s.pd16 + r * kTile);
            for (int i = 0; i < vectors; ++i) Simd::storei(out + i * L, Simd::mul_q15(Simd::loadi(at(s.p16 + r * kTile, i)), d[i]));
        }
        for (int r = 0; r < rows; r += L) {
            Simd::store(s.unit + r, Simd::mul(Simd::load(s.p_unit + r), Simd::set1(s.d_block[b])));
            Simd::store(s.bias + r, Simd::set1(0.f));
        }
        for (int r = 0; seg.v.format->has_min() && r < rows; ++r) s.bias[r] = bias(r, b);
    }
};

}  // namespace

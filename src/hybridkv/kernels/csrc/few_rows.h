// The products of float rows with few queries, row by row as they lie in memory: what decode does with f32, f16 and
// bf16 on every instruction set. Prefill has queries enough to pay for a transposition (dots.h) or for tiles of
// bfloat16 (amx_values.h).
#pragma once

#include "task.h"

namespace {

struct FewRows {
    static constexpr int most = 8;  // query rows
#if defined(HYBRIDKV_AMX)
    static constexpr int always = 4;  // half of a tile; more of them only
#else
    static constexpr int always = most;
#endif
    static constexpr int64_t few_stored = 192;  // over so few stored rows that tiles do not pay for their preparation

    static constexpr int step = 4;  // stored rows between two requests ahead

    // Whole vectors in every block: the others go the way of prefill.
    static bool takes(const Stored& s, int rows, int64_t n_stored) {
        return rows <= (n_stored <= few_stored ? most : always) && s.head_dim % kBlock == 0;
    }

    // scores[NQ][kTile] of n rows of K; q: [NQ][dims].
    template <BitLayout Layout, int NQ>
    static HYBRIDKV_PHASE void scores(const float* q, const uint8_t* k, int64_t stride, int64_t dims, int n,
                                      float* scores) {
        constexpr int NR = NQ < 4 ? 4 : (L == 16 ? 16 : 8) / NQ;  // stored rows that share a load of the queries
        constexpr int sums = NQ * NR < L ? L : NQ * NR;
        for (int j = 0; j < n; j += NR) {
            const uint8_t* rows[NR];
            for (int r = 0; r < NR; ++r) rows[r] = k + (j + r < n ? j + r : n - 1) * stride;
            F acc[sums];
            for (F& x : acc) x = Simd::set1(0.f);
            for (int64_t e = 0; e < dims; e += L) {
                F x[NR];
                for (int r = 0; r < NR; ++r) x[r] = load_values<Layout>(rows[r], e);
                for (int i = 0; i < NQ; ++i) {
                    F y = Simd::load(q + i * dims + e);
                    Simd::keep(y);  // loaded once, not by each product
                    for (int r = 0; r < NR; ++r) acc[i * NR + r] = Simd::fma(x[r], y, acc[i * NR + r]);
                }
            }
            float all[sums];
            for (int i = 0; i < sums; i += L) {
                F part[L];
                for (int k = 0; k < L; ++k) part[k] = acc[i + k];
                Simd::store(all + i, Simd::reduce_all(part));
            }
            for (int i = 0; i < NQ; ++i) {
                for (int r = 0; r < NR && j + r < n; ++r) scores[i * kTile + j + r] = all[i * NR + r];
            }
        }
    }

    // acc[NQ][32] += p . v of n rows; false, and nothing added, if a sum is not finite. p: [NQ][kTile]
    template <BitLayout Layout, int NQ>
    static HYBRIDKV_PHASE bool weigh(const float* p, const uint8_t* v, int64_t stride, int n, float* acc,
                                     int64_t acc_stride) {
        constexpr int NV = Simd::cols;
        float kept[NQ * kBlock];
        F check = Simd::set1(0.f);
        for (int e = 0; e < kBlock; e += NV * L) {
            F sum[NQ][NV];
            for (auto& row : sum) for (F& x : row) x = Simd::set1(0.f);
            const uint8_t* row = v;
            for (int j = 0; j < n; ++j, row += stride) {
                F x[NV];
                for (int c = 0; c < NV; ++c) x[c] = load_values<Layout>(row, e + c * L);
                for (int i = 0; i < NQ; ++i) {
                    const F weight = Simd::set1(p[i * kTile + j]);
                    for (int c = 0; c < NV; ++c) sum[i][c] = Simd::fma(x[c], weight, sum[i][c]);
                }
            }
            for (int i = 0; i < NQ; ++i) {
                for (int c = 0; c < NV; ++c) {
                    check = Simd::fma(sum[i][c], Simd::set1(0.f), check);
                    Simd::store(kept + i * kBlock + e + c * L, sum[i][c]);
                }
            }
        }
        if (Simd::reduce_add(check) != 0.f) return false;
        for (int i = 0; i < NQ; ++i) {
            for (int e = 0; e < kBlock; e += L) {
                float* a = acc + i * acc_stride + e;
                Simd::store(a, Simd::add(Simd::load(a), Simd::load(kept + i * kBlock + e)));
            }
        }
        return true;
    }

    template <class Fn>
    static void for_layout(BitLayout layout, Fn&& f) {
        if (layout == BitLayout::f32) return f(std::integral_constant<BitLayout, BitLayout::f32>{});
        if (layout == BitLayout::f16) return f(std::integral_constant<BitLayout, BitLayout::f16>{});
        f(std::integral_constant<BitLayout, BitLayout::bf16>{});
    }

    static void all_scores(const Task& t, int64_t row, int n, Prefetch& ahead) {
        const uint8_t* k = plane_row(t.seg.k, 0, t.head, row);
        const int64_t stride = plane_row_bytes(*t.seg.k.format, 0, t.seg.k.head_dim);
        for_layout(t.seg.k.format->layout, [&](auto layout) {
            for (int j = 0; j < n; j += step, k += step * stride) {
                const int count = n - j < step ? n - j : step;
                ahead.step();
                for_row_groups(t.rows, [&](auto group, int r) {
                    scores<decltype(layout)::value, decltype(group)::count>(t.s.q + r * t.dk, k, stride, t.dk, count,
                                                                            t.s.scores + r * kTile + j);
                });
            }
        });
    }

    static void all_weigh(Task& t, int64_t row, int n, Prefetch& ahead) {
        const int64_t stride = plane_row_bytes(*t.seg.v.format, 0, t.seg.v.head_dim);
        for (int64_t b = 0; b < t.dv / kBlock; ++b) {
            ahead.step();
            const uint8_t* v = plane_row(t.seg.v, 0, t.head, row) + b * kBlock * t.seg.v.format->plane_bytes[0];
            for_layout(t.seg.v.format->layout, [&](auto layout) {
                for_row_groups(t.rows, [&](auto group, int r) {
                    constexpr int NQ = decltype(group)::count;
                    float* acc = t.s.acc + r * t.dv + b * kBlock;
                    if (weigh<decltype(layout)::value, NQ>(t.s.scores + r * kTile, v, stride, n, acc, t.dv)) return;
                    stage_values(t.seg.v, t.head, row, n, b * kBlock, t.s.v, kTile);
                    t.accumulate_unmasked(b, r, NQ);
                });
            });
        }
    }
};

}  // namespace

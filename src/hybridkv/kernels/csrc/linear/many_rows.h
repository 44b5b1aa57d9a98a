// Products with many rows of activations: a few output rows are brought to int16, a unit at a time, and stay in the first
// cache while all rows of activations pass. The arithmetic of a row is that of few_rows.h, bit for bit.
#pragma once

#include "few_rows.h"

namespace {
namespace weights {

struct Many {
    static constexpr int64_t kOut = 24;   // output rows brought at once; a multiple of all L
    static constexpr int64_t kMost = 192;  // rows of activations that share them at most
    static constexpr int64_t kInCache = 320 << 10;  // bytes of activations that stay in the second cache

    // Rows of activations that stay in the second cache while a task's output rows pass. Too few of long rows would stay
    // to pay for what is brought: many then come from the third, which costs less.
    static int64_t rows_in_cache(int64_t stride) {
        const int64_t n = kInCache / stride / 4 * 4;
        return n < 36 ? kMost : n > 96 ? 96 : n;
    }
    static constexpr bool wide = L == 16;

    // A unit of an output row.
    template <class T>
    struct Brought {
        alignas(32) int16_t words[kUnit];
        float mins[(Bring<T>::min_vectors > 0 ? Bring<T>::min_vectors : 1) * L];
        float scales[kGroups];  // of types with integer scales: one
        float padding[sizeof(mins) % 64 == 32 ? 8 : 16];  // rows side by side start in other halves of a line
    };

    // A micro-kernel's output rows and rows of activations: sums, and what they are made of, stay in registers. Measured
    // on Zen 4, q4_K, G multiply-adds/s, AVX2: 2 x 4, 2 x 6, 3 x 3 and 3 x 4 80, 4 x 2 72; AVX-512: 82 to 85 up to 4 x 6.
    static constexpr int kTileOut = wide ? 4 : 2;
    template <class T>
    static constexpr int tile_rows = wide && T::scales == Scales::ints ? 6 : 4;
    // The largest one, for what is left at the end.
    template <class T>
    static constexpr int most_rows = T::scales == Scales::ints ? 6 : 4;

    template <class T>
    static inline __attribute__((always_inline)) void bring(const uint8_t* b, Brought<T>& out, int n_steps = kSteps) {
        using B = Bring<T>;
        F mins[B::min_vectors > 0 ? B::min_vectors : 1];
        const auto keep = [&](int step, I even, I odd) __attribute__((always_inline)) {
            int32_t* to = reinterpret_cast<int32_t*>(out.words) + step * 2 * L;
            Simd::storei(to, even);
            Simd::storei(to + L, odd);
        };
        if constexpr (T::scales == Scales::ints) {
            B::words(b, keep);
            out.scales[0] = B::d(b);
            if constexpr (B::min_vectors > 0) B::mins(b, mins);
        } else {
            B::words(b, keep, n_steps);
            const auto scales = B::scales(b, n_steps);
            store_scales(out.scales, scales);
            if constexpr (B::min_vectors > 0) B::mins(b, scales, mins, n_steps);
        }
        for (int v = 0; v < B::min_vectors; ++v) Simd::store(out.mins + v * L, mins[v]);
    }

    template <class T>
    static HYBRIDKV_PHASE void bring_rows(const Matrix& w, int64_t r0, int64_t n, int64_t u, Brought<T>* out) {
        const int left = steps_of(w, u);
        for (int64_t i = 0; i < n; ++i) {
            const uint8_t* row = w.data + (r0 + i) * w.row_bytes;
            if constexpr (T::block < kUnit) {
                if (left < kSteps) {
                    if (w.n_in % kStep) bring<T>(LastUnit<T>(row, w.n_in).bytes, out[i], left);
                    else bring<T>(row + u * kUnitOf<T>, out[i], left);
                    continue;
                }
            }
            bring<T>(row + u * kUnitOf<T>, out[i]);
        }
        (void)left;
    }

    // Steps of unit `u` that hold inputs.
    static int steps_of(const Matrix& w, int64_t u) {
        const int64_t left = (w.n_in - u * kUnit + kStep - 1) / kStep;
        return static_cast<int>(left < kSteps ? left : kSteps);
    }

    // Minima of NR output rows and the sums of one row of activations that they meet.
    template <class T, int NR>
    struct Sums {
        static constexpr int count = Bring<T>::min_vectors, room = count > 0 ? count : 1;
        F mins[NR][room], sums[room];

        explicit Sums(const Brought<T>* w) {
#pragma GCC unroll 4
            for (int r = 0; r < NR; ++r) {
#pragma GCC unroll 2
                for (int v = 0; v < count; ++v) mins[r][v] = Simd::load(w[r].mins + v * L);
            }
        }
        void meet(const Meta& meta) {
#pragma GCC unroll 2
            for (int v = 0; v < count; ++v) sums[v] = Simd::load(Bring<T>::sums(meta) + v * L);
        }
        void add(int r, F sum, F scale, F& acc) const {
            F all = Simd::fma(sum, scale, acc);
#pragma GCC unroll 2
            for (int v = 0; v < count; ++v) all = Simd::fma(mins[r][v], sums[v], all);
            acc = all;
        }
    };

    // acc[q][kOut] += products of NR output rows at a time, of `n`, and NQ rows of activations over one unit. Without
    // minima and floats it is all loads and products of integers: the loop is unrolled, and pointers are kept.
    template <class T, int NR, int NQ>
    static HYBRIDKV_PHASE void tiles(const Brought<T>* w, int64_t n, const Taken<NQ>& x, int64_t u, int n_steps, F* acc) {
        const int32_t* a[NQ];
        const Meta* meta[NQ];
        for (int q = 0; q < NQ; ++q) {
            a[q] = x.codes(q, u);
            meta[q] = &x.meta(q, u);
        }
        int64_t r = 0;
        for (; r + NR <= n; r += NR) tile<T, NR, NQ>(w + r, a, meta, n_steps, acc + r);
        if constexpr (NR > 1) {
            for (; r < n; ++r) tile<T, 1, NQ>(w + r, a, meta, n_steps, acc + r);
        }
    }

    template <class T, int NR, int NQ>
    static inline __attribute__((always_inline)) void tile(const Brought<T>* w, const int32_t* const (&a)[NQ],
                                                           const Meta* const (&meta)[NQ], int n_steps, F* acc) {
        (void)n_steps;
        if constexpr (T::scales == Scales::ints) {
            I sum[NR][NQ];
#pragma GCC unroll 8
            for (auto& row : sum) {
#pragma GCC unroll 8
                for (I& s : row) s = Simd::set1i(0);
            }
#pragma GCC unroll 16
            for (int v = 0; v < kUnit / 2; v += L) {
                I wv[NR];
#pragma GCC unroll 4
                for (int r = 0; r < NR; ++r) wv[r] = Simd::loadi(reinterpret_cast<const int32_t*>(w[r].words) + v);
#pragma GCC unroll 8
                for (int q = 0; q < NQ; ++q) {
                    I av = Simd::loadi(a[q] + v);
                    Simd::settle(av);  // loaded once, not by each product
#pragma GCC unroll 4
                    for (int r = 0; r < NR; ++r) Simd::add_dot2(sum[r][q], wv[r], av);
                }
            }
            F d[NR];
#pragma GCC unroll 4
            for (int r = 0; r < NR; ++r) d[r] = Simd::set1(w[r].scales[0]);
            Sums<T, NR> to(w);
#pragma GCC unroll 8
            for (int q = 0; q < NQ; ++q) {
                F scale = Simd::set1(meta[q]->scale);
                Simd::keep(scale);
                to.meet(*meta[q]);
#pragma GCC unroll 4
                for (int r = 0; r < NR; ++r) {
                    to.add(r, Simd::to_float(sum[r][q]), Simd::mul(d[r], scale), acc[q * kOut + r]);
                }
            }
        } else {
            F unit[NR][NQ];
#pragma GCC unroll 8
            for (auto& row : unit) {
#pragma GCC unroll 8
                for (F& s : row) s = Simd::set1(0.f);
            }
            for (int step = 0; step < n_steps; ++step) {
                I even[NR], odd[NR];
                F scale[NR];
#pragma GCC unroll 4
                for (int r = 0; r < NR; ++r) {
                    const int32_t* from = reinterpret_cast<const int32_t*>(w[r].words) + step * 2 * L;
                    even[r] = Simd::loadi(from);
                    odd[r] = Simd::loadi(from + L);
                    scale[r] = step_scale(w[r].scales, step);
                }
#pragma GCC unroll 8
                for (int q = 0; q < NQ; ++q) {
                    const I first = Simd::loadi(a[q] + step * 2 * L), second = Simd::loadi(a[q] + step * 2 * L + L);
#pragma GCC unroll 4
                    for (int r = 0; r < NR; ++r) {
                        I sum = Simd::dot2(Simd::dot2(Simd::set1i(0), even[r], first), odd[r], second);
                        Simd::settle(sum);
                        unit[r][q] = Simd::fma(Simd::to_float(sum), scale[r], unit[r][q]);
                    }
                }
            }
            Sums<T, NR> to(w);
#pragma GCC unroll 8
            for (int q = 0; q < NQ; ++q) {
                F scale = Simd::set1(meta[q]->scale);
                Simd::keep(scale);
                to.meet(*meta[q]);
#pragma GCC unroll 4
                for (int r = 0; r < NR; ++r) to.add(r, unit[r][q], scale, acc[q * kOut + r]);
            }
        }
    }

    // Calls f(Rows<N>, q) for groups of NQ rows and then ever fewer.
    template <int NQ, class Fn>
    static inline void for_rows(int64_t n, Fn&& f, int64_t q = 0) {
        for (; n - q >= NQ; q += NQ) f(Rows<NQ>{}, q);
        if constexpr (NQ > 1) for_rows<NQ == 6 ? 4 : NQ / 2>(n, f, q);
    }

    // Calls f(Rows<N>, q) for groups of tile_rows rows, and for all that are left as soon as that is one group.
    template <class T, class Fn>
    static inline void for_tiles(int64_t n, Fn&& f) {
        int64_t q = 0;
        for (; n - q > most_rows<T>; q += tile_rows<T>) f(Rows<tile_rows<T>>{}, q);
        last<most_rows<T>>(n - q, f, q);
    }

    template <int N, class Fn>
    static inline void last(int64_t n, Fn&& f, int64_t q) {
        if (n == N) f(Rows<N>{}, q);
        else if constexpr (N > 1) last<N - 1>(n, f, q);
    }

    // Asks for a unit's share of the next output rows, which lie behind each other: too many streams for a processor to
    // see by itself.
    static inline void ask_for(const Matrix& w, int64_t r0, int64_t row1, int64_t u, int64_t units) {
        const int64_t n = row1 - r0 < kOut ? row1 - r0 : kOut, share = n * w.row_bytes / units + 1;
        const uint8_t* p = w.data + r0 * w.row_bytes + u * share;
        for (int64_t i = 0; i < share; i += 64) __builtin_prefetch(p + i, 0, 2);
    }

    template <class T>
    struct Scratch {
        F acc[kMost][kOut];
        Brought<T> rows[kOut];
    };

    template <class T>
    static void linear(const Matrix& w, const uint8_t* x, const int32_t* x_rows, int64_t n_rows, int64_t row0,
                       int64_t row1, const Output& out, void* scratch) {
        Scratch<T>& s = *static_cast<Scratch<T>*>(scratch);
        const int64_t units = units_of(w.n_in), stride = order_stride<Order>(w.n_in);
        const int64_t most = rows_in_cache(stride);
        for (int64_t q0 = 0; q0 < n_rows; q0 += most) {
            const int64_t nq = n_rows - q0 < most ? n_rows - q0 : most;
            for (int64_t r0 = row0; r0 < row1; r0 += kOut) {
                const int64_t n = row1 - r0 < kOut ? row1 - r0 : kOut;
                for (int64_t q = 0; q < nq; ++q) for (F& a : s.acc[q]) a = Simd::set1(0.f);
                for (int64_t u = 0; u < units; ++u) {
                    if (q0 == 0 && r0 + kOut < row1) ask_for(w, r0 + kOut, row1, u, units);
                    bring_rows<T>(w, r0, n, u, s.rows);
                    const int n_steps = steps_of(w, u);
                    for_tiles<T>(nq, [&](auto group, int64_t q) {
                        constexpr int NQ = decltype(group)::count;
                        tiles<T, kTileOut, NQ>(s.rows, n, Taken<NQ>(x, stride, x_rows, q0 + q, units), u, n_steps,
                                                 s.acc[q]);
                    });
                }
                for (int64_t q = 0; q < nq; ++q) put(s.acc[q], q0 + q, r0, n, out);
            }
        }
    }

    static void put(const F* acc, int64_t q, int64_t r0, int64_t n, const Output& out) {
        for (int64_t r = 0; r < n; r += L) {
            F sums[L];
            for (int i = 0; i < L; ++i) sums[i] = r + i < n ? acc[r + i] : Simd::set1(0.f);
            out.put(sums, q, r0 + r, n - r);
        }
    }
};

}  // namespace weights
}  // namespace

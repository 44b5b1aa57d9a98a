// Products with activations of 8 bits, AVX2, of few rows and of many. Both end in the same operations on the same integers:
// a row has the same bits whatever is beside it. What meets, and in which lanes, is in int8_levels.h.
#pragma once

#include <new>

#include "int8_levels.h"
#include "many_rows.h"

namespace {
namespace weights {

template <class T>
inline __attribute__((always_inline)) F finish_int8(I sum, const Int8Meta& meta, F lanes, const F* mins, F acc) {
    acc = Simd::fma(Simd::to_float(sum), Simd::mul(lanes, Simd::load(meta.scales)), acc);
#pragma GCC unroll 2
    for (int v = 0; v < Bring<T>::min_vectors; ++v) {
        acc = Simd::fma(mins[v], Simd::load(Bring<T>::sums(meta) + v * L), acc);
    }
    return acc;
}

template <int NQ>
struct Int8Taken {
    static constexpr int unit_bytes = NQ * (kUnit + static_cast<int>(sizeof(Int8Meta)));
    const uint8_t* rows[NQ];
    int64_t units;

    Int8Taken(const uint8_t* x, int64_t stride, const int32_t* x_rows, int64_t q, int64_t n_units) : units(n_units) {
        for (int i = 0; i < NQ; ++i) rows[i] = x + (x_rows ? x_rows[q + i] : q + i) * stride;
    }
    const uint8_t* codes(int q, int64_t u) const { return rows[q] + u * kUnit; }
    const Int8Meta& meta(int q, int64_t u) const { return reinterpret_cast<const Int8Meta*>(rows[q] + units * kUnit)[u]; }
};

// acc[q] += products of one unit
template <class T, int NQ>
inline __attribute__((always_inline)) void int8_unit(const uint8_t* b, const Int8Taken<NQ>& x, int64_t u, F (&acc)[NQ],
                                                     int n_steps = kSteps) {
    constexpr int summed = kSummed<T>;
    I levels[kVectors];
    Levels<T>::get(b, levels, n_steps);
    const Int8Scales<T> with(b, n_steps);
#pragma GCC unroll 8
    for (int q = 0; q < NQ; ++q) {
        const uint8_t* a = x.codes(q, u);
        const Int8Meta& meta = x.meta(q, u);
        I sum = Simd::set1i(0);
        if constexpr (kAboveZero<T>) sum = _mm256_madd_epi16(load_bytes(reinterpret_cast<const uint8_t*>(meta.halves)), with.zeros);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; v += summed) {
            I words = _mm256_maddubs_epi16(levels[v], load_bytes(a + v * kGroup));
#pragma GCC unroll 8
            for (int i = v + 1; i < v + summed; ++i) {
                words = _mm256_add_epi16(words, _mm256_maddubs_epi16(levels[i], load_bytes(a + i * kGroup)));
            }
            Simd::add_dot2(sum, words, with.scales[kSixteen<T> ? v / 4 : 0]);
        }
        acc[q] = finish_int8<T>(sum, meta, with.lanes, with.mins, acc[q]);
    }
}

template <class T, int NQ>
HYBRIDKV_PHASE void int8_few(const Matrix& w, const Int8Taken<NQ>& x, int64_t q0, int64_t row0, int64_t row1,
                             const Output& out) {
    const int64_t whole = w.n_in / kUnit;
    const int left = static_cast<int>(w.n_in % kUnit);
    stream<T, NQ>(
        w, q0, row0, row1, out,
        [&](const uint8_t* b, int64_t u, F(&acc)[NQ])
            __attribute__((always_inline)) { int8_unit<T, NQ>(b, x, u, acc); },
        [&](const uint8_t* row, F(&acc)[NQ]) __attribute__((always_inline)) {
            if (left % kStep) int8_unit<T, NQ>(LastUnit<T>(row, w.n_in).bytes, x, whole, acc);
            else if (left == kUnit / 2) int8_unit<T, NQ>(row + whole * kUnitOf<T>, x, whole, acc, kSteps / 2);
            else if (left) int8_unit<T, NQ>(row + whole * kUnitOf<T>, x, whole, acc, left / kStep);
        });
}

struct ManyInt8 {
    static constexpr int64_t kOut = Many::kOut, kMost = Many::kMost;

    // A unit of an output row.
    template <class T>
    struct Brought {
        I levels[kVectors];
        Int8Scales<T> with;
    };

    template <class T>
    struct Scratch {
        F acc[kMost][kOut];
        alignas(64) uint8_t rows[kOut * sizeof(Brought<T>)];
        Brought<T>* brought() { return reinterpret_cast<Brought<T>*>(rows); }
    };

    static constexpr int kTileOut = 2, kTileRows = 4;

    template <class T>
    static HYBRIDKV_PHASE void bring_rows(const Matrix& w, int64_t r0, int64_t n, int64_t u, Brought<T>* out) {
        const int left = Many::steps_of(w, u);
        for (int64_t i = 0; i < n; ++i) {
            const uint8_t* row = w.data + (r0 + i) * w.row_bytes;
            const auto bring = [&](const uint8_t* b, int n_steps) {
                Levels<T>::get(b, out[i].levels, n_steps);
                new (&out[i].with) Int8Scales<T>(b, n_steps);
            };
            if (left < kSteps && w.n_in % kStep) bring(LastUnit<T>(row, w.n_in).bytes, left);
            else bring(row + u * kUnitOf<T>, left);
        }
    }

    template <class T, int NR, int NQ>
    static inline __attribute__((always_inline)) void tile(const Brought<T>* w, const uint8_t* const (&a)[NQ],
                                                           const Int8Meta* const (&meta)[NQ], F* acc) {
        constexpr int summed = kSummed<T>;
        I sum[NR][NQ];
#pragma GCC unroll 4
        for (int q = 0; q < NQ; ++q) {
#pragma GCC unroll 4
            for (int r = 0; r < NR; ++r) {
                if constexpr (kAboveZero<T>) {
                    sum[r][q] = _mm256_madd_epi16(load_bytes(reinterpret_cast<const uint8_t*>(meta[q]->halves)), w[r].with.zeros);
                } else {
                    sum[r][q] = Simd::set1i(0);
                }
            }
        }
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; v += summed) {
            I words[NR][NQ];
#pragma GCC unroll 8
            for (int i = v; i < v + summed; ++i) {
                I levels[NR];
#pragma GCC unroll 4
                for (int r = 0; r < NR; ++r) levels[r] = w[r].levels[i];
#pragma GCC unroll 4
                for (int q = 0; q < NQ; ++q) {
                    I av = load_bytes(a[q] + i * kGroup);
                    Simd::settle(av);
#pragma GCC unroll 4
                    for (int r = 0; r < NR; ++r) {
                        const I product = _mm256_maddubs_epi16(levels[r], av);
                        if (i == v) words[r][q] = product;
                        else asm("vpaddw %1, %0, %0" : "+x"(words[r][q]) : "x"(product));
                    }
                }
            }
#pragma GCC unroll 4
            for (int r = 0; r < NR; ++r) {
#pragma GCC unroll 4
                for (int q = 0; q < NQ; ++q) Simd::add_dot2(sum[r][q], words[r][q], w[r].with.scales[kSixteen<T> ? v / 4 : 0]);
            }
        }
#pragma GCC unroll 4
        for (int q = 0; q < NQ; ++q) {
#pragma GCC unroll 4
            for (int r = 0; r < NR; ++r) {
                F& to = acc[q * kOut + r];
                to = finish_int8<T>(sum[r][q], *meta[q], w[r].with.lanes, w[r].with.mins, to);
            }
        }
    }

    template <class T, int NR, int NQ>
    static HYBRIDKV_PHASE void tiles(const Brought<T>* w, int64_t n, const Int8Taken<NQ>& x, int64_t u, F* acc) {
        const uint8_t* a[NQ];
        const Int8Meta* meta[NQ];
        for (int q = 0; q < NQ; ++q) {
            a[q] = x.codes(q, u);
            meta[q] = &x.meta(q, u);
        }
        int64_t r = 0;
        for (; r + NR <= n; r += NR) tile<T, NR, NQ>(w + r, a, meta, acc + r);
        if constexpr (NR > 1) {
            for (; r < n; ++r) tile<T, 1, NQ>(w + r, a, meta, acc + r);
        }
    }

    template <class T>
    static void linear(const Matrix& w, const uint8_t* x, const int32_t* x_rows, int64_t n_rows, int64_t row0,
                       int64_t row1, const Output& out, void* scratch) {
        Scratch<T>& s = *static_cast<Scratch<T>*>(scratch);
        const int64_t units = units_of(w.n_in), stride = int8_stride(w.n_in);
        const int64_t most = Many::rows_in_cache(stride);
        for (int64_t q0 = 0; q0 < n_rows; q0 += most) {
            const int64_t nq = n_rows - q0 < most ? n_rows - q0 : most;
            for (int64_t r0 = row0; r0 < row1; r0 += kOut) {
                const int64_t n = row1 - r0 < kOut ? row1 - r0 : kOut;
                for (int64_t q = 0; q < nq; ++q) for (F& a : s.acc[q]) a = Simd::set1(0.f);
                for (int64_t u = 0; u < units; ++u) {
                    if (q0 == 0 && r0 + kOut < row1) Many::ask_for(w, r0 + kOut, row1, u, units);
                    bring_rows<T>(w, r0, n, u, s.brought());
                    Many::for_rows<kTileRows>(nq, [&](auto group, int64_t q) {
                        constexpr int NQ = decltype(group)::count;
                        tiles<T, kTileOut, NQ>(s.brought(), n, Int8Taken<NQ>(x, stride, x_rows, q0 + q, units), u, s.acc[q]);
                    });
                }
                for (int64_t q = 0; q < nq; ++q) Many::put(s.acc[q], q0 + q, r0, n, out);
            }
        }
    }
};

}  // namespace weights
}  // namespace

// Products on NEON: codes of int8 against two terms of int8, rows of the matrix streamed past few rows of activations or
// brought up a few at a time for many. Sums are made in one order in both, so that a row has the same bits beside any
// others.
#pragma once

#include "many_rows.h"

namespace {
namespace weights {

// What types with integer scales keep of a row's scales, or types with float scales.
template <class T, bool Ints = T::scales == Scales::ints>
struct ScalesOf {
    int32_t of[Bring<T>::n_scales];
};
template <class T>
struct ScalesOf<T, false> {
    float of[kGroups];
};

// The terms of 32 activations.
struct Terms {
    int8x16_t high[2], low[2];

    explicit Terms(const int8_t* p)
        : high{vld1q_s8(p), vld1q_s8(p + 16)}, low{vld1q_s8(p + 32), vld1q_s8(p + 48)} {}

    // With the codes of 16 and of all 32 inputs: high terms first, for one shift instead of two sums.
    template <int Half>
    I dot_16(int8x16_t codes) const {
        const I sum = Simd::dot4(Simd::set1i(0), codes, high[Half]);
        return Simd::dot4(vshlq_n_s32(sum, 7), codes, low[Half]);
    }
    I dot_32(Group codes) const {
        const I sum = Simd::dot4(Simd::dot4(Simd::set1i(0), codes.low, high[0]), codes.high, high[1]);
        return Simd::dot4(Simd::dot4(vshlq_n_s32(sum, 7), codes.low, low[0]), codes.high, low[1]);
    }
};

// The sum over a unit of one output row and one row of activations.
template <class T, bool Ints = T::scales == Scales::ints>
struct UnitSum {
    // A lane takes 32 products of one sum, each below 2^26 with its scale: even and odd groups apart.
    I even = Simd::set1i(0), odd = Simd::set1i(0);

    template <int Odd>
    inline __attribute__((always_inline)) void add(int g, Group codes, const Terms& x, const ScalesOf<T>& scales) {
        I& sum = Odd ? odd : even;
        if constexpr (Bring<T>::n_scales == 8) {
            sum = vmlaq_n_s32(sum, x.dot_32(codes), scales.of[g]);
        } else {
            sum = vmlaq_n_s32(sum, x.template dot_16<0>(codes.low), scales.of[2 * g]);
            sum = vmlaq_n_s32(sum, x.template dot_16<1>(codes.high), scales.of[2 * g + 1]);
        }
    }
    F onto(F acc, float d, float scale) const {
        const F both = Simd::set1(d * scale);
        return Simd::fma(Simd::to_float(odd), both, Simd::fma(Simd::to_float(even), both, acc));
    }
};

template <class T>
struct UnitSum<T, false> {
    F sum = Simd::set1(0.f);

    template <int>
    inline __attribute__((always_inline)) void add(int g, Group codes, const Terms& x, const ScalesOf<T>& scales) {
        sum = Simd::fma(Simd::to_float(x.dot_32(codes)), step_scale(scales.of, g), sum);
    }
    F onto(F acc, float, float scale) const { return Simd::fma(sum, Simd::set1(scale), acc); }
};

template <class T>
inline float scale_of_unit(const uint8_t* b) {
    if constexpr (T::scales == Scales::ints) return Bring<T>::d(b);
    else return 1.f;
}

template <class T>
constexpr int kMinRoom = Bring<T>::min_vectors > 0 ? Bring<T>::min_vectors : 1;

template <class T>
inline F add_mins(F acc, const F* mins, const Meta& meta) {
#pragma GCC unroll 4
    for (int v = 0; v < Bring<T>::min_vectors; ++v) acc = Simd::fma(mins[v], Simd::load(Bring<T>::sums(meta) + v * L), acc);
    return acc;
}

// acc[q] += products of one unit
template <class T, int NQ>
inline __attribute__((always_inline)) void stream_unit(const uint8_t* b, const Taken<NQ>& x, int64_t u, F (&acc)[NQ]) {
    ScalesOf<T> scales;
    Bring<T>::scales(b, scales.of);
    UnitSum<T> sums[NQ];
    Bring<T>::codes(b, [&](int j, Group first, Group second) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int q = 0; q < NQ; ++q) {
            const int8_t* terms = reinterpret_cast<const int8_t*>(x.codes(q, u)) + j * 4 * kStep;
            sums[q].template add<0>(2 * j, first, Terms(terms), scales);
            sums[q].template add<1>(2 * j + 1, second, Terms(terms + 2 * kStep), scales);
        }
    });
    F mins[kMinRoom<T>];
    if constexpr (Bring<T>::min_vectors > 0) Bring<T>::mins(b, mins);
    const float d = scale_of_unit<T>(b);
#pragma GCC unroll 4
    for (int q = 0; q < NQ; ++q) {
        acc[q] = add_mins<T>(sums[q].onto(acc[q], d, x.meta(q, u).scale), mins, x.meta(q, u));
    }
}

template <class T, int NQ>
HYBRIDKV_PHASE void stream_rows(const Matrix& w, const Taken<NQ>& x, int64_t q0, int64_t row0, int64_t row1,
                                const Output& out) {
    const int64_t whole = w.n_in / kUnit;
    stream<T, NQ>(
        w, q0, row0, row1, out,
        [&](const uint8_t* b, int64_t u, F(&acc)[NQ])
            __attribute__((always_inline)) { stream_unit<T, NQ>(b, x, u, acc); },
        [&](const uint8_t* row, F(&acc)[NQ]) __attribute__((always_inline)) {
            if (w.n_in % kUnit) stream_unit<T, NQ>(LastUnit<T>(row, w.n_in).bytes, x, whole, acc);
        });
}

// Many rows of activations: output rows are brought up a unit at a time and stay in the first cache while they pass.
struct ManyTerms {
    static constexpr int64_t kOut = Many::kOut, kMost = Many::kMost;
    static constexpr int kTileOut = 2, kTileRows = 4;  // sums, codes and terms of a tile fit the 32 registers

    template <class T>
    struct Brought {
        int8_t codes[kUnit];
        ScalesOf<T> scales;
        F mins[kMinRoom<T>];
        float d;
    };

    template <class T>
    struct Scratch {
        F acc[kMost][kOut];
        Brought<T> rows[kOut];
    };

    template <class T>
    static HYBRIDKV_PHASE void bring(const uint8_t* b, Brought<T>& out) {
        Bring<T>::scales(b, out.scales.of);
        Bring<T>::codes(b, [&](int j, Group first, Group second) __attribute__((always_inline)) {
            Unpack::put(out.codes + j * 2 * kStep, first.low, first.high);
            Unpack::put(out.codes + j * 2 * kStep + kStep, second.low, second.high);
        });
        if constexpr (Bring<T>::min_vectors > 0) Bring<T>::mins(b, out.mins);
        out.d = scale_of_unit<T>(b);
    }

    template <class T>
    static void bring_rows(const Matrix& w, int64_t r0, int64_t n, int64_t u, Brought<T>* out) {
        for (int64_t i = 0; i < n; ++i) {
            const uint8_t* row = w.data + (r0 + i) * w.row_bytes;
            if (T::block == kUnit || (u + 1) * kUnit <= w.n_in) {
                bring<T>(row + u * kUnitOf<T>, out[i]);
            } else if constexpr (T::block < kUnit) {
                bring<T>(LastUnit<T>(row, w.n_in).bytes, out[i]);
            }
        }
    }

    // acc[q][kOut] += products of NR output rows and NQ rows over one unit
    template <class T, int NR, int NQ>
    static inline __attribute__((always_inline)) void tile(const Brought<T>* w, const Taken<NQ>& x, int64_t u, F* acc) {
        UnitSum<T> sums[NR][NQ];
        for (int j = 0; j < kSteps / 2; ++j) {
            step<T, NR, NQ, 0>(w, x, u, 2 * j, sums);
            step<T, NR, NQ, 1>(w, x, u, 2 * j + 1, sums);
        }
#pragma GCC unroll 4
        for (int q = 0; q < NQ; ++q) {
            const Meta& meta = x.meta(q, u);
#pragma GCC unroll 2
            for (int r = 0; r < NR; ++r) {
                F& a = acc[q * kOut + r];
                a = add_mins<T>(sums[r][q].onto(a, w[r].d, meta.scale), w[r].mins, meta);
            }
        }
    }

    template <class T, int NR, int NQ, int Odd>
    static inline __attribute__((always_inline)) void step(const Brought<T>* w, const Taken<NQ>& x, int64_t u, int g,
                                                           UnitSum<T> (&sums)[NR][NQ]) {
        Group codes[NR];
#pragma GCC unroll 2
        for (int r = 0; r < NR; ++r) {
            codes[r] = {vld1q_s8(w[r].codes + g * kStep), vld1q_s8(w[r].codes + g * kStep + 16)};
        }
#pragma GCC unroll 4
        for (int q = 0; q < NQ; ++q) {
            const Terms terms(reinterpret_cast<const int8_t*>(x.codes(q, u)) + g * 2 * kStep);
#pragma GCC unroll 2
            for (int r = 0; r < NR; ++r) sums[r][q].template add<Odd>(g, codes[r], terms, w[r].scales);
        }
    }

    template <class T, int NQ>
    static HYBRIDKV_PHASE void tiles(const Brought<T>* w, int64_t n, const Taken<NQ>& x, int64_t u, F* acc) {
        int64_t r = 0;
        for (; r + kTileOut <= n; r += kTileOut) tile<T, kTileOut, NQ>(w + r, x, u, acc + r);
        for (; r < n; ++r) tile<T, 1, NQ>(w + r, x, u, acc + r);
    }

    template <class T>
    static void linear(const Matrix& w, const uint8_t* x, const int32_t* x_rows, int64_t n_rows, int64_t row0,
                       int64_t row1, const Output& out, void* scratch) {
        Scratch<T>& s = *static_cast<Scratch<T>*>(scratch);
        const int64_t units = units_of(w.n_in), stride = order_stride<Order>(w.n_in), most = Many::rows_in_cache(stride);
        for (int64_t q0 = 0; q0 < n_rows; q0 += most) {
            const int64_t nq = n_rows - q0 < most ? n_rows - q0 : most;
            for (int64_t r0 = row0; r0 < row1; r0 += kOut) {
                const int64_t n = row1 - r0 < kOut ? row1 - r0 : kOut;
                for (int64_t q = 0; q < nq; ++q) for (F& a : s.acc[q]) a = Simd::set1(0.f);
                for (int64_t u = 0; u < units; ++u) {
                    bring_rows<T>(w, r0, n, u, s.rows);
                    Many::for_rows<kTileRows>(nq, [&](auto group, int64_t q) {
                        constexpr int NQ = decltype(group)::count;
                        tiles<T, NQ>(s.rows, n, Taken<NQ>(x, stride, x_rows, q0 + q, units), u, s.acc[q]);
                    });
                }
                for (int64_t q = 0; q < nq; ++q) Many::put(s.acc[q], q0 + q, r0, n, out);
            }
        }
    }
};

}  // namespace weights
}  // namespace

// Products with rows of float32, float16 and bfloat16: each lane sums every L-th input in order, whatever the number of
// rows, so that a row has the same bits beside any others.
#pragma once

#include "many_rows.h"

namespace {
namespace weights {

template <class T>
inline __attribute__((always_inline)) F load_floats(const uint8_t* p);
template <>
inline F load_floats<F32>(const uint8_t* p) { return Simd::load(reinterpret_cast<const float*>(p)); }
template <>
inline F load_floats<F16>(const uint8_t* p) { return Simd::f16(reinterpret_cast<const uint16_t*>(p)); }
template <>
inline F load_floats<BF16>(const uint8_t* p) { return Simd::bf16(reinterpret_cast<const uint16_t*>(p)); }

struct Floats {
    static constexpr int64_t kOut = Many::kOut, kMost = Many::kMost, kDepth = kUnit;
    static constexpr int64_t kRow = kDepth + 8;  // floats: rows side by side start in other halves of a line

    // acc[q * kOut + r] += products of `n` rows, `w_stride` bytes apart and NR at a time, and NQ rows over `depth`
    // inputs, a multiple of L
    template <class T, int NQ, int NR>
    static HYBRIDKV_PHASE void tiles(const uint8_t* w, int64_t w_stride, int64_t n, const uint8_t* const* x,
                                     int64_t depth, F* acc) {
        const uint8_t* from[NQ];
        for (int q = 0; q < NQ; ++q) from[q] = x[q];
        int64_t r = 0;
        for (; r + NR <= n; r += NR) tile<T, NQ, NR>(w + r * w_stride, w_stride, from, depth, acc + r);
        if constexpr (NR > 1) {
            for (; r < n; ++r) tile<T, NQ, 1>(w + r * w_stride, w_stride, from, depth, acc + r);
        }
    }

    template <class T, int NQ, int NR>
    static inline __attribute__((always_inline)) void tile(const uint8_t* w, int64_t w_stride,
                                                           const uint8_t* const (&x)[NQ], int64_t depth, F* acc) {
        F sum[NR][NQ];
#pragma GCC unroll 8
        for (int r = 0; r < NR; ++r) {
#pragma GCC unroll 8
            for (int q = 0; q < NQ; ++q) sum[r][q] = acc[q * kOut + r];
        }
        for (int64_t k = 0; k < depth; k += L) {
            F wv[NR];
#pragma GCC unroll 8
            for (int r = 0; r < NR; ++r) wv[r] = load_floats<T>(w + r * w_stride + k * T::bytes);
#pragma GCC unroll 8
            for (int q = 0; q < NQ; ++q) {
                F xv = Simd::load(reinterpret_cast<const float*>(x[q]) + k);
                Simd::keep(xv);
#pragma GCC unroll 8
                for (int r = 0; r < NR; ++r) sum[r][q] = Simd::fma(wv[r], xv, sum[r][q]);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < NR; ++r) {
#pragma GCC unroll 8
            for (int q = 0; q < NQ; ++q) acc[q * kOut + r] = sum[r][q];
        }
    }

    // Inputs [k, k + depth) of `n` rows as float32, zeros up to `width`.
    template <class T>
    static HYBRIDKV_PHASE void bring(const Matrix& w, int64_t r0, int64_t n, int64_t k, int64_t depth, int64_t width,
                                     float* out) {
        for (int64_t r = 0; r < n; ++r, out += kRow) {
            const uint8_t* from = w.data + (r0 + r) * w.row_bytes + k * T::bytes;
            int64_t i = 0;
            for (; i + L <= depth; i += L) Simd::store(out + i, load_floats<T>(from + i * T::bytes));
            for (; i < depth; ++i) out[i] = T::at(from + i * T::bytes);
            for (; i < width; ++i) out[i] = 0.f;
        }
    }

    struct Scratch {
        F acc[kMost][kOut];
        alignas(64) float rows[kOut][kRow];
    };

    template <class T>
    static void linear(const Matrix& w, const uint8_t* x, const int32_t* x_rows, int64_t n_rows, int64_t row0,
                       int64_t row1, const Output& out, void* scratch) {
        Scratch& s = *static_cast<Scratch*>(scratch);
        const int64_t stride = floats_stride(w.n_in);
        const int64_t most = Many::rows_in_cache(stride);
        for (int64_t q0 = 0; q0 < n_rows; q0 += most) {
            const int64_t nq = n_rows - q0 < most ? n_rows - q0 : most;
            const uint8_t* from[kMost];
            for (int64_t q = 0; q < nq; ++q) from[q] = x + (x_rows ? x_rows[q0 + q] : q0 + q) * stride;
            for (int64_t r0 = row0; r0 < row1; r0 += kOut) {
                const int64_t n = row1 - r0 < kOut ? row1 - r0 : kOut;
                for (int64_t q = 0; q < nq; ++q) for (F& a : s.acc[q]) a = Simd::set1(0.f);
                if (n_rows <= 4) in_place<T>(w, r0, n, from, nq, s);
                else brought<T>(w, r0, n, from, nq, s);
                for (int64_t q = 0; q < nq; ++q) Many::put(s.acc[q], q0 + q, r0, n, out);
            }
        }
    }

    // Few rows: values are widened in registers.
    template <class T>
    static void in_place(const Matrix& w, int64_t r0, int64_t n, const uint8_t* const* x, int64_t nq, Scratch& s) {
        const int64_t whole = w.n_in / L * L, left = w.n_in - whole;
        if (left) bring<T>(w, r0, n, whole, left, L, s.rows[0]);
        Many::for_rows<4>(nq, [&](auto group, int64_t q) {
            constexpr int NQ = decltype(group)::count, NR = 8 / NQ;
            const uint8_t* row = w.data + r0 * w.row_bytes;
            tiles<T, NQ, NR>(row, w.row_bytes, n, x + q, whole, s.acc[q]);
            if (!left) return;
            const uint8_t* rest[NQ];
            for (int i = 0; i < NQ; ++i) rest[i] = x[q + i] + whole * 4;
            tiles<F32, NQ, NR>(reinterpret_cast<const uint8_t*>(s.rows), kRow * 4, n, rest, L, s.acc[q]);
        });
    }

    // Many rows: values are widened once for all.
    template <class T>
    static void brought(const Matrix& w, int64_t r0, int64_t n, const uint8_t* const* x, int64_t nq, Scratch& s) {
        for (int64_t k = 0; k < w.n_in; k += kDepth) {
            const int64_t depth = w.n_in - k < kDepth ? w.n_in - k : kDepth, width = (depth + L - 1) / L * L;
            bring<T>(w, r0, n, k, depth, width, s.rows[0]);
            Many::for_tiles<T>(nq, [&](auto group, int64_t q) {
                constexpr int NQ = decltype(group)::count, NR = L == 16 ? 4 : 2;
                const uint8_t* from[NQ];
                for (int i = 0; i < NQ; ++i) from[i] = x[q + i] + k * 4;
                tiles<F32, NQ, NR>(reinterpret_cast<const uint8_t*>(s.rows), kRow * 4, n, from, width, s.acc[q]);
            });
        }
    }
};

}  // namespace weights
}  // namespace

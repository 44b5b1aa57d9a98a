// Products with few rows of activations: a row of the matrix is streamed once, its codes meet all rows in registers.
#pragma once

namespace {
namespace weights {

using hybridkv::Matrix;

// How far ahead a matrix is asked for: in two steps, into the second cache and then into the first, or on AMD for one use,
// which keeps it out of the second cache, if the activations stay in the first one: else their loads would wait behind
// requests to memory. On Zen 4, GB/s of q4_K and q6_K, two threads: rows of 2560 inputs 16 in one step and 13, 15 in two;
// of 9216, 11, 10 and 12, 14. Intel's first cache has too few requests under way for memory: one row of q8_0 on Sapphire
// Rapids, AVX2, one thread: 7.5 GB/s in one step, 14 in two.
constexpr int kAhead = 3072, kFar = 8192, kNear = 1024;
#if defined(__x86_64__)
const bool kPastSecond = (__builtin_cpu_init(), __builtin_cpu_is("amd"));
#else
constexpr bool kPastSecond = true;
#endif
constexpr int kStays = 12 << 10;  // bytes of activations that stay

// Where the results of a call go.
struct Output {
    float* y;
    int64_t stride;
    bool add;

    // Sums of L output rows from r on for one row of y, of which `n` are there.
    void put(const F (&acc)[L], int64_t q, int64_t r, int64_t n) const {
        const F sums = Simd::reduce_all(acc);
        float* out = y + q * stride + r;
        if (n >= L) {
            Simd::store(out, add ? Simd::add(Simd::load(out), sums) : sums);
        } else {
            float each[L];
            Simd::store(each, sums);
            for (int64_t i = 0; i < n; ++i) out[i] = add ? out[i] + each[i] : each[i];
        }
    }
};

// Activations of NQ rows.
template <int NQ>
struct Taken {
    static constexpr int unit_bytes = NQ * (kUnitBytes + static_cast<int>(sizeof(Meta)));
    const uint8_t* rows[NQ];
    int64_t units;

    Taken(const uint8_t* x, int64_t stride, const int32_t* x_rows, int64_t q, int64_t n_units) : units(n_units) {
        for (int i = 0; i < NQ; ++i) rows[i] = x + (x_rows ? x_rows[q + i] : q + i) * stride;
    }
    const int32_t* codes(int q, int64_t u) const { return reinterpret_cast<const int32_t*>(rows[q] + u * kUnitBytes); }
    const Meta& meta(int q, int64_t u) const {
        return reinterpret_cast<const Meta*>(rows[q] + units * kUnitBytes)[u];
    }
};

// The last unit of a row that has fewer blocks than a unit: a copy with zeros behind it.
template <class T>
struct LastUnit {
    static constexpr int blocks = kUnit / T::block;
    uint8_t bytes[blocks * T::bytes] = {};

    LastUnit(const uint8_t* row, int64_t n_in) {
        const int64_t first = n_in / kUnit * kUnit;
        std::memcpy(bytes, row + first / T::block * T::bytes, static_cast<size_t>((n_in - first) / T::block * T::bytes));
    }
};

template <class T>
constexpr int kUnitOf = kUnit / T::block * T::bytes;  // bytes of a unit

// acc[q] += products of one unit, or of its first steps where the type's blocks are shorter than a unit
template <class T, int NQ>
inline __attribute__((always_inline)) void few_unit(const uint8_t* b, const Taken<NQ>& x, int64_t u, F (&acc)[NQ],
                                                    int n_steps = kSteps) {
    using B = Bring<T>;
    F mins[B::min_vectors > 0 ? B::min_vectors : 1];
    if constexpr (T::scales == Scales::ints) {
        constexpr int chains = NQ <= 4 ? 2 : 1;
        I sum[NQ][chains];
#pragma GCC unroll 8
        for (auto& row : sum) for (I& s : row) s = Simd::set1i(0);
        B::words(b, [&](int step, I even, I odd) __attribute__((always_inline)) {
#pragma GCC unroll 8
            for (int q = 0; q < NQ; ++q) {
                const int32_t* a = x.codes(q, u) + step * 2 * L;
                Simd::add_dot2(sum[q][0], even, Simd::loadi(a));
                Simd::add_dot2(sum[q][chains - 1], odd, Simd::loadi(a + L));
            }
        });
        const F d = Simd::set1(B::d(b));
        if constexpr (B::min_vectors > 0) B::mins(b, mins);
#pragma GCC unroll 8
        for (int q = 0; q < NQ; ++q) {
            acc[q] = Simd::fma(Simd::to_float(chains == 2 ? add_ints(sum[q][0], sum[q][chains - 1]) : sum[q][0]),
                               Simd::mul(d, Simd::set1(x.meta(q, u).scale)), acc[q]);
        }
    } else {
        const auto scales = B::scales(b, n_steps);
        float each[kGroups];
        store_scales(each, scales);
        if constexpr (B::min_vectors > 0) B::mins(b, scales, mins, n_steps);
        F unit[NQ];
#pragma GCC unroll 8
        for (F& sum : unit) sum = Simd::set1(0.f);
        B::words(b, [&](int step, I even, I odd) __attribute__((always_inline)) {
            const F scale = step_scale(each, step);
#pragma GCC unroll 8
            for (int q = 0; q < NQ; ++q) {
                const int32_t* a = x.codes(q, u) + step * 2 * L;
                I sum = Simd::dot2(Simd::dot2(Simd::set1i(0), even, Simd::loadi(a)), odd, Simd::loadi(a + L));
                Simd::settle(sum);
                unit[q] = Simd::fma(Simd::to_float(sum), scale, unit[q]);
            }
        }, n_steps);
#pragma GCC unroll 8
        for (int q = 0; q < NQ; ++q) acc[q] = Simd::fma(unit[q], Simd::set1(x.meta(q, u).scale), acc[q]);
    }
#pragma GCC unroll 8
    for (int q = 0; q < NQ; ++q) {
        for (int v = 0; v < B::min_vectors; ++v) {
            acc[q] = Simd::fma(mins[v], Simd::load(B::sums(x.meta(q, u)) + v * L), acc[q]);
        }
    }
}

// Streams output rows [row0, row1): unit(b, u, acc) adds the products of a whole unit, last(row, acc) those of what is
// behind the whole ones, both to acc[q].
template <class T, int NQ, class Unit, class Last>
inline __attribute__((always_inline)) void stream(const Matrix& w, int64_t q0, int64_t row0, int64_t row1,
                                                  const Output& out, const Unit& unit, const Last& last) {
    const int64_t whole = w.n_in / kUnit;
    const bool past = kPastSecond && whole * Taken<NQ>::unit_bytes <= kStays;
    for (int64_t r = row0; r < row1; r += L) {
        const int64_t n = row1 - r < L ? row1 - r : L;
        F sums[NQ][L];
        for (int i = 0; i < L; ++i) {
            F acc[NQ];
            for (F& a : acc) a = Simd::set1(0.f);
            if (i < n) {
                const uint8_t* row = w.data + (r + i) * w.row_bytes;
                for (int64_t u = 0; u < whole; ++u) {
                    const uint8_t* b = row + u * kUnitOf<T>;
                    for (int line = 0; line < kUnitOf<T>; line += 64) {
                        if (past) {
                            __builtin_prefetch(b + kAhead + line, 0, 0);
                        } else {
                            __builtin_prefetch(b + kFar + line, 0, 2);
                            __builtin_prefetch(b + kNear + line, 0, 3);
                        }
                    }
                    unit(b, u, acc);
                }
                if constexpr (T::block < kUnit) last(row, acc);
            }
            for (int q = 0; q < NQ; ++q) sums[q][i] = acc[q];
        }
        for (int q = 0; q < NQ; ++q) out.put(sums[q], q0 + q, r, n);
    }
}

template <class T, int NQ>
HYBRIDKV_PHASE void few_rows(const Matrix& w, const Taken<NQ>& x, int64_t q0, int64_t row0, int64_t row1,
                             const Output& out) {
    const int64_t whole = w.n_in / kUnit;
    const int left = static_cast<int>(w.n_in % kUnit);
    stream<T, NQ>(
        w, q0, row0, row1, out,
        [&](const uint8_t* b, int64_t u, F(&acc)[NQ])
            __attribute__((always_inline)) { few_unit<T, NQ>(b, x, u, acc); },
        [&](const uint8_t* row, F(&acc)[NQ]) __attribute__((always_inline)) {
            const uint8_t* b = row + whole * kUnitOf<T>;
            if (left % kStep) few_unit<T, NQ>(LastUnit<T>(row, w.n_in).bytes, x, whole, acc);
            else if (left == kUnit / 2) few_unit<T, NQ>(b, x, whole, acc, kSteps / 2);
            else if (left) few_unit<T, NQ>(b, x, whole, acc, left / kStep);
        });
}

}  // namespace weights
}  // namespace

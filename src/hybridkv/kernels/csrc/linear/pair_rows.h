// Products with types of a float scale per 32 inputs, AVX2. A vector has a half of each of two blocks, so that the 64
// products of a pair of blocks end in one vector of sums, which is converted and scaled once: nine instructions, six of
// them for the units that multiply, where blocks one by one took ten and eight. Up to eight rows of activations share the
// words of a pair in registers. Whatever their number the operations are the same: a row has the same bits as alone.
#pragma once

#include "many_rows.h"

namespace {
namespace weights {

constexpr int kPair = 2 * kGroup, kPairs = kUnit / kPair;

// Of each pair of blocks: the even inputs of both first halves, the odd ones, then those of the second halves.
struct PairOrder {
    static constexpr int unit_bytes = kUnitBytes;

    static void put(const int32_t* c, uint8_t* to) {
        int32_t* out = reinterpret_cast<int32_t*>(to);
        for (int p = 0; p < kUnit; p += kPair) {
            for (int half = 0; half < kGroup; half += kGroup / 2, out += 2 * L) {
                const I a0 = Simd::loadi(c + p + half), a1 = Simd::loadi(c + p + half + L);
                const I b0 = Simd::loadi(c + p + kGroup + half), b1 = Simd::loadi(c + p + kGroup + half + L);
                Simd::storei(out, words<0x88>(a0, a1, b0, b1));
                Simd::storei(out + L, words<0xdd>(a0, a1, b0, b1));
            }
        }
    }

private:
    // Every second value of sixteen and of sixteen others, in order.
    template <int Which>
    static I words(I a0, I a1, I b0, I b1) {
        const auto of = [](I x, I y) {
            return _mm256_castps_si256(_mm256_shuffle_ps(_mm256_castsi256_ps(x), _mm256_castsi256_ps(y), Which));
        };
        const I packed = _mm256_packs_epi32(of(a0, a1), of(b0, b1));  // in quarters: a, b of lower halves, of upper ones
        return _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    }
};

// The bytes of a pair of blocks that begins at b: first halves, second halves.
template <class T>
struct Pair;

inline I both_halves(const uint8_t* b, int bytes) { return _mm256_set_m128i(load_half(b + bytes), load_half(b)); }

template <>
struct Pair<Q8_0> {
    static constexpr bool is_signed = true;
    static void get(const uint8_t* b, I& first, I& second) {
        first = both_halves(b + 2, Q8_0::bytes);
        second = both_halves(b + 18, Q8_0::bytes);
    }
};

template <class T, int At>
struct PairOfNibbles {
    static constexpr bool is_signed = false;
    static void get(const uint8_t* b, I& first, I& second) {
        const I both = both_halves(b + At, T::bytes);
        first = mask(both, 15);
        second = mask(shift<-4>(both), 15);
    }
};
template <>
struct Pair<Q4_0> : PairOfNibbles<Q4_0, 2> {};
template <>
struct Pair<Q4_1> : PairOfNibbles<Q4_1, 4> {};

// With fifth bits in 32 bits before the nibbles.
template <class T, int At>
struct PairOfFifths {
    static constexpr bool is_signed = false;
    static void get(const uint8_t* b, I& first, I& second) {
        PairOfNibbles<T, At + 4>::get(b, first, second);
        const uint32_t a = load_as<uint32_t>(b + At), c = load_as<uint32_t>(b + T::bytes + At);
        first = _mm256_or_si256(first, bits((a & 0xffffu) | c << 16));
        second = _mm256_or_si256(second, bits(a >> 16 | (c & 0xffff0000u)));
    }
    static I bits(uint32_t of) { return Unpack::bits(reinterpret_cast<const uint8_t*>(&of), 16); }
};
template <>
struct Pair<Q5_0> : PairOfFifths<Q5_0, 2> {};
template <>
struct Pair<Q5_1> : PairOfFifths<Q5_1, 4> {};

template <class T, int At>
struct PairOfBook {
    static constexpr bool is_signed = true;
    static void get(const uint8_t* b, const int8_t* of, I& first, I& second) {
        const I book = book_of(of);
        PairOfNibbles<T, At>::get(b, first, second);
        first = _mm256_shuffle_epi8(book, first);
        second = _mm256_shuffle_epi8(book, second);
    }
};
template <>
struct Pair<IQ4_NL> : PairOfBook<IQ4_NL, 2> {
    static void get(const uint8_t* b, I& first, I& second) { PairOfBook::get(b, kIq4nl, first, second); }
};
template <>
struct Pair<MXFP4> : PairOfBook<MXFP4, 1> {
    static void get(const uint8_t* b, I& first, I& second) { PairOfBook::get(b, kMxfp4, first, second); }
};

template <class T>
inline I even_words(I bytes) {
    if constexpr (Pair<T>::is_signed) return _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8);
    else return _mm256_and_si256(bytes, _mm256_set1_epi16(255));
}
template <class T>
inline I odd_words(I bytes) {
    return Pair<T>::is_signed ? _mm256_srai_epi16(bytes, 8) : _mm256_srli_epi16(bytes, 8);
}

// acc[q] += products of one unit, or of its first pairs where a row ends
template <class T, int NQ>
inline __attribute__((always_inline)) void pair_unit(const uint8_t* b, const Taken<NQ>& x, int64_t u, F (&acc)[NQ],
                                                     int n_pairs = kPairs) {
    using B = Bring<T>;
    const F scales = B::scales(b, 2 * n_pairs);
    // Of first blocks in the lower half, of second ones in the upper half.
    const F apart = _mm256_permutevar8x32_ps(scales, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
    F unit[NQ];
#pragma GCC unroll 8
    for (F& sum : unit) sum = Simd::set1(0.f);
#pragma GCC unroll 4
    for (int p = 0; p < n_pairs; ++p) {
        I first, second;
        Pair<T>::get(b + 2 * p * T::bytes, first, second);
        I words[4] = {even_words<T>(first), odd_words<T>(first), even_words<T>(second), odd_words<T>(second)};
#pragma GCC unroll 4
        for (I& w : words) Simd::settle(w);
        F scale = _mm256_permutevar_ps(apart, Simd::set1i(p));
        Simd::keep(scale);
#pragma GCC unroll 8
        for (int q = 0; q < NQ; ++q) {
            const int32_t* a = x.codes(q, u) + p * 4 * L;
            I sum = _mm256_madd_epi16(words[0], Simd::loadi(a));
#pragma GCC unroll 3
            for (int i = 1; i < 4; ++i) Simd::add_dot2(sum, words[i], Simd::loadi(a + i * L));
            unit[q] = Simd::fma(Simd::to_float(sum), scale, unit[q]);
        }
    }
    F mins[B::min_vectors > 0 ? B::min_vectors : 1];
    if constexpr (B::min_vectors > 0) B::mins(b, scales, mins, 2 * n_pairs);
#pragma GCC unroll 8
    for (int q = 0; q < NQ; ++q) {
        acc[q] = Simd::fma(unit[q], Simd::set1(x.meta(q, u).scale), acc[q]);
        for (int v = 0; v < B::min_vectors; ++v) {
            acc[q] = Simd::fma(mins[v], Simd::load(B::sums(x.meta(q, u)) + v * L), acc[q]);
        }
    }
}

// A last unit that is neither whole nor half, for one row of the activations: all take turns, so one copy is enough.
template <class T>
HYBRIDKV_PHASE F pair_odd(const Matrix& w, const uint8_t* row, const Taken<1>& x, F sum) {
    const int64_t whole = w.n_in / kUnit;
    const int left = static_cast<int>(w.n_in % kUnit), n_pairs = (left + kPair - 1) / kPair;
    F acc[1] = {sum};
    if (left % kPair) pair_unit<T, 1>(LastUnit<T>(row, w.n_in).bytes, x, whole, acc, n_pairs);
    else pair_unit<T, 1>(row + whole * kUnitOf<T>, x, whole, acc, n_pairs);
    return acc[0];
}

// The same of whole pairs, for as many rows as prompts have: their words are unpacked once.
template <class T, int NQ>
HYBRIDKV_PHASE void pair_rest(const uint8_t* b, const Taken<NQ>& x, int64_t u, F (&acc)[NQ], int n_pairs) {
    pair_unit<T, NQ>(b, x, u, acc, n_pairs);
}

constexpr int kTogether = 8;  // rows of activations of a prompt that meet a pair in registers

// What is behind the whole units of a row.
template <class T, int NQ>
inline __attribute__((always_inline)) void pair_last(const Matrix& w, const uint8_t* row, const Taken<NQ>& x, F (&acc)[NQ]) {
    const int64_t whole = w.n_in / kUnit, left = w.n_in % kUnit;
    const uint8_t* last = row + whole * kUnitOf<T>;
    if (left == kUnit / 2) return pair_unit<T, NQ>(last, x, whole, acc, kPairs / 2);
    if constexpr (NQ == kTogether) {
        if (left && left % kPair == 0) return pair_rest<T, NQ>(last, x, whole, acc, static_cast<int>(left / kPair));
    }
    if (!left) return;
    for (int q = 0; q < NQ; ++q) acc[q] = pair_odd<T>(w, row, Taken<1>(x.rows[q], 0, nullptr, 0, x.units), acc[q]);
}

template <class T, int NQ>
HYBRIDKV_PHASE void few_pair_rows(const Matrix& w, const Taken<NQ>& x, int64_t q0, int64_t row0, int64_t row1,
                                  const Output& out) {
    stream<T, NQ>(
        w, q0, row0, row1, out,
        [&](const uint8_t* b, int64_t u, F(&acc)[NQ])
            __attribute__((always_inline)) { pair_unit<T, NQ>(b, x, u, acc); },
        [&](const uint8_t* row, F(&acc)[NQ]) __attribute__((always_inline)) { pair_last<T, NQ>(w, row, x, acc); });
}

struct ManyPairs {
    static constexpr int64_t kOut = Many::kOut, kMost = Many::kMost;
    static constexpr int64_t kInFirst = 32 << 10;  // bytes of activations that pass for every output row at once
    static constexpr int64_t kColumns = (24 << 10) / (kTogether * kUnitBytes);  // units that stay in the first cache else

    static bool few(int64_t n_rows, int64_t n_in) {
        return n_rows <= kTogether && n_rows * units_of(n_in) * kUnitBytes <= kInFirst;
    }

    template <class T>
    struct Scratch {
        F acc[kMost / kTogether][kOut][kTogether];
    };

    // acc[output row][q] += products of units [u0, u1) of n output rows. Asks for rows to come if `ask`.
    template <class T>
    static HYBRIDKV_PHASE void block(const Matrix& w, int64_t r0, int64_t n, const Taken<kTogether>& x, int64_t u0,
                                     int64_t u1, bool ask, F (*acc)[kTogether]) {
        constexpr int NQ = kTogether;
        const int64_t whole = w.n_in / kUnit < u1 ? w.n_in / kUnit : u1;
        const bool all = u0 == 0 && u1 * kUnit >= w.n_in;
        const int64_t far = all ? kFar : 3 * w.row_bytes, near = all ? kNear : w.row_bytes;
        const uint8_t* row = w.data + r0 * w.row_bytes;
        for (int64_t r = 0; r < n; ++r, row += w.row_bytes) {
            F sums[NQ];
#pragma GCC unroll 8
            for (int q = 0; q < NQ; ++q) sums[q] = acc[r][q];
            for (int64_t u = u0; u < whole; ++u) {
                const uint8_t* b = row + u * kUnitOf<T>;
                if (ask) {
                    for (int line = 0; line < kUnitOf<T>; line += 64) {
                        __builtin_prefetch(b + far + line, 0, 2);
                        __builtin_prefetch(b + near + line, 0, 3);
                    }
                }
                pair_unit<T, NQ>(b, x, u, sums);
            }
            if (whole < u1) pair_last<T, NQ>(w, row, x, sums);
#pragma GCC unroll 8
            for (int q = 0; q < NQ; ++q) acc[r][q] = sums[q];
        }
    }

    template <class T>
    static void linear(const Matrix& w, const uint8_t* x, const int32_t* x_rows, int64_t n_rows, int64_t row0,
                       int64_t row1, const Output& out, void* scratch) {
        Scratch<T>& s = *static_cast<Scratch<T>*>(scratch);
        const int64_t units = units_of(w.n_in), stride = order_stride<PairOrder>(w.n_in);
        const int64_t blocks = (units + kColumns - 1) / kColumns, columns = (units + blocks - 1) / blocks;
        const int64_t most = Many::rows_in_cache(stride) / kTogether * kTogether;
        for (int64_t q0 = 0; q0 < n_rows; q0 += most) {
            const int64_t nq = n_rows - q0 < most ? n_rows - q0 : most, together = nq / kTogether * kTogether;
            for (int64_t r0 = row0; r0 < row1; r0 += kOut) {
                const int64_t n = row1 - r0 < kOut ? row1 - r0 : kOut;
                for (int64_t q = 0; q < together; q += kTogether) {
                    for (auto& sums : s.acc[q / kTogether]) for (F& sum : sums) sum = Simd::set1(0.f);
                }
                for (int64_t u = 0; u < units; u += columns) {
                    const int64_t u1 = u + columns < units ? u + columns : units;
                    for (int64_t q = 0; q < together; q += kTogether) {
                        const Taken<kTogether> taken(x, stride, x_rows, q0 + q, units);
                        block<T>(w, r0, n, taken, u, u1, q0 + q == 0, s.acc[q / kTogether]);
                    }
                }
                for (int64_t q = 0; q < together; ++q) put(s.acc[q / kTogether], q % kTogether, q0 + q, r0, n, out);
                if (together == nq) continue;
                // The rest, while these output rows are in a cache.
                Many::last<kTogether - 1>(nq - together, [&](auto group, int64_t q) {
                    constexpr int NQ = decltype(group)::count;
                    few_pair_rows<T, NQ>(w, Taken<NQ>(x, stride, x_rows, q, units), q, r0, r0 + n, out);
                }, q0 + together);
            }
        }
    }

    static void put(const F (*acc)[kTogether], int64_t at, int64_t q, int64_t r0, int64_t n, const Output& out) {
        for (int64_t r = 0; r < n; r += L) {
            F sums[L];
            for (int i = 0; i < L; ++i) sums[i] = r + i < n ? acc[r + i][at] : Simd::set1(0.f);
            out.put(sums, q, r0 + r, n - r);
        }
    }
};

}  // namespace weights
}  // namespace

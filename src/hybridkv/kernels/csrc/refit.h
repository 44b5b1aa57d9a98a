// What a refit does to a block of values: scales, and codes, that fit it better than the scale rule's. Bit for bit what
// hybridkv/formats computes in torch. Included once per instruction set; compiled without contraction, because the order
// of roundings is the contract.
#pragma once

#include <cmath>
#include <type_traits>

#include "stage.h"

namespace {

// float32 a * b + c with one rounding, as the torch encoder defines it: through float64.
inline float fused(float a, float b, float c) {
    return static_cast<float>(static_cast<double>(a) * static_cast<double>(b) + static_cast<double>(c));
}

inline float as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline bool is_finite(float x) { return x - x == 0.f; }

inline float inverse(float d) {
    const float i = 1.f / d;
    return is_finite(i) ? i : 0.f;
}

// What a block stores beside its codes.
struct BlockScale {
    float d, low, sum;
};

// Bits of the largest magnitude; a NaN's are above all others, so one NaN makes the scale NaN.
inline __attribute__((always_inline)) uint32_t top_bits(const float* x, int64_t n) {
    uint32_t top = 0;
    for (int64_t i = 0; i < n; ++i) {
        uint32_t bits;
        std::memcpy(&bits, x + i, 4);
        bits &= 0x7fffffff;
        top = bits > top ? bits : top;
    }
    return top;
}

// The first x[i] that equals `value`; n if there is none. Without an early end, so that a compiler makes vectors of it.
inline __attribute__((always_inline)) int32_t first_equal(const uint32_t* x, int32_t n, uint32_t mask, uint32_t value) {
    int32_t first = n;
    for (int32_t i = 0; i < n; ++i) {
        const int32_t at = (x[i] & mask) == value ? i : n;
        first = at < first ? at : first;
    }
    return first;
}

inline __attribute__((always_inline)) float signed_top(const float* x, int64_t n) {
    alignas(64) uint32_t bits[kBlock];
    const uint32_t top = top_bits(x, n);
    for (int64_t at = 0; at < n; at += kBlock) {
        const int32_t count = n - at < kBlock ? static_cast<int32_t>(n - at) : kBlock;
        std::memcpy(bits, x + at, static_cast<size_t>(count) * sizeof(float));
        const int32_t i = first_equal(bits, count, 0x7fffffff, top);
        if (i < count) return x[at + i];
    }
    return 0.f;
}

// Weighted least squares; lanes are summed in order, the two halves of the block side by side.
inline __attribute__((always_inline)) float refit_pairs(const float* x, const float* q, int64_t n, float d) {
    const float inv = inverse(d);
    const int64_t half = (n + 1) / 2;
    float sumqx = 0.f, sumq2 = 0.f;
    const auto weight = [&](int64_t i) { return (x[i] * inv) * (x[i] * inv); };
    constexpr int64_t kChunk = kBlock / 2;
    float qx[kChunk], q2[kChunk];
    for (int64_t at = 0; at < half; at += kChunk) {
        const int64_t count = half - at < kChunk ? half - at : kChunk;
        for (int64_t k = 0; k < count; ++k) {
            const int64_t i = at + k, j = i + half;
            const float w = weight(i);
            float pair_qx = 0.f, pair_q2 = 0.f;
            if (j < n) {
                const float v = weight(j);
                pair_qx = v * x[j] * q[j];
                pair_q2 = v * q[j] * q[j];
            }
            qx[k] = fused(w * x[i], q[i], pair_qx);
            q2[k] = fused(w * q[i], q[i], pair_q2);
        }
        for (int64_t k = 0; k < count; ++k) {
            sumqx += qx[k];
            sumq2 += q2[k];
        }
    }
    const float fitted = sumqx / sumq2;
    return is_finite(fitted) ? fitted : d;
}

// Sum of a block's terms, the upper half onto the lower until one is left. Overwrites them.
inline float fold(float* terms) {
    for (int n = kBlock / 2; n >= Simd::lanes; n /= 2) {
        for (int i = 0; i < n; i += Simd::lanes) {
            Simd::store(terms + i, Simd::add(Simd::load(terms + i), Simd::load(terms + i + n)));
        }
    }
    return Simd::reduce_add(Simd::load(terms));
}

// q4_1, q5_1: least squares for scale and minimum, given the codes q, whose sum is `sum_q`.
inline void refit_line(const float* x, const float* q, float sum_q, BlockScale& b) {
    float above[kBlock], product[kBlock], sum_q2 = 0.f;
    for (int i = 0; i < kBlock; ++i) {
        above[i] = x[i] - b.low;
        product[i] = q[i] * above[i];
    }
    for (int i = 0; i < kBlock; ++i) sum_q2 += q[i] * q[i];
    constexpr float n = kBlock;
    const float sum_x = fold(above), sum_qx = fold(product);
    const float slope = (n * sum_qx - sum_q * sum_x) / (n * sum_q2 - sum_q * sum_q);
    const float shift = (sum_x - slope * sum_q) / n;
    if (!is_finite(slope) || !is_finite(shift)) return;
    b.d = slope;
    b.low += shift;
}

// The hq formats: several fits, each of the nearest codes and their scale by least squares; the one with the least error
// counts. The codebook's second half, of `Half` values, is the negative of its first.
//
// What a start makes of the magnitudes, all starts step by step: one alone would wait for its own stores. In bytes: the
// middles between two levels are halves of a unit, so `2 * size * scale`, rounded down, reaches what the number reaches.
template <int Half>
struct ByteStarts {
    typedef uint8_t Bytes __attribute__((vector_size(kBlock), aligned(1)));
    alignas(64) int16_t whole[kStarts][kBlock];
    alignas(64) uint8_t y[kStarts][kBlock], value[kStarts][kBlock];
    uint8_t level[Half], step[Half], middle[Half];

    ByteStarts(const int8_t* levels, const float* size, const float* scales) {
        for (int k = 0; k < Half; ++k) level[k] = static_cast<uint8_t>(levels[k]);
        for (int k = 0; k + 1 < Half; ++k) {
            step[k] = static_cast<uint8_t>(level[k + 1] - level[k]);
            middle[k] = static_cast<uint8_t>(level[k] + level[k + 1]);
        }
        for (int s = 0; s < kStarts; ++s) {
            for (int i = 0; i < kBlock; i += Simd::lanes) {  // at most 2 * 248; a NaN reaches nothing
                const Simd::F x = Simd::mul(Simd::load(size + i), Simd::set1(scales[s]));
                Simd::store_i16(whole[s] + i, Simd::truncate(Simd::max(Simd::add(x, x), Simd::set1(0.f))));
            }
        }
        for (int s = 0; s < kStarts; ++s) {
            for (int i = 0; i < kBlock; ++i) y[s][i] = static_cast<uint8_t>(whole[s][i] < 255 ? whole[s][i] : 255);
        }
        for (int s = 0; s < kStarts; ++s) count(y[s], level[0], step, value[s]);
    }

    // first + steps of every middle that y reaches
    inline __attribute__((always_inline)) void count(const uint8_t* halves, uint8_t first, const uint8_t* steps,
                                                     uint8_t* out) const {
        Bytes y, sum = Bytes{} + first;
        std::memcpy(&y, halves, kBlock);
        for (int k = 0; k + 1 < Half; ++k) sum += (y >= Bytes{} + middle[k]) & (Bytes{} + steps[k]);
        std::memcpy(out, &sum, kBlock);
    }

    inline __attribute__((always_inline)) void values(int s, float* q) const {
        for (int i = 0; i < kBlock; ++i) q[i] = static_cast<float>(static_cast<int32_t>(value[s][i]));
    }
    // Positions among the levels; of no start, 0.
    void indices(int s, uint8_t* index) const {
        constexpr uint8_t none[kBlock] = {};
        uint8_t ones[Half];
        for (uint8_t& one : ones) one = 1;
        count(s < 0 ? none : y[s], 0, ones, index);
    }
};

// The same where a comparison makes a mask, and adding under it is one instruction.
template <int Half>
struct MaskedStarts {
    float level[Half], step[Half], middle[Half];
    const float *size, *scales;

    MaskedStarts(const int8_t* levels, const float* sizes, const float* all) : size(sizes), scales(all) {
        for (int k = 0; k < Half; ++k) level[k] = levels[k];
        for (int k = 0; k + 1 < Half; ++k) {
            step[k] = level[k + 1] - level[k];
            middle[k] = (level[k] + level[k + 1]) / 2.f;
        }
    }

    inline __attribute__((always_inline)) Simd::F count(int i, float scale, float first, const float* steps) const {
        const Simd::F y = Simd::mul(Simd::load(size + i), Simd::set1(scale));
        Simd::F sum = Simd::set1(first);
        for (int k = 0; k + 1 < Half; ++k) sum = Simd::add_if_ge(sum, Simd::set1(steps[k]), y, Simd::set1(middle[k]));
        return sum;
    }

    inline __attribute__((always_inline)) void values(int s, float* q) const {
        for (int i = 0; i < kBlock; i += Simd::lanes) Simd::store(q + i, count(i, scales[s], level[0], step));
    }
    void indices(int s, uint8_t* out) const {
        float ones[Half], index[kBlock];
        for (float& one : ones) one = 1.f;
        for (int i = 0; i < kBlock; i += Simd::lanes) Simd::store(index + i, count(i, s < 0 ? NAN : scales[s], 0.f, ones));
        for (int i = 0; i < kBlock; ++i) out[i] = static_cast<uint8_t>(static_cast<int32_t>(index[i]));
    }
};

// Codes and scale of the best fit; `d` where none is a number.
template <int Half>
inline float fit_starts(const Format& f, const float* x, float d, uint8_t* codes) {
    float size[kBlock], scales[kStarts], sum_qx[kStarts], sum_q2[kStarts], q[kBlock], product[kBlock], square[kBlock];
    for (int i = 0; i < kBlock; ++i) size[i] = ::fabsf(x[i]);
    const float largest = as_float(top_bits(x, kBlock));
    for (int s = 0; s < kStarts; ++s) {
        scales[s] = f.starts[s] / largest;
        if (!is_finite(scales[s])) scales[s] = 0.f;
    }
    const std::conditional_t<Simd::masked, MaskedStarts<Half>, ByteStarts<Half>> fits(f.codebook + Half, size, scales);
    for (int s = 0; s < kStarts; ++s) {
        fits.values(s, q);
        for (int i = 0; i < kBlock; ++i) {
            product[i] = size[i] * q[i];
            square[i] = q[i] * q[i];
        }
        sum_qx[s] = fold(product);
        sum_q2[s] = fold(square);
    }
    float best = -1.f;
    int chosen = -1;
    for (int s = 0; s < kStarts; ++s) {
        const float fitted = sum_qx[s] / sum_q2[s], explained = fitted * sum_qx[s];
        if (!(explained > best)) continue;
        best = explained;
        d = fitted;
        chosen = s;
    }
    uint8_t index[kBlock];
    fits.indices(chosen, index);
    for (int i = 0; i < kBlock; ++i) {
        codes[i] = static_cast<uint8_t>(x[i] < 0.f ? Half - 1 - index[i] : Half + index[i]);
    }
    return d;
}

inline float refit_starts(const Format& f, const float* x, float d, uint8_t* codes) {
    if (f.layout == BitLayout::nibbles) return fit_starts<8>(f, x, d, codes);
    if (f.layout == BitLayout::pairs_bits) return fit_starts<4>(f, x, d, codes);
    return fit_starts<2>(f, x, d, codes);
}

// iq4_nl: fit, then move the code whose neighbour is nearest along the gradient, while that improves the fit. Values
// and their neighbours in the codebook lie in arrays, which the compiler turns into vectors; beyond the ends lies
// infinity.
struct Codebook {
    float value[18], middle[15];  // value[0] and value[17] are infinite

    explicit Codebook(const int8_t* book) {
        value[0] = -INFINITY;
        for (int c = 0; c < 16; ++c) value[c + 1] = book[c];
        value[17] = INFINITY;
        for (int c = 0; c < 15; ++c) middle[c] = static_cast<float>(book[c] + book[c + 1]) / 2.f;
    }
};

struct CodeSearch {
    float w[kBlock], q[kBlock], rise[kBlock], fall[kBlock];  // of a code to its neighbours

    CodeSearch(const Codebook& book, const float* x, const uint8_t* codes) {
        int32_t index[kBlock];
        for (int i = 0; i < kBlock; ++i) {
            index[i] = codes[i];
            w[i] = x[i] * x[i];
        }
        for (int i = 0; i < kBlock; i += Simd::lanes) {
            const Simd::I at = Simd::loadi(index + i);
            const Simd::F value = Simd::look_up(book.value + 1, at);
            Simd::store(q + i, value);
            Simd::store(rise + i, Simd::sub(Simd::look_up(book.value + 2, at), value));
            Simd::store(fall + i, Simd::sub(value, Simd::look_up(book.value, at)));
        }
    }

    void look_up(const Codebook& book, int i, int c) {
        q[i] = book.value[c + 1];
        rise[i] = book.value[c + 2] - q[i];
        fall[i] = q[i] - book.value[c];
    }

    // The lane whose code is nearest to its neighbour, in units of the slope towards it; -1 if there is none.
    int nearest(const float* x, float d) const {
        alignas(64) uint32_t distance[kBlock];
        const Simd::F scale = Simd::set1(d), minus = Simd::set1(-d), zero = Simd::set1(0.f);
        Simd::F least = Simd::set1(-INFINITY);  // of the negated distances: the largest; a NaN is passed over
        for (int i = 0; i < kBlock; i += Simd::lanes) {
            const Simd::F rest = Simd::fused(minus, Simd::load(q + i), Simd::load(x + i));
            const Simd::F slope = Simd::mul(Simd::mul(scale, Simd::load(w + i)), rest);
            const Simd::F gap = Simd::if_ge(slope, zero, Simd::load(rise + i), Simd::load(fall + i));
            const Simd::F far = Simd::div(gap, Simd::abs(slope));
            Simd::store(reinterpret_cast<float*>(distance) + i, far);
            least = Simd::max(Simd::sub(zero, far), least);
        }
        const float top = -Simd::reduce_max(least);
        if (!(top < INFINITY)) return -1;
        uint32_t bits;
        std::memcpy(&bits, &top, 4);
        return first_equal(distance, kBlock, 0x7fffffff, bits & 0x7fffffff);
    }
};

// Codes of the nearest values, and those values.
inline void nearest_codes(const Codebook& book, const float* x, float d, uint8_t* codes, float* q) {
    const Simd::F inv = Simd::set1(inverse(d));
    int32_t index[kBlock];
    for (int i = 0; i < kBlock; i += Simd::lanes) {
        const Simd::F y = Simd::mul(Simd::load(x + i), inv);
        Simd::I at = Simd::set1i(0);
        for (const float middle : book.middle) at = Simd::count_if_ge(at, y, Simd::set1(middle));
        Simd::storei(index + i, at);
        Simd::store(q + i, Simd::look_up(book.value + 1, at));
    }
    for (int i = 0; i < kBlock; ++i) codes[i] = static_cast<uint8_t>(index[i]);
}

// Sums of w q x and w q q over each of several blocks, one rounding after another in the order of the lanes: as many
// blocks at a time as a vector has lanes, because one alone would wait for every rounding. Blocks past `blocks` give 0.
constexpr int kFits = Simd::lanes;
struct FitSums {
    float qx[kFits], q2[kFits];

    FitSums(const float* x, const float* q, int64_t blocks) {
        float more_x[kFits * kBlock], more_q[kFits * kBlock];
        if (blocks < kFits) {
            const size_t used = static_cast<size_t>(blocks * kBlock);
            std::memcpy(more_x, x, used * sizeof(float));
            std::memcpy(more_q, q, used * sizeof(float));
            std::memset(more_x + used, 0, sizeof more_x - used * sizeof(float));
            std::memset(more_q + used, 0, sizeof more_q - used * sizeof(float));
            x = more_x;
            q = more_q;
        }
        Simd::F sum_qx = Simd::set1(0.f), sum_q2 = Simd::set1(0.f);
        for (int i = 0; i < kBlock; i += 8) {
            Simd::I v[8], c[8];
            Simd::transpose8(x + i, kBlock * sizeof(float), v);
            Simd::transpose8(q + i, kBlock * sizeof(float), c);
            for (int k = 0; k < 8; ++k) {
                const Simd::F lane = Simd::as_float(v[k]), code = Simd::as_float(c[k]);
                const Simd::F weighed = Simd::mul(Simd::mul(lane, lane), code);
                sum_qx = Simd::fused(weighed, lane, sum_qx);
                sum_q2 = Simd::fused(weighed, code, sum_q2);
            }
        }
        Simd::store(qx, sum_qx);
        Simd::store(q2, sum_q2);
    }
};

inline float refit_search(const Codebook& book, const float* x, uint8_t* codes, float d, float sumqx, float sumq2) {
    CodeSearch s(book, x, codes);
    const float fitted = sumqx / sumq2;
    d = is_finite(fitted) ? fitted : d;
    float best = d * sumqx;
    for (int moves = 0; moves < 32 * kBlock; ++moves) {
        const int i = s.nearest(x, d);
        if (i < 0) break;
        const bool rises = (d * s.w[i]) * fused(-d, s.q[i], x[i]) > 0.f;
        const float from = s.q[i], to = book.value[codes[i] + (rises ? 2 : 0)];
        const float new_qx = fused(s.w[i] * x[i], to - from, sumqx);
        const float new_q2 = fused(s.w[i], to * to - from * from, sumq2);
        if (!(new_q2 > 0.f && new_qx * new_qx > best * new_q2)) break;
        codes[i] = static_cast<uint8_t>(rises ? codes[i] + 1 : codes[i] - 1);
        s.look_up(book, i, codes[i]);
        sumqx = new_qx;
        sumq2 = new_q2;
        d = sumqx / sumq2;
        best = d * sumqx;
    }
    return d;
}

}  // namespace

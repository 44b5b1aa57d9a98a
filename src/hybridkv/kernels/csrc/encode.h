// Storing: rows of floats to the planes of a format, bit for bit what hybridkv/formats computes in torch. Included
// once per instruction set; compiled without contraction, because the order of roundings is the contract.
#pragma once

#include "refit.h"

namespace {

inline uint16_t to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return static_cast<uint16_t>((bits >> 16 & 0x8000) | 0x7fc0);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint16_t to_f16(float x) {  // to nearest even; source: the usual magic-number scheme
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
    if (bits >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
    if (bits < 0x38800000) {  // subnormal or zero: let the addition round
        float small;
        std::memcpy(&small, &bits, 4);
        small += 0.5f;
        std::memcpy(&bits, &small, 4);
        return static_cast<uint16_t>(sign | (bits - 0x3f000000));
    }
    bits += 0xc8000fff + (bits >> 13 & 1);
    return static_cast<uint16_t>(sign | bits >> 13);
}

inline void store_f16(uint8_t* p, float x) {
    const uint16_t h = to_f16(x);
    std::memcpy(p, &h, 2);
}

// One row of x as float32, padded to `width` with zeros or, where a fit weighs all lanes alike, with the lanes
// before them once more.
inline void load_row(const EncodeParams& e, int64_t r, int64_t width, float* out) {
    const int64_t t = r % e.n_tokens, bh = r / e.n_tokens;
    const int64_t at = bh / e.n_kv_heads * e.x_stride_b + bh % e.n_kv_heads * e.x_stride_h + t * e.x_stride_t;
    const int64_t dims = e.head_dim;
    if (e.x_type == BitLayout::f32) {
        std::memcpy(out, static_cast<const float*>(e.x) + at, static_cast<size_t>(dims) * sizeof(float));
    } else {
        const uint16_t* x = static_cast<const uint16_t*>(e.x) + at;
        int64_t i = 0;
        const auto wide = [&](const uint16_t* p) { return e.x_type == BitLayout::f16 ? Simd::f16(p) : Simd::bf16(p); };
        for (; i + Simd::lanes <= dims; i += Simd::lanes) Simd::store(out + i, wide(x + i));
        for (; i < dims; ++i) {
            const uint16_t lanes[Simd::lanes] = {x[i]};
            float values[Simd::lanes];
            Simd::store(values, wide(lanes));
            out[i] = values[0];
        }
    }
    const bool again = e.format->has_min() || e.format->starts;
    for (int64_t i = dims; i < width; ++i) out[i] = again ? out[i - (width - dims)] : 0.f;
}

inline void encode_values(const EncodeParams& e, const float* x, uint8_t* out) {
    const int64_t dims = e.head_dim;
    if (e.format->layout == BitLayout::f32) {
        std::memcpy(out, x, static_cast<size_t>(dims) * sizeof(float));
        return;
    }
    for (int64_t i = 0; i < dims; ++i) {
        const uint16_t h = e.format->layout == BitLayout::f16 ? to_f16(x[i]) : to_bf16(x[i]);
        std::memcpy(out + 2 * i, &h, 2);
    }
}

constexpr int code_bits(BitLayout layout) {
    switch (layout) {
        case BitLayout::pairs: return 2;
        case BitLayout::pairs_bits: return 3;
        case BitLayout::nibbles: return 4;
        case BitLayout::nibbles_bits: return 5;
        case BitLayout::nibbles_pairs: return 6;
        default: return 8;
    }
}

// Scaled values to codes. NaN becomes a code like any other.
template <Rounding R>
inline __attribute__((always_inline)) void to_codes(const float* y, int64_t n, float zero, float lowest, float highest,
                                                    uint8_t* codes) {
    for (int64_t i = 0; i < n; ++i) {
        float c;
        if (R == Rounding::away) c = y[i] + (y[i] < 0.f ? -0.49999997f : 0.49999997f);
        if (R == Rounding::even) c = (y[i] + 12582912.f) - 12582912.f;
        if (R == Rounding::up) c = y[i] + (zero + 0.5f);
        c = c == c ? c : 0.f;
        c = c > highest ? highest : c;
        c = c < lowest ? lowest : c;
        codes[i] = static_cast<uint8_t>(static_cast<int32_t>(c));
    }
}

// The scale rule over n lanes: codes out (two's complement for abs_max), scale, minimum and sum of codes returned.
inline __attribute__((always_inline)) BlockScale encode_block(const Format& f, const float* x, int64_t n, bool refit,
                                                         float* y, uint8_t* codes) {
    BlockScale b{};
    const int bits = code_bits(f.layout);
    if (f.rule == Rule::abs_max) {
        b.d = as_float(top_bits(x, n)) / 127.f;
    } else if (f.rule == Rule::signed_max) {
        b.d = signed_top(x, n) / (f.codebook ? f.codebook[0] : -static_cast<float>(f.zero));
    } else {
        float high = x[0];
        b.low = x[0];
        bool whole = true;
        for (int64_t i = 0; i < n; ++i) {
            b.low = x[i] < b.low ? x[i] : b.low;
            high = x[i] > high ? x[i] : high;
            whole &= x[i] == x[i];
        }
        if (!whole) b.low = NAN;
        b.d = (high - b.low) / static_cast<float>((1 << bits) - 1);
    }
    if (refit && f.starts) {
        b.d = refit_starts(f, x, b.d, codes);
        return b;
    }
    const float inv = inverse(b.d);
    for (int64_t i = 0; i < n; ++i) y[i] = (x[i] - b.low) * inv;
    const float zero = f.zero;
    if (f.codebook) {
        for (int64_t i = 0; i < n; ++i) {
            int c = 0;
            for (int k = 0; k + 1 < 1 << bits; ++k) c += y[i] >= static_cast<float>(f.codebook[k] + f.codebook[k + 1]) / 2.f;
            codes[i] = static_cast<uint8_t>(c);
        }
        return b;  // refit: by encode_searched
    }
    const float highest = f.rule == Rule::min_max ? static_cast<float>((1 << bits) - 1) : 2.f * zero - 1.f;
    if (f.rounding == Rounding::away) {
        to_codes<Rounding::away>(y, n, 0.f, -127.f, 127.f, codes);
    } else if (f.rounding == Rounding::even) {
        to_codes<Rounding::even>(y, n, 0.f, -127.f, 127.f, codes);
    } else {
        to_codes<Rounding::up>(y, n, zero, 0.f, highest, codes);
    }
    if (!refit && f.plane_s < 0) return b;
    int32_t sum = 0;
    for (int64_t i = 0; i < n; ++i) {
        const int32_t q = f.rule == Rule::abs_max ? static_cast<int8_t>(codes[i]) : codes[i] - f.zero;
        sum += q;
        y[i] = static_cast<float>(q);
    }
    b.sum = static_cast<float>(sum);
    if (refit && f.has_min()) {
        refit_line(x, y, b.sum, b);
    } else if (refit) {
        b.d = refit_pairs(x, y, n, b.d);
    }
    return b;
}

inline void pack_nibbles(const uint8_t* c, uint8_t* out) {
    for (int i = 0; i < 16; ++i) out[i] = static_cast<uint8_t>((c[i] & 15) | c[i + 16] << 4);
}

// Two bits of every code, or one, from bit `shift` on.
inline void pack_pairs(const uint8_t* c, int shift, uint8_t* out) {
    const auto pair = [&](int i) { return c[i] >> shift & 3; };
    for (int i = 0; i < 8; ++i) {
        out[i] = static_cast<uint8_t>(pair(i) | pair(i + 16) << 2 | pair(i + 8) << 4 | pair(i + 24) << 6);
    }
}

inline void pack_bits(const uint8_t* c, int shift, uint8_t* out) {
    uint32_t bits = 0;
    for (int i = 0; i < kBlock; ++i) bits |= static_cast<uint32_t>(c[i] >> shift & 1) << i;
    std::memcpy(out, &bits, 4);
}

inline void pack_codes(const Format& f, const uint8_t* c, int64_t block, uint8_t* const* rows) {
    const auto at = [&](int plane) { return rows[plane] + block * f.plane_bytes[plane]; };
    uint8_t* low = at(f.plane_codes);
    switch (f.layout) {
        case BitLayout::nibbles_bits: pack_bits(c, 4, at(f.plane_high)); return pack_nibbles(c, low);
        case BitLayout::nibbles_pairs: pack_pairs(c, 4, at(f.plane_high)); return pack_nibbles(c, low);
        case BitLayout::nibbles: return pack_nibbles(c, low);
        case BitLayout::pairs_bits: pack_bits(c, 2, at(f.plane_high)); return pack_pairs(c, 0, low);
        case BitLayout::pairs: return pack_pairs(c, 0, low);
        default: std::memcpy(low, c, kBlock);
    }
}

// A row of a format with a codebook and a refit, kFits blocks at a time.
inline void encode_searched(const Format& f, const float* x, int64_t blocks, uint8_t* const* rows) {
    alignas(64) uint8_t codes[kFits * kBlock];
    alignas(64) float q[kFits * kBlock];
    const Codebook book(f.codebook);
    for (int64_t first = 0; first < blocks; first += kFits, x += kFits * kBlock) {
        const int64_t n = blocks - first < kFits ? blocks - first : kFits;
        float d[kFits];
        for (int64_t b = 0; b < n; ++b) {
            d[b] = signed_top(x + b * kBlock, kBlock) / f.codebook[0];
            nearest_codes(book, x + b * kBlock, d[b], codes + b * kBlock, q + b * kBlock);
        }
        const FitSums sums(x, q, n);
        for (int64_t b = 0; b < n; ++b) {
            uint8_t* c = codes + b * kBlock;
            store_f16(rows[f.plane_d] + 2 * (first + b),
                    refit_search(book, x + b * kBlock, c, d[b], sums.qx[b], sums.q2[b]));
            pack_codes(f, c, first + b, rows);
        }
    }
}

inline void encode_row(const EncodeParams& e, const float* x, float* y, uint8_t* const* rows) {
    const Format& f = *e.format;
    if (!f.quantized()) return encode_values(e, x, rows[0]);
    if (f.row_scale) {
        const BlockScale b = encode_block(f, x, e.head_dim, e.refit, y, rows[f.plane_codes]);
        const int32_t sum = static_cast<int32_t>(b.sum);
        std::memcpy(rows[f.plane_d], &b.d, 4);
        std::memcpy(rows[f.plane_s], &sum, 4);
        return;
    }
    if (f.codebook && !f.starts && e.refit) return encode_searched(f, x, padded(e.head_dim) / kBlock, rows);
    alignas(64) uint8_t codes[kBlock];
    for (int64_t i = 0; i < padded(e.head_dim) / kBlock; ++i) {
        const BlockScale b = encode_block(f, x + i * kBlock, kBlock, e.refit, y, codes);
        store_f16(rows[f.plane_d] + 2 * i, b.d);
        if (f.has_min()) store_f16(rows[f.plane_m] + 2 * i, b.low);
        if (f.plane_s >= 0) store_f16(rows[f.plane_s] + 2 * i, b.sum * b.d);
        pack_codes(f, codes, i, rows);
    }
}

// Rows [r0, r1) of the B * Hkv * T rows; `scratch` holds two rows of floats.
void encode(const EncodeParams& e, int64_t r0, int64_t r1, void* scratch) {
    const int64_t width = padded(e.head_dim);
    float *x = static_cast<float*>(scratch), *y = x + width;
    for (int64_t r = r0; r < r1; ++r) {
        load_row(e, r, width, x);
        const int64_t row = r / e.n_tokens * e.cap + e.start + r % e.n_tokens;
        uint8_t* rows[kMaxPlanes] = {};
        for (int p = 0; p < e.format->n_planes; ++p) {
            rows[p] = e.planes[p] + row * plane_row_bytes(*e.format, p, e.head_dim);
        }
        encode_row(e, x, y, rows);
    }
}

}  // namespace

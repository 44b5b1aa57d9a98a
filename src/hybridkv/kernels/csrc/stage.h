// From the planes to what the micro-kernels read, one tile of up to kTile stored rows at a time: int8 codes with
// float32 scales for every quantized format, float32 values for f32, f16 and bf16. Included by one translation
// unit per instruction set, after its simd_*.h. Knows no queries.
#pragma once

#include <cstring>

#include "attention.h"

namespace {

using namespace hybridkv;

constexpr int kTile = 64;  // stored rows in a tile

inline int64_t padded(int64_t head_dim) { return (head_dim + kBlock - 1) / kBlock * kBlock; }

inline const uint8_t* plane_row(const Stored& s, int plane, int64_t head, int64_t row) {
    return s.planes[plane] + (head * s.cap + row) * plane_row_bytes(*s.format, plane, s.head_dim);
}

inline void unpack_nibbles(const uint8_t* qs, int64_t blocks, int zero, int8_t* out) {
    for (int64_t b = 0; b < blocks; ++b, qs += 16, out += 32) {
        for (int i = 0; i < 16; ++i) out[i] = static_cast<int8_t>((qs[i] & 15) - zero);
        for (int i = 0; i < 16; ++i) out[16 + i] = static_cast<int8_t>((qs[i] >> 4) - zero);
    }
}

inline void unpack_codebook(const uint8_t* qs, int64_t blocks, const int8_t* book, int8_t* out) {
    for (int64_t b = 0; b < blocks; ++b, qs += 16, out += 32) {
        for (int i = 0; i < 16; ++i) {
            out[i] = book[qs[i] & 15];
            out[16 + i] = book[qs[i] >> 4];
        }
    }
}

inline void unpack_fifth_bits(const uint8_t* qs, const uint8_t* high, int64_t blocks, int zero, int8_t* out) {
    for (int64_t b = 0; b < blocks; ++b, qs += 16, high += 4, out += 32) {
        uint32_t bits;
        std::memcpy(&bits, high, 4);
        for (int i = 0; i < 16; ++i) {
            out[i] = static_cast<int8_t>(((qs[i] & 15) | ((bits >> i) & 1) << 4) - zero);
            out[16 + i] = static_cast<int8_t>(((qs[i] >> 4) | ((bits >> (16 + i)) & 1) << 4) - zero);
        }
    }
}

inline void unpack_upper_pairs(const uint8_t* qs, const uint8_t* high, int64_t blocks, int zero, int8_t* out) {
    for (int64_t b = 0; b < blocks; ++b, qs += 16, high += 8, out += 32) {
        for (int half = 0; half < 2; ++half) {  // byte j of `high`: lanes j, j + 16 and, 4 bits up, j + 8, j + 24
            for (int i = 0; i < 8; ++i) {
                const int h = high[i] >> 4 * half, q = qs[8 * half + i];
                out[8 * half + i] = static_cast<int8_t>(((q & 15) | (h & 3) << 4) - zero);
                out[16 + 8 * half + i] = static_cast<int8_t>(((q >> 4) | (h >> 2 & 3) << 4) - zero);
            }
        }
    }
}

struct Codes {
    const int8_t* data;
    int64_t stride;
    const int8_t* row(int64_t r) const { return data + r * stride; }
};

// Codes of `n` rows from `row` on, [kTile, padded(D)]; rows past `n` and lanes past D are finite, not meaningful.
inline Codes stage_codes(const Stored& s, int64_t head, int64_t row, int n, int8_t* buffer) {
    const Format& f = *s.format;
    const int64_t width = padded(s.head_dim), blocks = n * (width / kBlock);
    const uint8_t* codes = plane_row(s, f.plane_codes, head, row);
    const uint8_t* high = f.plane_high < 0 ? nullptr : plane_row(s, f.plane_high, head, row);
    if (f.code == Code::bytes) {
        const int64_t stride = plane_row_bytes(f, f.plane_codes, s.head_dim);
        if (n == kTile && stride == width) return {reinterpret_cast<const int8_t*>(codes), width};
        for (int r = 0; r < n; ++r) {
            std::memcpy(buffer + r * width, codes + r * stride, static_cast<size_t>(stride));
            std::memset(buffer + r * width + stride, 0, static_cast<size_t>(width - stride));
        }
    } else if (f.codebook) {
        unpack_codebook(codes, blocks, f.codebook, buffer);
    } else if (f.code == Code::nibbles) {
        unpack_nibbles(codes, blocks, f.zero, buffer);
    } else if (f.code == Code::nibbles_bits) {
        unpack_fifth_bits(codes, high, blocks, f.zero, buffer);
    } else {
        unpack_upper_pairs(codes, high, blocks, f.zero, buffer);
    }
    std::memset(buffer + n * width, 0, static_cast<size_t>((kTile - n) * width));
    return {buffer, width};
}

// One float16 plane of `n` rows to float32, transposed: out[block][kTile]; zeros past `n`.
inline void stage_halves(const uint8_t* plane, int n, int64_t blocks, float* out) {
    const uint16_t* p = reinterpret_cast<const uint16_t*>(plane);
    float row[Simd::lanes];
    for (int r = 0; r < n; ++r, p += blocks) {
        int64_t b = 0;
        for (; b + Simd::lanes <= blocks; b += Simd::lanes) {
            Simd::from_f16(p + b, row);
            for (int i = 0; i < Simd::lanes; ++i) out[(b + i) * kTile + r] = row[i];
        }
        for (; b < blocks; ++b) out[b * kTile + r] = Simd::half_to_float(p[b]);
    }
    for (int64_t b = 0; b < blocks; ++b) {
        for (int r = n; r < kTile; ++r) out[b * kTile + r] = 0.f;
    }
}

// Scales, and minima where the format has them, of `n` rows: d and m are [blocks of 32][kTile]; zeros past `n`.
inline void stage_scales(const Stored& s, int64_t head, int64_t row, int n, float* d, float* m) {
    const Format& f = *s.format;
    const int64_t blocks = padded(s.head_dim) / kBlock;
    const uint8_t* plane = plane_row(s, f.plane_d, head, row);
    if (f.row_scale) {
        for (int64_t b = 0; b < blocks; ++b) {
            std::memcpy(d + b * kTile, plane, static_cast<size_t>(n) * 4);
            std::memset(d + b * kTile + n, 0, static_cast<size_t>(kTile - n) * 4);
        }
        return;
    }
    stage_halves(plane, n, blocks, d);
    if (f.has_min()) stage_halves(plane_row(s, f.plane_m, head, row), n, blocks, m);
}

// Values dim0..dim0+31 of `n` rows of f32, f16 or bf16: out[kTile][32]; zeros past `n` and past D.
inline void stage_values(const Stored& s, int64_t head, int64_t row, int n, int64_t dim0, float* out) {
    const int64_t stride = plane_row_bytes(*s.format, 0, s.head_dim), dims = s.head_dim - dim0;
    const int width = dims < kBlock ? static_cast<int>(dims) : kBlock;
    const int size = s.format->plane_bytes[0];
    const uint8_t* p = plane_row(s, 0, head, row) + dim0 * size;
    for (int r = 0; r < n; ++r, p += stride, out += kBlock) {
        uint16_t narrow[kBlock];
        const uint16_t* half = reinterpret_cast<const uint16_t*>(p);
        if (width < kBlock) {
            std::memset(out, 0, kBlock * sizeof(float));
            if (size == 2) {
                std::memset(narrow, 0, sizeof narrow);
                std::memcpy(narrow, p, static_cast<size_t>(width) * 2);
                half = narrow;
            }
        }
        if (s.format->code == Code::f32) {
            std::memcpy(out, p, static_cast<size_t>(width) * 4);
        } else if (s.format->code == Code::f16) {
            for (int i = 0; i < kBlock; i += Simd::lanes) Simd::from_f16(half + i, out + i);
        } else {
            for (int i = 0; i < kBlock; i += Simd::lanes) Simd::from_bf16(half + i, out + i);
        }
    }
    std::memset(out, 0, static_cast<size_t>(kTile - n) * kBlock * sizeof(float));
}

}  // namespace

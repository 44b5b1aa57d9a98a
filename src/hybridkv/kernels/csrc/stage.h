// From the planes to what the micro-kernels read, one tile of up to kTile stored rows at a time: int8 codes with
// float32 scales for every quantized format, float32 values for f32, f16 and bf16. Included by one translation
// unit per instruction set, after its simd_*.h. Knows no queries.
#pragma once

#include <cstring>

#include "attention.h"
#include "simd/lanes.h"

namespace {

using namespace hybridkv;

#if defined(HYBRIDKV_AMX)
constexpr int kTile = 128;     // stored rows in a tile
constexpr int kStagedK = 16;   // of them, rows of K staged at a time
constexpr int kWidth = 64;     // bytes that a product takes of a row of codes
#else
constexpr int kTile = 64;
constexpr int kStagedK = kTile;
constexpr int kWidth = kBlock;
#endif
// Rows of K's codes in pairs of dims at a time: they stay in the first cache until the last query has had them.
constexpr int kPairedK = 2 * Simd::lanes;

inline int64_t padded(int64_t head_dim) { return (head_dim + kBlock - 1) / kBlock * kBlock; }

inline const uint8_t* plane_row(const Stored& s, int plane, int64_t head, int64_t row) {
    return s.planes[plane] + (head * s.cap + row) * plane_row_bytes(*s.format, plane, s.head_dim);
}

// Asks for the bytes of a tile ahead of its use, a share at a time, so that the requests do not crowd out the loads
// of the work in between: the phases alternate between K and V too fast for the hardware to follow both.
struct Prefetch {
    const uint8_t* p[kMaxPlanes];
    int64_t left[kMaxPlanes];
    int64_t share[kMaxPlanes];

    Prefetch(const Stored& s, int64_t head, int64_t row, int64_t n, int64_t shares) {
        for (int i = 0; i < kMaxPlanes; ++i) {
            left[i] = 0;
            if (i >= s.format->n_planes || n <= 0) continue;
            p[i] = plane_row(s, i, head, row);
            left[i] = n * plane_row_bytes(*s.format, i, s.head_dim);
            share[i] = (left[i] / shares + 63) / 64 * 64;
        }
    }

    void step() {
        for (int i = 0; i < kMaxPlanes; ++i) {
            const int64_t bytes = left[i] < share[i] ? left[i] : share[i];
            if (left[i] <= 0) continue;
#pragma GCC unroll 4
            for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(p[i] + at, 0, 2);
            p[i] += bytes;
            left[i] -= bytes;
        }
    }
};

struct Codes {
    const int8_t* data;
    int64_t stride;
    const int8_t* row(int64_t r) const { return data + r * stride; }
};

// Codes of `n` rows from `row` on, [rows, padded(D)]; rows past `n` and lanes past D are finite, not meaningful.
HYBRIDKV_PHASE Codes stage_codes(const Stored& s, int64_t head, int64_t row, int n, int8_t* buffer, int rows = kTile) {
    const Format& f = *s.format;
    const int64_t width = padded(s.head_dim), blocks = n * (width / kBlock);
    const uint8_t* codes = plane_row(s, f.plane_codes, head, row);
    const uint8_t* high = f.plane_high < 0 ? nullptr : plane_row(s, f.plane_high, head, row);
    if (f.layout == BitLayout::bytes) {
        const int64_t stride = plane_row_bytes(f, f.plane_codes, s.head_dim);
        if (n == rows && stride == width && width % kWidth == 0) return {reinterpret_cast<const int8_t*>(codes), width};
        for (int r = 0; r < n; ++r) {
            std::memcpy(buffer + r * width, codes + r * stride, static_cast<size_t>(stride));
            std::memset(buffer + r * width + stride, 0, static_cast<size_t>(width - stride));
        }
    } else if (f.layout == BitLayout::pairs) {
        Simd::Codes32::pairs(codes, blocks, f.codebook, buffer);
    } else if (f.layout == BitLayout::pairs_bits) {
        Simd::Codes32::pairs_third_bits(codes, high, blocks, f.codebook, buffer);
    } else if (f.codebook) {
        Simd::Codes32::codebook(codes, blocks, f.codebook, buffer);
    } else if (f.layout == BitLayout::nibbles) {
        Simd::Codes32::plain(codes, blocks, f.zero, buffer);
    } else if (f.layout == BitLayout::nibbles_bits) {
        Simd::Codes32::fifth_bits(codes, high, blocks, f.zero, buffer);
    } else {
        Simd::Codes32::upper_pairs(codes, high, blocks, f.zero, buffer);
    }
    std::memset(buffer + n * width, 0, static_cast<size_t>((rows - n) * width));
    return {buffer, width};
}

// Blocks that an array of scales has room for: transposing writes groups of eight.
inline int64_t scale_blocks(int64_t blocks) { return (blocks + 7) / 8 * 8; }

// One float16 plane of `n` rows to float32, transposed: out[block][kTile]; zeros past `n`. `flat` is scratch for
// kTile * blocks + 8 floats.
inline void stage_halves(const uint8_t* plane, int n, int64_t blocks, float* flat, float* out) {
    const uint16_t* p = reinterpret_cast<const uint16_t*>(plane);
    const int64_t count = n * blocks, room = kTile * blocks + 8;
    int64_t i = 0;
    for (; i + Simd::lanes <= count; i += Simd::lanes) Simd::store(flat + i, Simd::f16(p + i));
    for (; i < count; ++i) flat[i] = Simd::half_to_float(p[i]);
    if (n < kTile) std::memset(flat + i, 0, static_cast<size_t>(room - i) * sizeof(float));
    for (int64_t b = 0; b < blocks; b += 8) {
        for (int r = 0; r < kTile; r += Simd::lanes) {
            Simd::I rows[8];
            Simd::transpose8(flat + r * blocks + b, blocks * static_cast<int64_t>(sizeof(float)), rows);
            for (int k = 0; k < 8; ++k) Simd::storei(reinterpret_cast<int32_t*>(out) + (b + k) * kTile + r, rows[k]);
        }
    }
}

// Scales, and minima where the format has them, of `n` rows: d and m are [blocks of 32][kTile]; zeros past `n`.
HYBRIDKV_PHASE void stage_scales(const Stored& s, int64_t head, int64_t row, int n, float* flat, float* d, float* m) {
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
    stage_halves(plane, n, blocks, flat, d);
    if (f.has_min()) stage_halves(plane_row(s, f.plane_m, head, row), n, blocks, flat, m);
}

// `lanes` values of a row of f32, f16 or bf16.
template <BitLayout Layout>
inline __attribute__((always_inline)) Simd::F load_values(const uint8_t* row, int64_t e) {
    const uint16_t* half = reinterpret_cast<const uint16_t*>(row) + e;
    if constexpr (Layout == BitLayout::f32) return Simd::load(reinterpret_cast<const float*>(row) + e);
    if constexpr (Layout == BitLayout::f16) return Simd::f16(half);
    return Simd::bf16(half);
}

// Values dim0..dim0+31 of `n` rows of f32, f16 or bf16: out[rows][32]; zeros past `n` and past D. True if all of them
// are finite.
template <BitLayout Layout>
inline __attribute__((always_inline)) void stage_row(const uint8_t* row, float* out, Simd::F& check) {
    Simd::F sum = check;
    for (int i = 0; i < kBlock; i += Simd::lanes) {
        const Simd::F x = load_values<Layout>(row, i);
        Simd::store(out + i, x);
        sum = Simd::fma(x, Simd::set1(0.f), sum);
    }
    check = sum;
}

template <BitLayout Layout>
inline bool stage_rows(const uint8_t* p, int64_t stride, int n, int width, float* out, int rows) {
    constexpr int size = Layout == BitLayout::f32 ? 4 : 2;
    Simd::F c0 = Simd::set1(0.f), c1 = c0, c2 = c0, c3 = c0;  // one sum would wait for itself
    int r = 0;
    if (width == kBlock) {
        for (; r + 4 <= n; r += 4, p += 4 * stride, out += 4 * kBlock) {
            stage_row<Layout>(p, out, c0);
            stage_row<Layout>(p + stride, out + kBlock, c1);
            stage_row<Layout>(p + 2 * stride, out + 2 * kBlock, c2);
            stage_row<Layout>(p + 3 * stride, out + 3 * kBlock, c3);
        }
    }
    for (; r < n; ++r, p += stride, out += kBlock) {
        alignas(64) uint8_t edge[kBlock * size] = {};
        std::memcpy(edge, p, static_cast<size_t>(width * size));
        stage_row<Layout>(edge, out, c0);
    }
    std::memset(out, 0, static_cast<size_t>(rows - n) * kBlock * sizeof(float));
    return Simd::reduce_add(Simd::add(Simd::add(c0, c1), Simd::add(c2, c3))) == 0.f;
}

HYBRIDKV_PHASE bool stage_values(const Stored& s, int64_t head, int64_t row, int n, int64_t dim0, float* out,
                                 int rows) {
    const int64_t stride = plane_row_bytes(*s.format, 0, s.head_dim), dims = s.head_dim - dim0;
    const int width = dims < kBlock ? static_cast<int>(dims) : kBlock;
    const uint8_t* p = plane_row(s, 0, head, row) + dim0 * s.format->plane_bytes[0];
    if (s.format->layout == BitLayout::f32) return stage_rows<BitLayout::f32>(p, stride, n, width, out, rows);
    if (s.format->layout == BitLayout::f16) return stage_rows<BitLayout::f16>(p, stride, n, width, out, rows);
    return stage_rows<BitLayout::bf16>(p, stride, n, width, out, rows);
}

}  // namespace

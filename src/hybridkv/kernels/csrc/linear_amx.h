// Linear layers of many rows in bfloat16 tiles: 32 rows times 32 outputs at a time, summed in float32. q8_0 and
// q4_0 are brought to bfloat16 once per panel and kDepth inputs, bf16 is read as it lies.
//
// A tile of activations is [16 rows][32 inputs], of weights [16 pairs of inputs][16 outputs][2]: 1024 bytes each.
#pragma once

#include "dots.h"
#include "pack.h"

namespace {

struct Tiles {
    static constexpr int64_t min_rows = 16;  // below, bringing a panel to bfloat16 costs more than tiles save
    static constexpr int64_t kTileBytes = 1024, kRows = 16, kInputs = 32;
    static constexpr int64_t kDepth = 256;     // inputs: two panels of them stay in the first cache
    static constexpr int64_t kMaxRows = 512;   // rows that share a dequantized panel
    static constexpr int64_t kPanels = 8;      // panels that share activations in the second cache
    static constexpr int64_t kStreamedBytes = 4 << 20;  // outputs of a call that no second cache holds
    static constexpr int64_t kWeightBytes = 2 * kDepth / kInputs * kTileBytes;

    static int64_t row_tiles(int64_t n_rows) { return (n_rows + kRows - 1) / kRows; }
    static int64_t prepared_bytes(int64_t n_in, int64_t n_rows) {
        return row_tiles(n_rows) * (n_in / kInputs) * kTileBytes;
    }
    static size_t scratch_bytes(int64_t n_rows) {
        const int64_t tiles = row_tiles(n_rows < kMaxRows ? n_rows : kMaxRows) * kPanels;
        return static_cast<size_t>(kWeightBytes + tiles * kTileBytes);
    }

    // Row r of x to its place in tiles [row tile][input tile]; n_in is x's, `padded` the packed weight's. Rows past
    // the last stay as they are: their sums are never read.
    static void prepare(const float* x, int64_t n_in, int64_t padded, int64_t r, uint8_t* out) {
        uint8_t* tile = out + r / kRows * (padded / kInputs) * kTileBytes + r % kRows * 64;
        for (int64_t k = 0; k < padded; k += kInputs, tile += kTileBytes) {
            const auto part = [&](int64_t from) {
                const int64_t left = n_in - from;
                const __mmask16 mask = left >= 16 ? 0xffff : left <= 0 ? 0 : static_cast<__mmask16>((1 << left) - 1);
                return _mm512_maskz_loadu_ps(mask, x + from);
            };
            const __m512bh pair = _mm512_cvtne2ps_pbh(part(k + 16), part(k));
            std::memcpy(tile, &pair, sizeof pair);
        }
    }

    // Two rows of float32 as a row of pairs of bfloat16, rounded half up: fewer instructions than those that convert.
    static inline __attribute__((always_inline)) I pairs_of(F even, F odd) {
        const I half = Simd::set1i(0x8000);
        const I low = _mm512_srli_epi32(_mm512_add_epi32((I)even, half), 16), high = _mm512_add_epi32((I)odd, half);
        return _mm512_ternarylogic_epi32(low, high, Simd::set1i(static_cast<int>(0xffff0000u)), 0xf8);  // a | b & c
    }

    // `pairs` pairs of blocks of a panel as tiles. A code in the upper bits of 2^15's fraction is 2^15 + code, and
    // (2^15 + zero) * d is exact.
    template <Code C>
    static HYBRIDKV_PHASE void dequantize(const uint8_t* panel, int64_t pairs, uint8_t* out) {
        constexpr int parts = codes_per_byte(C), zero = zero_code(C), lines = 8 / parts;
        const I base = Simd::set1i(0x47000000), bits = Simd::set1i((2 * zero - 1) << 8);
        for (int64_t p = 0; p < pairs; ++p, panel += pair_bytes(C)) {
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
                const F d = Simd::f16(reinterpret_cast<const uint16_t*>(panel) + half * kPanel);
                const F offset = Simd::mul(d, Simd::set1(-32768.f - zero));
                const uint8_t* codes = panel + kPairScales + half * block_bytes(C);
#pragma GCC unroll 8
                for (int quad = 0; quad < 8; ++quad, out += 128) {
                    const I line = _mm512_load_si512(codes + 64 * (quad % lines));
                    const I w = quad < lines ? line : _mm512_srli_epi32(line, 4);
                    const auto value = [&](I c) {
                        return Simd::fma((F)_mm512_ternarylogic_epi32(base, c, bits, 0xf8), d, offset);
                    };
                    const F k0 = value(_mm512_slli_epi32(w, 8)), k1 = value(w);
                    const F k2 = value(_mm512_srli_epi32(w, 8)), k3 = value(_mm512_srli_epi32(w, 16));
                    _mm512_store_si512(out, pairs_of(k0, k1));
                    _mm512_store_si512(out + 64, pairs_of(k2, k3));
                }
            }
        }
    }

    static void configure() {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } const config;
        // GCC 12's intrinsic does not say that it reads all of it: without this, stores to it may be left out.
        asm volatile("" : : "r"(&config) : "memory");
        _tile_loadconfig(&config);
    }

    // NA row tiles from `a` on, `a_stride` bytes apart, times NB panels, over `depth` tiles of inputs: to c, [NA][NB]
    // tiles of float32, added to what is there if `add`.
    template <int NA, int NB>
    static HYBRIDKV_PHASE void multiply(const uint8_t* a, int64_t a_stride, const uint8_t* b, int64_t b_stride,
                                        int64_t depth, bool add, float* c) {
        asm volatile("" : : : "memory");  // nor that a tile load reads what was written before
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        if (add) {
            _tile_loadd(0, c, 64);
            if constexpr (NB > 1) _tile_loadd(1, c + 256, 64);
            if constexpr (NA > 1) _tile_loadd(2, c + NB * 256, 64);
            if constexpr (NA > 1 && NB > 1) _tile_loadd(3, c + 768, 64);
        }
        for (int64_t k = 0; k < depth; ++k, a += kTileBytes, b += kTileBytes) {
            _tile_loadd(4, a, 64);
            _tile_loadd(6, b, 64);
            _tile_dpbf16ps(0, 4, 6);
            if constexpr (NB > 1) {
                _tile_loadd(7, b + b_stride, 64);
                _tile_dpbf16ps(1, 4, 7);
            }
            if constexpr (NA > 1) {
                _tile_loadd(5, a + a_stride, 64);
                _tile_dpbf16ps(2, 5, 6);
                if constexpr (NB > 1) _tile_dpbf16ps(3, 5, 7);
            }
        }
        _tile_stored(0, c, 64);
        if constexpr (NB > 1) _tile_stored(1, c + 256, 64);
        if constexpr (NA > 1) _tile_stored(2, c + NB * 256, 64);
        if constexpr (NA > 1 && NB > 1) _tile_stored(3, c + 768, 64);
    }

    // NB panels from p on times rows [r0, r1), inputs from k on: sums of row tile t to c + t * NB * 256.
    template <int NB>
    static void block(const Weight& w, const uint8_t* x, int64_t r0, int64_t r1, int64_t p, int64_t k, uint8_t* tiles,
                      float* c) {
        const int64_t n_in = packed_inputs(w.code, w.n_in), bytes = panel_bytes(w.code, w.n_in);
        const int64_t inputs = n_in - k < kDepth ? n_in - k : kDepth, depth = inputs / kInputs;
        const int64_t a_stride = n_in / kInputs * kTileBytes;
        const uint8_t* b = w.data + p * bytes + k * kPanel * 2;
        int64_t b_stride = bytes;
        if (in_blocks(w.code)) {
            const auto to_tiles = w.code == Code::bytes ? dequantize<Code::bytes> : dequantize<Code::nibbles>;
            b = tiles;
            b_stride = depth * kTileBytes;
            for (int i = 0; i < NB; ++i) {
                to_tiles(w.data + (p + i) * bytes + k / 64 * pair_bytes(w.code), inputs / 64, tiles + i * b_stride);
            }
        }
        const uint8_t* a = x + r0 / kRows * a_stride + k / kInputs * kTileBytes;
        for (int64_t r = r0; r < r1; r += 2 * kRows, a += 2 * a_stride, c += 2 * NB * 256) {
            if (r + kRows < r1) multiply<2, NB>(a, a_stride, b, b_stride, depth, k > 0, c);
            else multiply<1, NB>(a, a_stride, b, b_stride, depth, k > 0, c);
        }
    }

    // Outputs that will have left the second cache before they are read are written around the caches: nothing has to
    // be fetched before it is overwritten. Measured with 512 x 3584 outputs, reading them included: 30 % faster.
    template <class Out>
    static bool streamed(int64_t n_rows, const Out& out) {
        const bool aligned = (reinterpret_cast<uintptr_t>(out.y) | static_cast<uintptr_t>(out.stride * 4)) % 64 == 0;
        return aligned && !out.add && n_rows * out.n_out * 4 >= kStreamedBytes;
    }

    // All panels of a group at once: their outputs are neighbours, and rows of y lie in different pages.
    template <class Out>
    static HYBRIDKV_PHASE void put(const float* sums, int64_t r0, int64_t r1, int64_t p0, int64_t p1, bool stream,
                                   const Out& out) {
        for (int64_t r = r0; r < r1; r += kRows) {
            const int n = static_cast<int>(r1 - r < kRows ? r1 - r : kRows);
            for (int64_t p = p0; p < p1; ++p) {
                const int64_t pair = (p - p0) / 2 * 2, width = p1 - p0 - pair < 2 ? 1 : 2;
                const int64_t tile = pair * row_tiles(r1 - r0) + (r - r0) / kRows * width + (p - p0 - pair);
                if (stream && (p + 1) * kPanel <= out.n_out) {
                    float* y = out.y + r * out.stride + p * kPanel;
                    for (int q = 0; q < n; ++q) {
                        _mm512_stream_ps(y + q * out.stride, Simd::load(sums + tile * 256 + q * kPanel));
                    }
                } else {
                    out.put(sums + tile * 256, n, r, p);
                }
            }
        }
        if (stream) _mm_sfence();  // these stores keep no order with those that tell other threads of them
    }

    template <class Out>
    static void linear(const Weight& w, const uint8_t* x, int64_t n_rows, int64_t panel0, int64_t panel1, void* scratch,
                       const Out& out) {
        uint8_t* tiles = static_cast<uint8_t*>(scratch);
        float* sums = reinterpret_cast<float*>(tiles + kWeightBytes);
        const bool stream = streamed(n_rows, out);
        configure();
        for (int64_t r0 = 0; r0 < n_rows; r0 += kMaxRows) {
            const int64_t r1 = n_rows < r0 + kMaxRows ? n_rows : r0 + kMaxRows;
            for (int64_t p0 = panel0; p0 < panel1; p0 += kPanels) {
                const int64_t p1 = panel1 < p0 + kPanels ? panel1 : p0 + kPanels;
                for (int64_t k = 0; k < w.n_in; k += kDepth) {
                    for (int64_t p = p0; p < p1; p += 2) {
                        float* c = sums + (p - p0) * row_tiles(r1 - r0) * 256;
                        if (p + 1 < p1) block<2>(w, x, r0, r1, p, k, tiles, c);
                        else block<1>(w, x, r0, r1, p, k, tiles, c);
                    }
                }
                put(sums, r0, r1, p0, p1, stream, out);
            }
        }
        _tile_release();
    }
};

}  // namespace

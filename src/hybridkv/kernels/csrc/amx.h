// Tiles of int8 products for processors with AMX: what dots.h does for codes, eight query rows at a time, with
// queries and probabilities as two int8 terms (128 * high + low) in the sixteen columns or rows of a tile.
//
// Rows of codes are the left operand of the scores as they lie in memory, so K needs no transposition. AMX sums in
// int32 over 64 products and more, but every block of 32 has a scale of its own: a product takes one block.
#pragma once

#include "dots.h"

namespace {

struct Amx {
    static constexpr int group = 8;           // query rows in a tile
    static constexpr float units = 16319.f;   // 127 * 128 + 63: the largest number in two terms
    static constexpr int packed = kBlock * 16;  // bytes of a block of a packed group of queries

    struct alignas(64) Config {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 32, 64, 32, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 8, 16, 8};
    };
    // 0-3: sums; in a product of V 2: probabilities, 3: codes. 4, 6: codes of K. 5, 7: queries.
    static void configure() {
        const Config config;
        _tile_loadconfig(&config);
    }
    static void configure_square() {  // tiles 0-5 of 16 rows of 64 bytes
        Config config;
        config.row_bytes[4] = 64;
        config.rows[5] = 16;
        _tile_loadconfig(&config);
    }
    static void release() { _tile_release(); }

    static int8_t high(int c) { return static_cast<int8_t>((c + 64) >> 7); }
    static int8_t low(int c) { return static_cast<int8_t>(c - ((c + 64) >> 7) * 128); }

    // Where code e of query row r goes in the packed queries: [group][block][8 quads][16 columns][4].
    static int8_t* slot(int8_t* q, int64_t dk, int r, int64_t e) {
        q += r / group * dk * 16 + e / kBlock * packed;
        return q + e % kBlock / 4 * 64 + r % group * 4 + e % 4;
    }
    static void put_query(int8_t* q, int64_t dk, int r, int64_t e, int c) {
        int8_t* p = slot(q, dk, r, e);
        p[0] = high(c);
        p[32] = low(c);
    }

    // Left times right operand to sums[16][16]. Tiles are named in the instruction and a product takes long to come
    // out, so slots take turns and are read some products later.
    static constexpr int slots = 4;
    using Sums = int32_t[slots][256];
    static inline void scores_of_block(int64_t slot, const int8_t* k, int64_t stride, const int8_t* q, Sums& sums) {
        switch (slot % slots) {
#define HYBRIDKV_PRODUCT(C, A, B)      \
    _tile_zero(C);                     \
    _tile_loadd(A, k, stride);         \
    _tile_loadd(B, q, 64);             \
    _tile_dpbssd(C, A, B);             \
    _tile_stored(C, sums[C], 64);      \
    break;
            case 0: HYBRIDKV_PRODUCT(0, 4, 5)
            case 1: HYBRIDKV_PRODUCT(1, 6, 7)
            case 2: HYBRIDKV_PRODUCT(2, 4, 5)
            default: HYBRIDKV_PRODUCT(3, 6, 7)
#undef HYBRIDKV_PRODUCT
        }
    }

    // scores[8][kTile] of one group of packed queries; the arguments as of k_codes.
    template <bool HasMin>
    static HYBRIDKV_PHASE void k_codes(const int8_t* q, const Codes& codes, const float* d, const float* m,
                                       const float* qsum, int64_t blocks, int n, float* scores) {
        alignas(64) Sums sums;
        alignas(64) float rows[256];
        for (int row = 0; row < kTile; row += 16) {
            F acc[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) acc[i] = Simd::set1(0.f);
            const auto start = [&](int64_t b) {
                if (b < blocks) scores_of_block(b, codes.row(row) + b * kBlock, codes.stride, q + b * packed, sums);
            };
            for (int64_t b = 0; b < slots - 1; ++b) start(b);
            for (int64_t b = 0; b < blocks; ++b) {
                start(b + slots - 1);
                const int32_t* c = sums[b % slots];
#pragma GCC unroll 16
                for (int i = 0; i < 16; ++i) {
                    acc[i] = Simd::fma(Simd::to_float(Simd::loadi(c + 16 * i)), Simd::set1(d[b * kTile + row + i]), acc[i]);
                }
            }
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) Simd::store(rows + 16 * i, acc[i]);
            I hi[8], lo[8];
            Simd::transpose8(rows, 64, hi);
            Simd::transpose8(rows + 8, 64, lo);
            for (int i = 0; i < n; ++i) {
                F s = Simd::fma(_mm512_castsi512_ps(hi[i]), Simd::set1(128.f), _mm512_castsi512_ps(lo[i]));
                if constexpr (HasMin) {
                    for (int64_t b = 0; b < blocks; ++b) {
                        s = Simd::fma(Simd::load(m + b * kTile + row), Simd::set1(qsum[i * blocks + b]), s);
                    }
                }
                Simd::store(scores + i * kTile + row, s);
            }
        }
    }

    // Stored row at which quad k of a tile's 64 rows starts, in the order in which pack_p leaves them.
    static constexpr int quad_row(int k) { return k % 4 * 16 + k / 4 * 4; }

    // Block b of V's codes as two right operands [half of the dims][16 quads][16 dims][4 rows].
    static HYBRIDKV_PHASE void stage_v(const Codes& codes, int64_t b, int8_t* out) {
        alignas(64) uint8_t order[64];
        for (int i = 0; i < 64; ++i) order[i] = static_cast<uint8_t>(i % 4 * 16 + i / 4);
        const I index = _mm512_load_si512(order);
        for (int k = 0; k < 16; ++k) {
            const int8_t* p = codes.row(quad_row(k)) + b * kBlock;
            for (int half = 0; half < 2; ++half, p += 16) {
                const auto lane = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i * codes.stride)); };
                I x = _mm512_castsi128_si512(lane(0));
                x = _mm512_mask_broadcast_i32x4(x, 0x00f0, lane(1));
                x = _mm512_mask_broadcast_i32x4(x, 0x0f00, lane(2));
                x = _mm512_mask_broadcast_i32x4(x, 0xf000, lane(3));
                _mm512_store_si512(out + half * 1024 + k * 64, _mm512_permutexvar_epi8(index, x));
            }
        }
    }

    // p * d of one query row as two int8 terms: high to row i, low to row 8 + i of the left operand.
    static inline __attribute__((always_inline)) void pack_p(const float* p, const float* d, int8_t* high_row) {
        I x[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            x[i] = Simd::to_int(Simd::mul(Simd::load(p + 16 * i), Simd::load(d + 16 * i)));
        }
        const I a = _mm512_packs_epi32(x[0], x[1]), b = _mm512_packs_epi32(x[2], x[3]);
        const I round = _mm512_set1_epi16(64);
        const I ha = _mm512_srai_epi16(_mm512_add_epi16(a, round), 7), hb = _mm512_srai_epi16(_mm512_add_epi16(b, round), 7);
        const I la = _mm512_sub_epi16(a, _mm512_slli_epi16(ha, 7)), lb = _mm512_sub_epi16(b, _mm512_slli_epi16(hb, 7));
        _mm512_store_si512(high_row, _mm512_packs_epi16(ha, hb));
        _mm512_store_si512(high_row + 8 * 64, _mm512_packs_epi16(la, lb));
    }

    // One group's share of a block of V: started by v_product, read by v_finish.
    struct Product {
        alignas(64) int32_t sums[2][256];
        float unit[group], bias[group];
        const float* alpha;
        float* acc;
        int n;
    };

    // p: [16][64] of pack_p, v: of stage_v.
    static inline void v_product(const int8_t* p, const int8_t* v, Product& out) {
        _tile_loadd(2, p, 64);
        _tile_zero(0);
        _tile_loadd(3, v, 64);
        _tile_dpbssd(0, 2, 3);
        _tile_stored(0, out.sums[0], 64);
        _tile_zero(1);
        _tile_loadd(3, v + 1024, 64);
        _tile_dpbssd(1, 2, 3);
        _tile_stored(1, out.sums[1], 64);
    }

    // acc[n][32] = acc * alpha + unit * (p . codes) + bias
    static HYBRIDKV_PHASE void v_finish(const Product& x, int64_t acc_stride) {
        for (int half = 0; half < 2; ++half) {
            for (int i = 0; i < x.n; ++i) {
                const int32_t* c = x.sums[half] + 16 * i;
                const I sum = _mm512_add_epi32(_mm512_slli_epi32(Simd::loadi(c), 7), Simd::loadi(c + 16 * group));
                float* a = x.acc + i * acc_stride + 16 * half;
                const F old = Simd::fma(Simd::load(a), Simd::set1(x.alpha[i]), Simd::set1(x.bias[i]));
                Simd::store(a, Simd::fma(Simd::to_float(sum), Simd::set1(x.unit[i]), old));
            }
        }
    }
};

}  // namespace

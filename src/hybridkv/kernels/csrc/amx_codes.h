// Tiles of int8: products of codes with queries and probabilities of two int8 terms.
//
// Rows of codes are the left operand of the scores as they lie in memory, so K needs no transposition. AMX sums in
// int32 over 64 products and more, but every block of 32 has a scale of its own: a product takes one block.
#pragma once

#include "amx_tiles.h"
#include "task.h"

namespace {

// Byte i of lane t to byte 4 * i + t.
struct Interleave {
    alignas(64) uint8_t byte[64];
    constexpr Interleave() : byte() {
        for (int i = 0; i < 64; ++i) byte[i] = static_cast<uint8_t>(i % 4 * 16 + i / 4);
    }
};
constexpr Interleave kInterleave;

struct AmxCodes {
    static int64_t query_bytes(int64_t dk) { return (dk + kBlock) / 64 * 2048; }

    // Columns of a product of two blocks, even and odd: 8 queries of either, the high and the low terms in tiles of
    // their own; or, of 4 queries, high and low of the even, high and low of the odd block. The other block's half of a
    // column is 0.
    static void put_query(int8_t* q, int64_t dk, int r, int group, const int32_t* codes) {
        const int low_at = group == 8 ? 1024 : 16;
        for (int64_t e = 0; e < dk; ++e) {
            int8_t* p = q + e / 64 * (group == 8 ? 2048 : 1024) + e % 64 / 4 * 64 + e % 64 / 32 * 32 + r * 4 + e % 4;
            const int high = (codes[e] + 64) >> 7;
            p[0] = static_cast<int8_t>(high);
            p[low_at] = static_cast<int8_t>(codes[e] - high * 128);
        }
    }

    // scores[count][n of kTile] of one group of packed queries; d, m: [block][kTile]; qsum: [8][blocks]. `sums` is room
    // for 2 * (blocks + 1) tiles: the products of sixteen rows are read while the next sixteen are computed.
    template <bool HasMin, int Group>
    static HYBRIDKV_PHASE void scores(const int8_t* q, const Codes& codes, const float* d, const float* m,
                                      const float* qsum, int64_t blocks, int n, int count, int32_t* sums, float* scores,
                                      Prefetch& ahead) {
        constexpr int tiles = Group / 4;
        const int parts = (n + 15) / 16, pairs = static_cast<int>(blocks + 1) / 2, products = parts * pairs;
        const auto at = [&](int product) { return sums + product % (2 * pairs) * tiles * 256; };
        int next = 0;
        for (int part = 0; part <= parts; ++part) {
            F acc[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) acc[i] = Simd::set1(0.f);
            for (int pair = 0; pair < pairs; ++pair, ++next) {
                if (next <= products) {
                    const int8_t* k = next < products ? codes.row(part * 16) + pair * 64 : nullptr;
                    product<Group>(next % 2, k, codes.stride, q + pair * tiles * 1024, next > 0 ? at(next - 1) : nullptr);
                }
                if (part == 0) continue;
                const float* d0 = d + 2 * pair * kTile + (part - 1) * 16;
                add<Group>(at(next - pairs), d0, 2 * pair + 1 < blocks ? d0 + kTile : d0, acc);
            }
            ahead.step();
            if (part > 0) {
                finish<HasMin, Group>(acc, m + (part - 1) * 16, qsum, blocks, count, scores + (part - 1) * 16);
            }
        }
    }

    // Starts a product (none if k is null) and stores the sums of the one before.
    template <int Group>
    static inline __attribute__((always_inline)) void product(int parity, const int8_t* k, int64_t stride,
                                                              const int8_t* q, int32_t* before) {
#define HYBRIDKV_PRODUCT(C0, C1, D0, D1)                         \
    if (k) {                                                     \
        _tile_zero(C0);                                          \
        _tile_loadd(4, k, stride);                               \
        _tile_loadd(5, q, 64);                                   \
        _tile_dpbssd(C0, 4, 5);                                  \
        if (Group == 8) {                                        \
            _tile_zero(C1);                                      \
            _tile_loadd(5, q + 1024, 64);                        \
            _tile_dpbssd(C1, 4, 5);                              \
        }                                                        \
    }                                                            \
    if (before) {                                                \
        _tile_stored(D0, before, 64);                            \
        if (Group == 8) _tile_stored(D1, before + 256, 64);      \
    }
        if (parity == 0) {
            HYBRIDKV_PRODUCT(0, 1, 2, 3)
        } else {
            HYBRIDKV_PRODUCT(2, 3, 0, 1)
        }
#undef HYBRIDKV_PRODUCT
    }

    // acc[16 rows] += sums times the scales of the even and the odd block.
    template <int Group>
    static inline __attribute__((always_inline)) void add(const int32_t* sums, const float* even, const float* odd,
                                                          F (&acc)[16]) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
            I c = Simd::loadi(sums + 16 * i);
            if (Group == 8) c = _mm512_add_epi32(_mm512_slli_epi32(c, 7), Simd::loadi(sums + 256 + 16 * i));
            const F d = _mm512_mask_broadcastss_ps(Simd::set1(even[i]), 0xff00, _mm_load_ss(odd + i));
            acc[i] = Simd::fma(Simd::to_float(c), d, acc[i]);
        }
    }

    template <bool HasMin, int Group>
    static inline __attribute__((always_inline)) void finish(const F (&acc)[16], const float* m, const float* qsum,
                                                             int64_t blocks, int count, float* scores) {
        alignas(64) float rows[256];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) Simd::store(rows + 16 * i, acc[i]);
        I even[8], odd[8];
        Simd::transpose8(rows, 64, even);
        Simd::transpose8(rows + 8, 64, odd);
        for (int i = 0; i < count; ++i) {
            const auto both = [&](int k) { return Simd::add(_mm512_castsi512_ps(even[k]), _mm512_castsi512_ps(odd[k])); };
            F x = Group == 8 ? both(i) : Simd::fma(both(i), Simd::set1(128.f), both(i + 4 & 7));
            if constexpr (HasMin) {
                for (int64_t b = 0; b < blocks; ++b) {
                    x = Simd::fma(Simd::load(m + b * kTile), Simd::set1(qsum[i * blocks + b]), x);
                }
            }
            Simd::store(scores + i * kTile, x);
        }
    }

    // A block of 64 rows of V's codes as two right operands [half of the dims][16 quads][16 dims][4 rows]; quad k holds
    // rows 2k, 32 + 2k, 2k + 1 and 33 + 2k, the order in which pack_p leaves them.
    static HYBRIDKV_PHASE void stage_v(const int8_t* codes, int64_t stride, int8_t* out) {
        const I index = _mm512_load_si512(kInterleave.byte);
        for (int k = 0; k < 16; ++k) {
            for (int half = 0; half < 2; ++half) {
                const int8_t* p = codes + 2 * k * stride + half * 16;
                const I x = four_rows(p, p + 32 * stride, p + stride, p + 33 * stride);
                _mm512_store_si512(out + half * 1024 + k * 64, _mm512_permutexvar_epi8(index, x));
            }
        }
    }

    static inline I four_rows(const int8_t* p0, const int8_t* p1, const int8_t* p2, const int8_t* p3) {
        const auto lane = [](const int8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); };
        I x = _mm512_castsi128_si512(lane(p0));
        x = _mm512_mask_broadcast_i32x4(x, 0x00f0, lane(p1));
        x = _mm512_mask_broadcast_i32x4(x, 0x0f00, lane(p2));
        return _mm512_mask_broadcast_i32x4(x, 0xf000, lane(p3));
    }

    // p * d of one query row and 64 stored rows as two int8 terms, 128 * high + low with low in 0..127: high to row i, low
    // to row 8 + i of the left operand.
    static inline __attribute__((always_inline)) void pack_p(const int16_t* p, const I (&d)[2], int8_t* high_row) {
        const I a = _mm512_mulhrs_epi16(_mm512_load_si512(p), d[0]), b = _mm512_mulhrs_epi16(_mm512_load_si512(p + 32), d[1]);
        constexpr __mmask64 odd = 0xaaaaaaaaaaaaaaaa;
        _mm512_store_si512(high_row, _mm512_mask_blend_epi8(odd, _mm512_srli_epi16(a, 7), _mm512_slli_epi16(b, 1)));
        const I low = _mm512_mask_blend_epi8(odd, a, _mm512_slli_epi16(b, 8));
        _mm512_store_si512(high_row + 8 * 64, _mm512_and_si512(low, _mm512_set1_epi8(127)));
    }

    struct Weigh {
        static constexpr int chunks = kTile / 64;
        struct Operands {
            alignas(64) int8_t v[2][chunks][2048];
            alignas(64) int8_t p[2][chunks][1024];
        };
        struct Product {
            alignas(64) int32_t sums[2][256];
            float unit[Amx::group], bias[Amx::group];
            float* acc;
            int count;
        };

        Task& t;
        Codes codes;

        Weigh(Task& task, int64_t row, int n) : t(task), codes(stage_codes(task.a.v, task.head, row, n, task.s.codes)) {}

        void prepare(int b, int r, int count, int item, Operands& o, Product& x) {
            x.count = 0;
            if (r == 0 && !t.careful_block(codes, b)) {
                for (int c = 0; c < chunks; ++c) stage_v(codes.row(c * 64) + b * kBlock, codes.stride, o.v[b % 2][c]);
            }
            if (!(t.s.d_block[b] < kInf)) return;
            x.count = count;
            x.acc = t.s.acc + r * t.dv + b * kBlock;
            for (int c = 0; c < chunks; ++c) {
                const int16_t* scales = t.s.d16 + b * kTile + c * 64;
                const I d[2] = {_mm512_load_si512(scales), _mm512_load_si512(scales + 32)};
                for (int i = 0; i < count; ++i) {
                    pack_p(t.s.p16 + (r + i) * kTile + c * 64, d, o.p[item % 2][c] + i * 64);
                }
            }
            const bool has_min = t.a.v.format->has_min();
            for (int i = 0; i < count; ++i) {
                x.unit[i] = t.s.p_unit[r + i] * t.s.d_block[b];
                x.bias[i] = has_min ? t.bias(r + i, b) : 0.f;
            }
        }

        void multiply(int item, const Operands& o, int b) {
            _tile_zero(0);
            _tile_zero(1);
            for (int c = 0; c < chunks; ++c) {
                _tile_loadd(4, o.p[item % 2][c], 64);
                _tile_loadd(5, o.v[b % 2][c], 64);
                _tile_dpbssd(0, 4, 5);
                _tile_loadd(5, o.v[b % 2][c] + 1024, 64);
                _tile_dpbssd(1, 4, 5);
            }
        }

        // acc[count][32] += unit * (p . codes) + bias
        void finish(const Product& x) {
            for (int half = 0; half < 2; ++half) {
                for (int i = 0; i < x.count; ++i) {
                    const int32_t* c = x.sums[half] + 16 * i;
                    const I sum = _mm512_add_epi32(_mm512_slli_epi32(Simd::loadi(c), 7), Simd::loadi(c + 16 * Amx::group));
                    float* a = x.acc + i * t.dv + 16 * half;
                    const F old = Simd::add(Simd::load(a), Simd::set1(x.bias[i]));
                    Simd::store(a, Simd::fma(Simd::to_float(sum), Simd::set1(x.unit[i]), old));
                }
            }
        }
    };
};

}  // namespace

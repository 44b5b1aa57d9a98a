// Tiles of bfloat16: products of f32, f16 and bf16 values. A float32 is the sum of two bfloat16 terms to 16 bits of
// precision, a float16 exactly; queries and probabilities are two terms too, and sums are float32.
#pragma once

#include "amx_tiles.h"
#include "task.h"

namespace {

struct AmxValues {
    static constexpr int packed = kBlock * 16;  // values in a block of a packed group of queries

    static int64_t query_bytes(int64_t dk) { return dk * 32; }

    static uint32_t bits_of(float x) {
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        return bits;
    }

    // Pairs of a block are dims i and 16 + i: a term of two vectors in one register, without a shuffle. The rest of x
    // is left in it.
    static inline __attribute__((always_inline)) I take_term(F (&x)[2]) {
        const I upper = _mm512_set1_epi32(static_cast<int32_t>(0xffff0000));
        const I a = _mm512_castps_si512(x[0]), b = _mm512_castps_si512(x[1]);
        x[0] = Simd::sub(x[0], _mm512_castsi512_ps(_mm512_and_si512(a, upper)));
        x[1] = Simd::sub(x[1], _mm512_castsi512_ps(_mm512_and_si512(b, upper)));
        return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(a, 16), b);
    }

    // Query row r of a group: [block][16 pairs][8 rows high, 8 rows low][2].
    static void put_query(uint16_t* q, int64_t dk, int r, const float* x) {
        alignas(64) uint16_t terms[2][32];
        for (int64_t b = 0; b < dk / kBlock; ++b, q += packed) {
            F values[2] = {Simd::load(x + b * kBlock), Simd::load(x + b * kBlock + 16)};
            _mm512_store_si512(terms[0], take_term(values));
            _mm512_store_si512(terms[1], take_term(values));
            for (int i = 0; i < 16; ++i) {
                std::memcpy(q + i * 32 + r * 2, terms[0] + 2 * i, 4);
                std::memcpy(q + i * 32 + 16 + r * 2, terms[1] + 2 * i, 4);
            }
        }
    }

    // Sixteen rows of K from `row` on, of which n are there: [block][terms][16][32]. Returns the number of terms.
    static HYBRIDKV_PHASE int stage_k(const Stored& k, int64_t head, int64_t row, int n, float* edge, uint16_t* out,
                                      Prefetch& ahead) {
        const int64_t blocks = padded(k.head_dim) / kBlock, stride = plane_row_bytes(*k.format, 0, k.head_dim);
        if (n < 16 || k.head_dim % kBlock) {
            for (int64_t b = 0; b < blocks; ++b, out += 2 * 512) {
                stage_values(k, head, row, n < 16 ? n : 16, b * kBlock, edge, 16);
                stage_rows<BitLayout::f32, 2>(reinterpret_cast<const uint8_t*>(edge), kBlock * 4, 1, out, ahead);
            }
            return 2;
        }
        const uint8_t* p = plane_row(k, 0, head, row);
                if (k.format->layout == BitLayout::f32) {
                    return stage_rows<BitLayout::f32, 2>(p, stride, blocks, out, ahead);
                }
        if (k.format->layout == BitLayout::f16) return stage_rows<BitLayout::f16, 2>(p, stride, blocks, out, ahead);
        return stage_rows<BitLayout::bf16, 1>(p, stride, blocks, out, ahead);
    }

    template <BitLayout Layout, int Terms>
    static inline int stage_rows(const uint8_t* p, int64_t stride, int64_t blocks, uint16_t* out, Prefetch& ahead) {
        for (int r = 0; r < 16; ++r, p += stride) {
            if (r % 4 == 0) ahead.step();
            for (int64_t b = 0; b < blocks; ++b) {
                F x[2] = {load_values<Layout>(p, b * kBlock), load_values<Layout>(p, b * kBlock + 16)};
                for (int t = 0; t < Terms; ++t) _mm512_store_si512(out + (b * Terms + t) * 512 + r * 32, take_term(x));
            }
        }
        return Terms;
    }

    // scores[count][16 of kTile]
    static HYBRIDKV_PHASE void scores(const uint16_t* q, const uint16_t* k, int terms, int64_t blocks, int count,
                                      float* scores) {
        Amx::written();
        _tile_zero(0);
        for (int64_t b = 0; b < blocks; ++b, q += packed) {
            _tile_loadd(5, q, 64);
            for (int t = 0; t < terms; ++t, k += 512) {
                _tile_loadd(4, k, 64);
                _tile_dpbf16ps(0, 4, 5);
            }
        }
        alignas(64) float sums[256];
        _tile_stored(0, sums, 64);
        I high[8], low[8];
        Simd::transpose8(sums, 64, high);
        Simd::transpose8(sums + 8, 64, low);
        for (int i = 0; i < count; ++i) {
            Simd::store(scores + i * kTile, Simd::add(_mm512_castsi512_ps(high[i]), _mm512_castsi512_ps(low[i])));
        }
    }

    struct Weigh {
        static constexpr int chunks = kTile / 32, steps = chunks;  // a product sums over 32 stored rows
        struct Operands {
            alignas(64) uint16_t v[2][chunks][2][2][512];  // [half of the dims][terms][16 pairs of rows][16 dims][2]
            alignas(64) uint16_t p[kMaxRows / Amx::group][chunks][512];
        };
        struct Product {
            alignas(64) float sums[2][256];
            float* acc;
            int64_t b;
            int r, count;
        };

        Task& t;
        int64_t row;
        int n, used, terms;  // chunks past `used` hold no rows

        Weigh(Task& task, int64_t first, int count)
            : t(task), row(first), n(count), used((count + 31) / 32),
              terms(task.seg.v.format->layout == BitLayout::bf16 ? 1 : 2) {}

        void prepare(int b, int r, int count, int, Operands& o, Product& x, Prefetch& ahead) {
            if (r == 0) stage(b, o.v[b % 2], ahead);
            if (b == 0) {
                for (int i = 0; i < count; ++i) pack_p(t.s.scores + (r + i) * kTile, o.p[r / Amx::group], i);
            }
            x.acc = t.s.acc + r * t.dv + b * kBlock;
            x.b = b;
            x.r = r;
            x.count = count;
        }

        void pack_p(const float* p, uint16_t (&out)[chunks][512], int i) const {
            for (int c = 0; c < used; ++c) {
                F x[2] = {Simd::load(p + c * 32), Simd::load(p + c * 32 + 16)};
                _mm512_store_si512(out[c] + i * 32, take_term(x));
                _mm512_store_si512(out[c] + (Amx::group + i) * 32, take_term(x));
            }
        }

        HYBRIDKV_PHASE void stage(int64_t b, uint16_t (&out)[chunks][2][2][512], Prefetch& ahead) {
            const Stored& v = t.seg.v;
            const uint8_t* p = plane_row(v, 0, t.head, row) + b * kBlock * v.format->plane_bytes[0];
            const int64_t stride = plane_row_bytes(*v.format, 0, v.head_dim);
            if (n < kTile || v.head_dim % kBlock) {
                stage_values(v, t.head, row, n, b * kBlock, t.s.v, used * 32);
                return stage_pairs<BitLayout::f32, 2>(reinterpret_cast<const uint8_t*>(t.s.v), kBlock * 4, out, ahead);
            }
            if (v.format->layout == BitLayout::f32) return stage_pairs<BitLayout::f32, 2>(p, stride, out, ahead);
            if (v.format->layout == BitLayout::f16) return stage_pairs<BitLayout::f16, 2>(p, stride, out, ahead);
            return stage_pairs<BitLayout::bf16, 1>(p, stride, out, ahead);
        }

        template <BitLayout Layout, int Terms>
        inline void stage_pairs(const uint8_t* p, int64_t stride, uint16_t (&out)[chunks][2][2][512],
                                Prefetch& ahead) const {
            for (int c = 0; c < used; ++c, p += 32 * stride) {
                ahead.step();
                for (int i = 0; i < 16; ++i) {
                    for (int half = 0; half < 2; ++half) {
                        const uint8_t* at = p + i * stride;
                        F x[2] = {load_values<Layout>(at, half * 16), load_values<Layout>(at + 16 * stride, half * 16)};
                        for (int k = 0; k < Terms; ++k) _mm512_store_si512(out[c][half][k] + i * 32, take_term(x));
                    }
                }
            }
        }

        void multiply(int item, const Operands& o, int b) {
            const int g = item - b * ((t.rows + Amx::group - 1) / Amx::group);
            _tile_zero(0);
            _tile_zero(1);
            for (int c = 0; c < used; ++c) {
                _tile_loadd(4, o.p[g][c], 64);
                for (int k = 0; k < terms; ++k) {
                    _tile_loadd(5, o.v[b % 2][c][0][k], 64);
                    _tile_dpbf16ps(0, 4, 5);
                    _tile_loadd(5, o.v[b % 2][c][1][k], 64);
                    _tile_dpbf16ps(1, 4, 5);
                }
            }
        }

        // acc[count][32] += p . v; a NaN or an infinity in the tile's values shows in every sum, and is left to
        // accumulate_unmasked.
        void finish(const Product& x) {
            F check = Simd::set1(0.f);
            for (int half = 0; half < 2; ++half) {
                for (int i = 0; i < x.count; ++i) check = Simd::fma(sum(x, half, i), Simd::set1(0.f), check);
            }
            if (Simd::reduce_add(check) != 0.f) {
                stage_values(t.seg.v, t.head, row, n, x.b * kBlock, t.s.v, kTile);
                return t.accumulate_unmasked(x.b, x.r, x.count);
            }
            for (int half = 0; half < 2; ++half) {
                for (int i = 0; i < x.count; ++i) {
                    float* a = x.acc + i * t.dv + 16 * half;
                    Simd::store(a, Simd::add(Simd::load(a), sum(x, half, i)));
                }
            }
        }

        static inline F sum(const Product& x, int half, int i) {
            return Simd::add(Simd::load(x.sums[half] + 16 * i), Simd::load(x.sums[half] + 16 * (Amx::group + i)));
        }
    };
};

}  // namespace

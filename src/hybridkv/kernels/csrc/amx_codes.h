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

// Byte i % 8 of qword t to byte 4 * i + t.
struct InterleaveHigh {
    alignas(64) uint8_t byte[64];
    constexpr InterleaveHigh() : byte() {
        for (int i = 0; i < 64; ++i) byte[i] = static_cast<uint8_t>(i % 4 * 8 + i / 4 % 8);
    }
};
constexpr InterleaveHigh kInterleaveHigh;

struct AmxCodes {
    static int64_t query_bytes(int64_t dk) { return (dk + kBlock) / 64 * 2048; }

    // Columns of a product of two blocks, even and odd: 8 queries of either, the high and the low terms in tiles of
    // their own; or, of 4 queries, high and low of the even, high and low of the odd block. The other block's half of a
    // column is 0.
    static void put_query(int8_t* q, int64_t dk, int r, int group, const int32_t* codes) {
        const int low_at = group == 8 ? 1024 : 16;
        alignas(64) int8_t terms[2][kBlock];
        for (int64_t b = 0; b < dk / kBlock; ++b, codes += kBlock) {
            for (int i = 0; i < kBlock; ++i) {
                const int high = (codes[i] + 64) >> 7;
                terms[0][i] = static_cast<int8_t>(high);
                terms[1][i] = static_cast<int8_t>(codes[i] - high * 128);
            }
            int8_t* out = q + b / 2 * (group == 8 ? 2048 : 1024) + b % 2 * (512 + 32) + r * 4;
            for (int i = 0; i < kBlock; i += 4) {
                std::memcpy(out + i * 16, terms[0] + i, 4);
                std::memcpy(out + i * 16 + low_at, terms[1] + i, 4);
            }
        }
    }

    // Scores of all query rows over n stored rows, sixteen at a time; their products are read while those of the next
    // sixteen are computed.
    template <bool HasMin, int Group>
    static HYBRIDKV_PHASE void scores(Task& t, int64_t row, int n, Prefetch& ahead) {
        constexpr int tiles = Group / 4;
        const int blocks = static_cast<int>(t.dk / kBlock), pairs = (blocks + 1) / 2;
        const int groups = (t.rows + Amx::group - 1) / Amx::group, items = (n + 15) / 16 * groups;
        int32_t* sums = reinterpret_cast<int32_t*>(t.s.k);
        const auto at = [&](int product) { return sums + product % (pairs + 1) * tiles * 256; };
        Codes codes{};
        int next = 0;
        for (int item = 0, part = 0, g = 0, last_part = 0, last_g = 0; item <= items; ++item) {
            if (g == 0 && item < items) {
                const int left = n - part * 16, count = left < 16 ? left : 16;
                codes = stage_codes(t.seg.k, t.head, row + part * 16, count, t.s.codes + part % 2 * 16 * t.dk, 16);
            }
            const int8_t* q = reinterpret_cast<const int8_t*>(t.s.q) + g * query_bytes(t.dk);
            const float* d = t.s.k_d + last_part * 16;
            F acc[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) acc[i] = Simd::set1(0.f);
            Amx::written();
            for (int pair = 0; pair < pairs; ++pair, ++next) {
                if (last_g == groups - 1) ahead.step();
                if (item < items || pair == 0) {
                    const int8_t* k = item < items ? codes.data + pair * 64 : nullptr;
                    product<Group>(next % 2, k, codes.stride, q + pair * tiles * 1024,
                                   next > 0 ? at(next - 1) : nullptr);
                }
                if (item == 0) continue;
                const float* even = d + 2 * pair * kTile;
                add<Group>(at(next - pairs), even, 2 * pair + 1 < blocks ? even + kTile : even, acc);
            }
            if (item > 0) {
                const int r = last_g * Amx::group, count = t.rows - r < Amx::group ? t.rows - r : Amx::group;
                finish<HasMin, Group>(acc, t.s.k_m + last_part * 16, t.s.q_sum + r * blocks, blocks, count,
                                      t.s.scores + r * kTile + last_part * 16);
            }
            last_part = part;
            last_g = g;
            g = g + 1 < groups ? g + 1 : 0;
            part += g == 0;
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
            const auto both = [&](int k) {
                return Simd::add(_mm512_castsi512_ps(even[k]), _mm512_castsi512_ps(odd[k]));
            };
            F x = Group == 8 ? both(i) : Simd::fma(both(i), Simd::set1(128.f), both((i + 4) % 8));
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

    // The same from nibbles as they are stored, 16 bytes a row; a table says what each stands for. `high` is null or
    // the upper bits of q6_0's codes, 8 bytes a row: in a byte, those of dims i, 16 + i, 8 + i and 24 + i.
    static HYBRIDKV_PHASE void stage_nibbles(const uint8_t* bytes, int64_t stride, const uint8_t* high,
                                             int64_t high_stride, const int8_t* book, int8_t* out) {
        const I index = _mm512_load_si512(kInterleave.byte), mask = _mm512_set1_epi8(15), pair = _mm512_set1_epi8(0x30);
        const I table = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(book)));
        const I high_index = _mm512_load_si512(kInterleaveHigh.byte);
        const I turn[2] = {_mm512_setr_epi64(4, 4, 4, 4, 0, 0, 0, 0), _mm512_setr_epi64(2, 2, 2, 2, 62, 62, 62, 62)};
        for (int k = 0; k < 16; ++k) {
            const int8_t* p = reinterpret_cast<const int8_t*>(bytes) + 2 * k * stride;
            const I rows = four_rows(p, p + 32 * stride, p + stride, p + 33 * stride);
            I x = _mm512_permutexvar_epi8(index, rows), y = _mm512_setzero_si512();
            if (high) {
                int64_t h[4];
                for (int t = 0; t < 4; ++t) std::memcpy(h + t, high + (2 * k + t % 2 * 32 + t / 2) * high_stride, 8);
                y = _mm512_castsi256_si512(_mm256_setr_epi64x(h[0], h[1], h[2], h[3]));
                y = _mm512_permutexvar_epi8(high_index, y);
            }
            for (int half = 0; half < 2; ++half, x = _mm512_srli_epi16(x, 4)) {
                I code = _mm512_shuffle_epi8(table, _mm512_and_si512(x, mask));
                if (high) code = _mm512_add_epi8(code, _mm512_and_si512(_mm512_rolv_epi64(y, turn[half]), pair));
                _mm512_store_si512(out + half * 1024 + k * 64, code);
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

    // p * d of one query row and 64 stored rows as two int8 terms, 128 * high + low with low in 0..127: high to row i,
    // low to row 8 + i of the left operand.
    static inline __attribute__((always_inline)) void pack_p(const int16_t* p, const I (&d)[2], int8_t* high_row) {
        const I a = _mm512_mulhrs_epi16(_mm512_load_si512(p), d[0]);
        const I b = _mm512_mulhrs_epi16(_mm512_load_si512(p + 32), d[1]);
        constexpr __mmask64 odd = 0xaaaaaaaaaaaaaaaa;
        _mm512_store_si512(high_row, _mm512_mask_blend_epi8(odd, _mm512_srli_epi16(a, 7), _mm512_slli_epi16(b, 1)));
        const I low = _mm512_mask_blend_epi8(odd, a, _mm512_slli_epi16(b, 8));
        _mm512_store_si512(high_row + 8 * 64, _mm512_and_si512(low, _mm512_set1_epi8(127)));
    }

    struct Weigh {
        static constexpr int chunks = kTile / 64, steps = chunks;
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
        int64_t row;
        int n;
        bool direct;  // nibbles go to the operands without a stop as codes
        Codes codes{};
        int8_t book[16];

        Weigh(Task& task, int64_t first, int count) : t(task), row(first), n(count) {
            const Format& f = *t.seg.v.format;
            direct = (f.layout == BitLayout::nibbles || f.layout == BitLayout::nibbles_pairs) && n == kTile;
            if (!direct) codes = stage_codes(t.seg.v, t.head, row, n, t.s.codes);
            for (int i = 0; i < 16; ++i) book[i] = f.codebook ? f.codebook[i] : static_cast<int8_t>(i - f.zero);
        }

        void stage(int b, int8_t (&out)[chunks][2048], Prefetch& ahead) {
            if (!(t.s.d_block[b] < kInf)) {
                if (direct) codes = stage_codes(t.seg.v, t.head, row, n, t.s.codes);
                return t.accumulate_unmasked_codes(codes, b);
            }
            const Format& f = *t.seg.v.format;
            const int64_t stride = plane_row_bytes(f, f.plane_codes, t.seg.v.head_dim);
            const uint8_t* bytes = direct ? plane_row(t.seg.v, f.plane_codes, t.head, row) + b * 16 : nullptr;
            const bool two_planes = direct && f.plane_high >= 0;
            const int64_t high_stride = two_planes ? plane_row_bytes(f, f.plane_high, t.seg.v.head_dim) : 0;
            const uint8_t* high = two_planes ? plane_row(t.seg.v, f.plane_high, t.head, row) + b * 8 : nullptr;
            for (int c = 0; c < chunks; ++c) {
                ahead.step();
                if (!direct) {
                    stage_v(codes.row(c * 64) + b * kBlock, codes.stride, out[c]);
                    continue;
                }
                const uint8_t* upper = high ? high + c * 64 * high_stride : nullptr;
                stage_nibbles(bytes + c * 64 * stride, stride, upper, high_stride, book, out[c]);
            }
        }

        void prepare(int b, int r, int count, int item, Operands& o, Product& x, Prefetch& ahead) {
            x.count = 0;
            if (r == 0) stage(b, o.v[b % 2], ahead);
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
            const bool has_min = t.seg.v.format->has_min();
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
                    const I high = _mm512_slli_epi32(Simd::loadi(c), 7), low = Simd::loadi(c + 16 * Amx::group);
                    const I sum = _mm512_add_epi32(high, low);
                    float* a = x.acc + i * t.dv + 16 * half;
                    const F old = Simd::add(Simd::load(a), Simd::set1(x.bias[i]));
                    Simd::store(a, Simd::fma(Simd::to_float(sum), Simd::set1(x.unit[i]), old));
                }
            }
        }
    };
};

}  // namespace

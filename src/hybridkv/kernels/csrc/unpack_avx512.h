// Codes of blocks of 32, from their bytes to int8, four blocks at a time; the rest as with AVX2.
#pragma once

#include "unpack_x86.h"

namespace {

struct UnpackWide : Unpack {
    // Two blocks a register: [low, high] nibbles of blocks 0 and 1, then of 2 and 3.
    static void nibbles4(const uint8_t* qs, __m512i (&x)[2]) {
        const __m512i q = _mm512_loadu_si512(qs), mask = _mm512_set1_epi8(15);
        const __m512i lo = _mm512_and_si512(q, mask), hi = _mm512_and_si512(_mm512_srli_epi16(q, 4), mask);
        x[0] = _mm512_permutex2var_epi64(lo, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), hi);
        x[1] = _mm512_permutex2var_epi64(lo, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), hi);
    }

    static void plain(const uint8_t* qs, int64_t blocks, int8_t zero, int8_t* out) {
        const __m512i z = _mm512_set1_epi8(zero);
        for (; blocks >= 4; blocks -= 4, qs += 64, out += 128) {
            __m512i x[2];
            nibbles4(qs, x);
            for (int i = 0; i < 2; ++i) _mm512_storeu_si512(out + 64 * i, _mm512_sub_epi8(x[i], z));
        }
        Unpack::plain(qs, blocks, zero, out);
    }

    static void codebook(const uint8_t* qs, int64_t blocks, const int8_t* book, int8_t* out) {
        const __m512i table = _mm512_broadcast_i32x4(load16(reinterpret_cast<const uint8_t*>(book)));
        for (; blocks >= 4; blocks -= 4, qs += 64, out += 128) {
            __m512i x[2];
            nibbles4(qs, x);
            for (int i = 0; i < 2; ++i) _mm512_storeu_si512(out + 64 * i, _mm512_shuffle_epi8(table, x[i]));
        }
        Unpack::codebook(qs, blocks, book, out);
    }

    static void fifth_bits(const uint8_t* qs, const uint8_t* high, int64_t blocks, int8_t zero, int8_t* out) {
        const __m512i z = _mm512_set1_epi8(zero), sixteen = _mm512_set1_epi8(16);
        for (; blocks >= 4; blocks -= 4, qs += 64, high += 16, out += 128) {
            __m512i x[2];
            nibbles4(qs, x);
            for (int i = 0; i < 2; ++i) {
                uint64_t bits;
                std::memcpy(&bits, high + 8 * i, 8);
                x[i] = _mm512_mask_add_epi8(x[i], bits, x[i], sixteen);
                _mm512_storeu_si512(out + 64 * i, _mm512_sub_epi8(x[i], z));
            }
        }
        Unpack::fifth_bits(qs, high, blocks, zero, out);
    }

    static void upper_pairs(const uint8_t* qs, const uint8_t* high, int64_t blocks, int8_t zero, int8_t* out) {
        const __m512i z = _mm512_set1_epi8(zero), mask = _mm512_set1_epi8(0x30);
        const __m512i spread = _mm512_setr_epi64(0, 0, 0, 0, 1, 1, 1, 1);
        const __m512i turn = _mm512_setr_epi64(4, 0, 2, 62, 4, 0, 2, 62);  // as Unpack::upper, by rotation
        for (; blocks >= 4; blocks -= 4, qs += 64, high += 32, out += 128) {
            __m512i x[2];
            nibbles4(qs, x);
            for (int i = 0; i < 2; ++i) {
                const __m512i h = _mm512_permutexvar_epi64(spread, _mm512_castsi128_si512(load16(high + 16 * i)));
                const __m512i upper = _mm512_and_si512(_mm512_rolv_epi64(h, turn), mask);
                _mm512_storeu_si512(out + 64 * i, _mm512_sub_epi8(_mm512_or_si512(x[i], upper), z));
            }
        }
        Unpack::upper_pairs(qs, high, blocks, zero, out);
    }

    // Two blocks: the pairs of 16 bytes, in the order of the lanes.
    static __m512i pairs2(const uint8_t* qs) {
        const __m512i spread = _mm512_setr_epi64(0, 0, 0, 0, 1, 1, 1, 1), down = _mm512_setr_epi64(0, 4, 2, 6, 0, 4, 2, 6);
        const __m512i h = _mm512_permutexvar_epi64(spread, _mm512_castsi128_si512(load16(qs)));
        return _mm512_and_si512(_mm512_srlv_epi64(h, down), _mm512_set1_epi8(3));
    }

    static void pairs(const uint8_t* qs, int64_t blocks, const int8_t* book, int8_t* out) {
        const __m512i table = _mm512_broadcast_i32x4(load16(reinterpret_cast<const uint8_t*>(book)));
        for (; blocks >= 2; blocks -= 2, qs += 16, out += 64) {
            _mm512_storeu_si512(out, _mm512_shuffle_epi8(table, pairs2(qs)));
        }
        Unpack::pairs(qs, blocks, book, out);
    }

    static void pairs_third_bits(const uint8_t* qs, const uint8_t* high, int64_t blocks, const int8_t* book,
                                 int8_t* out) {
        const __m512i table = _mm512_broadcast_i32x4(load16(reinterpret_cast<const uint8_t*>(book)));
        const __m512i four = _mm512_set1_epi8(4);
        for (; blocks >= 2; blocks -= 2, qs += 16, high += 8, out += 64) {
            uint64_t bits;
            std::memcpy(&bits, high, 8);
            const __m512i low = pairs2(qs);
            _mm512_storeu_si512(out, _mm512_shuffle_epi8(table, _mm512_mask_add_epi8(low, bits, low, four)));
        }
        Unpack::pairs_third_bits(qs, high, blocks, book, out);
    }
};

}  // namespace

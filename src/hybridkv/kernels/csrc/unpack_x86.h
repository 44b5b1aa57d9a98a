// Codes of blocks of 32, from their bytes to int8, in 256-bit registers.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

struct Unpack {
    static __m128i load16(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
    static void put(int8_t* out, __m256i v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), v); }

    // Low nibbles in the lower half, high nibbles in the upper.
    static __m256i nibbles(const uint8_t* qs) {
        const __m128i q = load16(qs);
        return _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(q, 4), q), _mm256_set1_epi8(15));
    }

    // `value` in the lanes whose bit is set.
    static __m256i bits(const uint8_t* high, int8_t value) {
        int32_t bits;
        std::memcpy(&bits, high, 4);
        // Byte i of the word to lanes 8i..8i+7, then each lane tests its bit.
        const __m256i spread = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2,
                                                3, 3, 3, 3, 3, 3, 3, 3);
        const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201u));
        const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(bits), spread);
        const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit);
        return _mm256_and_si256(set, _mm256_set1_epi8(value));
    }

    static __m256i upper(const uint8_t* high) {
        int64_t word;
        std::memcpy(&word, high, 8);
        // Lanes 0-7, 8-15, 16-23, 24-31 take bits 0-1, 4-5, 2-3, 6-7 of the eight bytes, moved to bits 4-5. A shift
        // by 64 gives 0.
        const __m256i h = _mm256_set1_epi64x(word);
        const __m256i up = _mm256_sllv_epi64(h, _mm256_setr_epi64x(4, 0, 2, 64));
        const __m256i down = _mm256_srlv_epi64(h, _mm256_setr_epi64x(64, 64, 64, 2));
        return _mm256_and_si256(_mm256_or_si256(up, down), _mm256_set1_epi8(0x30));
    }

    static __m256i lower(const uint8_t* qs) {  // the same pairs, moved to bits 0-1
        int64_t word;
        std::memcpy(&word, qs, 8);
        const __m256i down = _mm256_srlv_epi64(_mm256_set1_epi64x(word), _mm256_setr_epi64x(0, 4, 2, 6));
        return _mm256_and_si256(down, _mm256_set1_epi8(3));
    }

    static void plain(const uint8_t* qs, int64_t blocks, int8_t zero, int8_t* out) {
        const __m256i z = _mm256_set1_epi8(zero);
        for (; blocks > 0; --blocks, qs += 16, out += 32) put(out, _mm256_sub_epi8(nibbles(qs), z));
    }

    static void codebook(const uint8_t* qs, int64_t blocks, const int8_t* book, int8_t* out) {
        const __m256i table = _mm256_broadcastsi128_si256(load16(reinterpret_cast<const uint8_t*>(book)));
        for (; blocks > 0; --blocks, qs += 16, out += 32) put(out, _mm256_shuffle_epi8(table, nibbles(qs)));
    }

    static void fifth_bits(const uint8_t* qs, const uint8_t* high, int64_t blocks, int8_t zero, int8_t* out) {
        const __m256i z = _mm256_set1_epi8(zero);
        for (; blocks > 0; --blocks, qs += 16, high += 4, out += 32) {
            put(out, _mm256_sub_epi8(_mm256_or_si256(nibbles(qs), bits(high, 16)), z));
        }
    }

    static void upper_pairs(const uint8_t* qs, const uint8_t* high, int64_t blocks, int8_t zero, int8_t* out) {
        const __m256i z = _mm256_set1_epi8(zero);
        for (; blocks > 0; --blocks, qs += 16, high += 8, out += 32) {
            put(out, _mm256_sub_epi8(_mm256_or_si256(nibbles(qs), upper(high)), z));
        }
    }

    static void pairs(const uint8_t* qs, int64_t blocks, const int8_t* book, int8_t* out) {
        const __m256i table = _mm256_broadcastsi128_si256(load16(reinterpret_cast<const uint8_t*>(book)));
        for (; blocks > 0; --blocks, qs += 8, out += 32) put(out, _mm256_shuffle_epi8(table, lower(qs)));
    }

    static void pairs_third_bits(const uint8_t* qs, const uint8_t* high, int64_t blocks, const int8_t* book,
                                 int8_t* out) {
        const __m256i table = _mm256_broadcastsi128_si256(load16(reinterpret_cast<const uint8_t*>(book)));
        for (; blocks > 0; --blocks, qs += 8, high += 4, out += 32) {
            put(out, _mm256_shuffle_epi8(table, _mm256_or_si256(lower(qs), bits(high, 4))));
        }
    }
};

}  // namespace

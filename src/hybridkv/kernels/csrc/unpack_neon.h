// Codes of blocks of 32, from their bytes to int8, in 128-bit registers.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace {

struct Unpack {
    // A block: lanes 0-15, then 16-31.
    struct Block {
        uint8x16_t low, high;
    };

    static Block nibbles(const uint8_t* qs) {
        const uint8x16_t q = vld1q_u8(qs);
        return {vandq_u8(q, vdupq_n_u8(15)), vshrq_n_u8(q, 4)};
    }

    // `value` in the lanes whose bit of two bytes is set.
    static uint8x16_t bits16(uint8_t first, uint8_t second, uint8_t value) {
        const uint8x8_t bit = vcreate_u8(0x8040201008040201u);
        const uint8x16_t bytes = vcombine_u8(vdup_n_u8(first), vdup_n_u8(second));
        return vandq_u8(vtstq_u8(bytes, vcombine_u8(bit, bit)), vdupq_n_u8(value));
    }
    static Block bits(const uint8_t* high, uint8_t value) {
        return {bits16(high[0], high[1], value), bits16(high[2], high[3], value)};
    }

    // Eight bytes of four pairs of bits each: lanes 0-7, 8-15, 16-23 and 24-31 take bits 0-1, 4-5, 2-3 and 6-7, moved up
    // by Up bits and masked.
    template <int Up>
    static Block two_bits(const uint8_t* p) {
        const uint8x8_t once = vld1_u8(p);
        const uint8x16_t h = vcombine_u8(once, once), mask = vdupq_n_u8(3 << Up);
        const int8x16_t first = vcombine_s8(vdup_n_s8(Up), vdup_n_s8(Up - 4));
        const int8x16_t second = vcombine_s8(vdup_n_s8(Up - 2), vdup_n_s8(Up - 6));
        return {vandq_u8(vshlq_u8(h, first), mask), vandq_u8(vshlq_u8(h, second), mask)};
    }

    static Block both(Block a, Block b) { return {vorrq_u8(a.low, b.low), vorrq_u8(a.high, b.high)}; }

    static void put(int8_t* out, int8x16_t low, int8x16_t high) {
        vst1q_s8(out, low);
        vst1q_s8(out + 16, high);
    }
    static void put_less(int8_t* out, Block codes, int8_t zero) {
        const int8x16_t z = vdupq_n_s8(zero);
        put(out, vsubq_s8(vreinterpretq_s8_u8(codes.low), z), vsubq_s8(vreinterpretq_s8_u8(codes.high), z));
    }
    static void put_looked_up(int8_t* out, Block codes, int8x16_t table) {
        put(out, vqtbl1q_s8(table, codes.low), vqtbl1q_s8(table, codes.high));
    }

    static void plain(const uint8_t* qs, int64_t blocks, int8_t zero, int8_t* out) {
        for (; blocks > 0; --blocks, qs += 16, out += 32) put_less(out, nibbles(qs), zero);
    }

    static void codebook(const uint8_t* qs, int64_t blocks, const int8_t* book, int8_t* out) {
        const int8x16_t table = vld1q_s8(book);
        for (; blocks > 0; --blocks, qs += 16, out += 32) put_looked_up(out, nibbles(qs), table);
    }

    static void fifth_bits(const uint8_t* qs, const uint8_t* high, int64_t blocks, int8_t zero, int8_t* out) {
        for (; blocks > 0; --blocks, qs += 16, high += 4, out += 32) {
            put_less(out, both(nibbles(qs), bits(high, 16)), zero);
        }
    }

    static void upper_pairs(const uint8_t* qs, const uint8_t* high, int64_t blocks, int8_t zero, int8_t* out) {
        for (; blocks > 0; --blocks, qs += 16, high += 8, out += 32) {
            put_less(out, both(nibbles(qs), two_bits<4>(high)), zero);
        }
    }

    static void pairs(const uint8_t* qs, int64_t blocks, const int8_t* book, int8_t* out) {
        const int8x16_t table = vld1q_s8(book);
        for (; blocks > 0; --blocks, qs += 8, out += 32) put_looked_up(out, two_bits<0>(qs), table);
    }

    static void pairs_third_bits(const uint8_t* qs, const uint8_t* high, int64_t blocks, const int8_t* book,
                                 int8_t* out) {
        const int8x16_t table = vld1q_s8(book);
        for (; blocks > 0; --blocks, qs += 8, high += 4, out += 32) {
            put_looked_up(out, both(two_bits<0>(qs), bits(high, 4)), table);
        }
    }
};

}  // namespace

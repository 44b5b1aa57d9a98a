// Codes of blocks of 32, from their bytes to int8, in plain C++.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

struct Unpack {
    static void plain(const uint8_t* qs, int64_t blocks, int8_t zero, int8_t* out) {
        for (; blocks > 0; --blocks, qs += 16, out += 32) {
            for (int i = 0; i < 16; ++i) out[i] = static_cast<int8_t>((qs[i] & 15) - zero);
            for (int i = 0; i < 16; ++i) out[16 + i] = static_cast<int8_t>((qs[i] >> 4) - zero);
        }
    }

    static void codebook(const uint8_t* qs, int64_t blocks, const int8_t* book, int8_t* out) {
        for (; blocks > 0; --blocks, qs += 16, out += 32) {
            for (int i = 0; i < 16; ++i) {
                out[i] = book[qs[i] & 15];
                out[16 + i] = book[qs[i] >> 4];
            }
        }
    }

    static void fifth_bits(const uint8_t* qs, const uint8_t* high, int64_t blocks, int8_t zero, int8_t* out) {
        for (; blocks > 0; --blocks, qs += 16, high += 4, out += 32) {
            uint32_t bits;
            std::memcpy(&bits, high, 4);
            for (int i = 0; i < 16; ++i) {
                out[i] = static_cast<int8_t>(((qs[i] & 15) | ((bits >> i) & 1) << 4) - zero);
                out[16 + i] = static_cast<int8_t>(((qs[i] >> 4) | ((bits >> (16 + i)) & 1) << 4) - zero);
            }
        }
    }

    // Byte j of `high` holds lanes j and j + 16 in its lower half, j + 8 and j + 24 in its upper half.
    static void upper_pairs(const uint8_t* qs, const uint8_t* high, int64_t blocks, int8_t zero, int8_t* out) {
        for (; blocks > 0; --blocks, qs += 16, high += 8, out += 32) {
            for (int half = 0; half < 16; half += 8) {
                for (int i = 0; i < 8; ++i) {
                    const int h = high[i] >> half / 2, q = qs[half + i];
                    out[half + i] = static_cast<int8_t>(((q & 15) | (h & 3) << 4) - zero);
                    out[16 + half + i] = static_cast<int8_t>(((q >> 4) | (h >> 2 & 3) << 4) - zero);
                }
            }
        }
    }

    // Byte j holds lanes j, j + 16, j + 8 and j + 24, from the lowest bits up.
    static void pairs(const uint8_t* qs, int64_t blocks, const int8_t* book, int8_t* out) {
        for (; blocks > 0; --blocks, qs += 8, out += 32) {
            for (int i = 0; i < 8; ++i) {
                out[i] = book[qs[i] & 3];
                out[16 + i] = book[qs[i] >> 2 & 3];
                out[8 + i] = book[qs[i] >> 4 & 3];
                out[24 + i] = book[qs[i] >> 6];
            }
        }
    }

    static void pairs_third_bits(const uint8_t* qs, const uint8_t* high, int64_t blocks, const int8_t* book,
                                 int8_t* out) {
        for (; blocks > 0; --blocks, qs += 8, high += 4, out += 32) {
            uint32_t bits;
            std::memcpy(&bits, high, 4);
            for (int i = 0; i < 8; ++i) {
                out[i] = book[(qs[i] & 3) | (bits >> i & 1) << 2];
                out[16 + i] = book[(qs[i] >> 2 & 3) | (bits >> (16 + i) & 1) << 2];
                out[8 + i] = book[(qs[i] >> 4 & 3) | (bits >> (8 + i) & 1) << 2];
                out[24 + i] = book[(qs[i] >> 6) | (bits >> (24 + i) & 1) << 2];
            }
        }
    }
};

}  // namespace

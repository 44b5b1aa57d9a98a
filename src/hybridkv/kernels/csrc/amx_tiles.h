// The tile registers and how they are shaped: 0-3 sums, 4 and 5 the operands, all of 16 rows of 64 bytes. Their names
// are part of the instructions, hence the literals in the code.
#pragma once

#include "stage.h"

namespace {

struct Amx {
    static constexpr int group = 8;  // query rows in a tile: each has two terms

    struct alignas(64) Config {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16};
    };
    static void configure() {
        const Config config;
        asm volatile("" ::"r"(&config) : "memory");
        _tile_loadconfig(&config);
    }
    static void release() { _tile_release(); }

    // The compiler does not know that a tile load reads memory: the writer of an operand says so here.
    static void written() { asm volatile("" ::: "memory"); }

    static void store_pair(int32_t (&sums)[2][256]) {
        _tile_stored(0, sums[0], 64);
        _tile_stored(1, sums[1], 64);
    }
    static void store_pair(float (&sums)[2][256]) {
        _tile_stored(0, sums[0], 64);
        _tile_stored(1, sums[1], 64);
    }
};

}  // namespace

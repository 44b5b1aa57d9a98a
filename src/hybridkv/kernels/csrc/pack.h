// How a weight lies in memory: panels of kPanel output rows, each contiguous, one after the other, 64-byte aligned.
// Rows and inputs past the matrix are zeros. Knows no SIMD; linear.h reads it, kernels/linear.py writes it.
//
// f32   [n_in][16 rows] float32
// bf16  [n_in / 2][16 rows][2] bfloat16: a right operand of a bfloat16 tile product as it is
// q8_0  per 64 inputs (two blocks): [2][16 rows] float16 scales, [2][8 quads of inputs][16 rows][4] codes + 128
// q4_0  the same with [2][4 quads][16 rows][4] bytes: codes + 8 of quad i below, of quad i + 4 above
#pragma once

#include "step.h"

namespace hybridkv {

constexpr int kPairScales = 2 * kPanel * 2;  // bytes of the scales of two blocks of 16 rows

// Whether a code is of 4 or 8 bits, with a scale per block.
constexpr bool in_blocks(Code code) { return code == Code::bytes || code == Code::nibbles; }

// Codes in a byte; the code of the value 0; bytes of the codes of a block of 16 rows; of a pair of blocks, with scales.
constexpr int codes_per_byte(Code code) { return code == Code::nibbles ? 2 : 1; }
constexpr int zero_code(Code code) { return code == Code::nibbles ? 8 : 128; }
constexpr int block_bytes(Code code) { return kPanel * 32 / codes_per_byte(code); }
constexpr int pair_bytes(Code code) { return kPairScales + 2 * block_bytes(code); }

// Inputs of a packed row: all but f32 are read in whole tiles.
constexpr int64_t packed_inputs(Code code, int64_t n_in) {
    const int64_t unit = code == Code::f32 ? 1 : code == Code::bf16 ? 32 : 64;
    return (n_in + unit - 1) / unit * unit;
}

constexpr int64_t panel_bytes(Code code, int64_t n_in) {
    const int64_t k = packed_inputs(code, n_in);
    return code == Code::f32 ? k * kPanel * 4 : code == Code::bf16 ? k * kPanel * 2 : k / 64 * pair_bytes(code);
}

// Panels in a task: so many that handing it out costs nothing, and few enough that threads end together. Many rows take
// panels by eights.
inline int64_t panels_per_task(const Weight& w, int64_t n_rows, int n_threads) {
    constexpr int64_t kLeastBytes = 16 << 10;
    const int64_t tasks = n_threads * (n_rows < kPanel ? 16 : 4);
    const int64_t least = (kLeastBytes - 1) / panel_bytes(w.code, w.n_in) + 1;
    const int64_t share = (w.n_panels() + tasks - 1) / tasks;
    const int64_t panels = least > share ? least : share;
    return panels > 8 ? (panels + 7) / 8 * 8 : (panels + 1) / 2 * 2;
}

// Row `row` of the matrix as n_in floats.
void unpack_row(const Weight& w, int64_t row, float* out);

// Scales and codes of a row, in ggml's planes (q4_0: 16 bytes a block, q8_0: 32), that give every value to the bit, the
// sign of a zero included. False if there are none; what is written then means nothing.
bool exact_codes(Code code, const float* x, int64_t n_in, uint16_t* d, uint8_t* codes);

}  // namespace hybridkv

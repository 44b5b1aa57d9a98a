// How a weight lies in memory: panels of kPanel output rows, each contiguous, one after the other, 64-byte aligned.
// Rows and inputs past the matrix are zeros. Knows no SIMD; linear.h reads it, kernels/linear.py writes it.
//
// f32   [n_in][16 rows] float32
// bf16  [n_in / 2][16 rows][2] bfloat16: a right operand of a bfloat16 tile product as it is
// q8_0  per 64 inputs (two blocks): [2][16 rows] float16 scales, [2][8 quads of inputs][16 rows][4] codes + 128
#pragma once

#include "step.h"

namespace hybridkv {

constexpr int kPairBytes = 2 * kPanel * (2 + 32);  // two blocks of 16 rows of q8_0: 17 cache lines
constexpr int kPairScales = 2 * kPanel * 2;        // of that, the scales that come first

// Inputs of a packed row: bf16 and q8_0 are read in whole tiles.
constexpr int64_t packed_inputs(Code code, int64_t n_in) {
    const int64_t unit = code == Code::f32 ? 1 : code == Code::bf16 ? 32 : 64;
    return (n_in + unit - 1) / unit * unit;
}

constexpr int64_t panel_bytes(Code code, int64_t n_in) {
    const int64_t k = packed_inputs(code, n_in);
    return code == Code::f32 ? k * kPanel * 4 : code == Code::bf16 ? k * kPanel * 2 : k / 64 * kPairBytes;
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

}  // namespace hybridkv

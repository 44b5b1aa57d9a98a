// The records of a model's step outside of attention: weights in the kernels' own layout, and what one instruction set
// does with them. Knows no SIMD; step_program.cpp runs them in order, module_step.cpp binds them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "formats.h"

namespace hybridkv {

constexpr int kPanel = 16;  // output rows that lie side by side in a panel of a weight

// A matrix [n_out, n_in] as panels of kPanel rows, each contiguous along n_in; linear.h has the layout per code.
struct Weight {
    Code code;  // f32, bf16, or bytes: q8_0
    int64_t n_out, n_in;
    const uint8_t* data;

    int64_t n_panels() const { return (n_out + kPanel - 1) / kPanel; }
};

struct StepKernels {
    // y = W x in two steps: inputs are brought once into the form that all weights of one code and n_in take, then
    // panels are multiplied. `n_rows` is the whole call's in both, and decides the form.
    size_t (*prepared_bytes)(Code code, int64_t n_in, int64_t n_rows);
    // rows [r0, r1) of x; rows of x are x_stride floats apart
    void (*prepare)(Code code, const float* x, int64_t x_stride, int64_t n_in, int64_t n_rows, int64_t r0, int64_t r1,
                    void* prepared);
    size_t (*linear_scratch_bytes)(Code code, int64_t n_in, int64_t n_rows);
    // y[n_rows][16 * panel0 .. 16 * panel1), cut at n_out; added to what is there if `add`
    void (*linear)(const Weight& w, const void* prepared, int64_t n_rows, int64_t panel0, int64_t panel1, float* y,
                   int64_t y_stride, bool add, void* scratch);
};

}  // namespace hybridkv

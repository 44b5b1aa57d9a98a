// Rotary positions.
#pragma once

#include "view.h"

namespace hybridkv {

// The first `n_rotated` values of each group: halves (i, i + n_rotated / 2) or neighbours (2 i, 2 i + 1) turn by the
// row's angle i.
struct RopeOp {
    View x;
    int64_t n_rotated;
    bool neighbours;
    int64_t table;  // of the run's angles
};

// cos, sin: [n_angles][n_rotated / 2]; row r turns by those of r % n_angles
template <class S>
void rope_rows(const RopeOp& op, const float* cos, const float* sin, int64_t n_angles, int64_t r0, int64_t r1) {
    const int64_t half = op.n_rotated / 2;
    for (int64_t r = r0; r < r1; ++r) {
        const float *c = cos + r % n_angles * half, *s = sin + r % n_angles * half;
        for (int64_t g = 0; g < op.x.groups; ++g) {
            const int64_t step = op.neighbours ? 2 : 1;
            float *a = op.x.at(r, g), *b = a + (op.neighbours ? 1 : half);
            for (int64_t i = 0; i < half; ++i) {
                const float x = a[i * step], y = b[i * step];
                a[i * step] = x * c[i] - y * s[i];
                b[i * step] = y * c[i] + x * s[i];
            }
        }
    }
}

}  // namespace hybridkv

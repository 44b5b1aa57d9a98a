// The rotation of rows before they are stored, and back: an orthonormal Walsh-Hadamard transform.
#pragma once

#include <cmath>

#include "view.h"

namespace hybridkv {

// Blocks of `block` values (a power of two), in place.
template <class S>
void rotate_rows(const View& x, int64_t block, int64_t r0, int64_t r1) {
    using F = typename S::F;
    constexpr int L = S::lanes;
    const float factor = 1.f / std::sqrt(static_cast<float>(block));
    for (int64_t r = r0; r < r1; ++r) {
        for (int64_t g = 0; g < x.groups; ++g) {
            float* p = x.at(r, g);
            for (int64_t half = 1; half < block; half *= 2) {
                for (int64_t i = 0; i < x.width; i += 2 * half) {
                    int64_t j = i;
                    for (; half >= L && j < i + half; j += L) {
                        const F a = S::load(p + j), b = S::load(p + j + half);
                        S::store(p + j, S::add(a, b));
                        S::store(p + j + half, S::sub(a, b));
                    }
                    for (; j < i + half; ++j) {
                        const float a = p[j], b = p[j + half];
                        p[j] = a + b;
                        p[j + half] = a - b;
                    }
                }
            }
            for (int64_t i = 0; i < x.width; ++i) p[i] *= factor;
        }
    }
}

}  // namespace hybridkv

// A branch added to the residual stream by its own weight: the shared expert's gate.
#pragma once

#include <cmath>

#include "math.h"
#include "view.h"

namespace hybridkv {

// dst += x * sigmoid(g), one g per row
struct WeighOp {
    View x, g, dst;  // one group
};

template <class S>
void weigh_rows(const WeighOp& op, int64_t r0, int64_t r1) {
    for (int64_t r = r0; r < r1; ++r) {
        const float factor = sigmoid(op.g.at(r, 0)[0]), *x = op.x.at(r, 0);
        float* dst = op.dst.at(r, 0);
        int64_t i = 0;
        for (; i + S::lanes <= op.x.width; i += S::lanes) {
            S::store(dst + i, S::fma(S::load(x + i), S::set1(factor), S::load(dst + i)));
        }
        for (; i < op.x.width; ++i) dst[i] = std::fma(x[i], factor, dst[i]);
    }
}

}  // namespace hybridkv

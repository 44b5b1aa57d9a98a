// Sums: a branch added to the residual stream, and biases added to products.
#pragma once

#include <cmath>
#include <vector>

#include "view.h"

namespace hybridkv {

// dst += x * factor
struct AddOp {
    View x, dst;  // one group
    float factor;
};

// dst += bias, in every row
struct BiasOp {
    View dst;  // one group
    std::vector<float> bias;
};

template <class S>
inline void add_row(const float* x, float factor, int64_t width, float* dst) {
    int64_t i = 0;
    for (; i + S::lanes <= width; i += S::lanes) {
        S::store(dst + i, S::fma(S::load(x + i), S::set1(factor), S::load(dst + i)));
    }
    for (; i < width; ++i) dst[i] = std::fma(x[i], factor, dst[i]);
}

template <class S>
void add_rows(const AddOp& op, int64_t r0, int64_t r1) {
    for (int64_t r = r0; r < r1; ++r) add_row<S>(op.x.at(r, 0), op.factor, op.x.width, op.dst.at(r, 0));
}

template <class S>
void bias_rows(const BiasOp& op, int64_t r0, int64_t r1) {
    for (int64_t r = r0; r < r1; ++r) add_row<S>(op.bias.data(), 1.f, op.dst.width, op.dst.at(r, 0));
}

}  // namespace hybridkv

// Norms of groups of values: RMSNorm and the L2 norm.
#pragma once

#include <cmath>
#include <vector>

#include "view.h"

namespace hybridkv {

// dst = x * weight / sqrt(sum(x^2) * factor + eps), per group. RMSNorm: factor 1 / width. L2 norm: factor 1.
struct NormOp {
    View x, dst;
    std::vector<float> weight;  // [width], or [group][width]
    float factor, eps;
};

template <class S>
inline void norm_group(const float* x, const float* weight, float factor, float eps, int64_t width, float* out) {
    using F = typename S::F;
    constexpr int L = S::lanes;
    F sums[4];
    for (F& s : sums) s = S::set1(0.f);
    int64_t i = 0;
    for (; i + 4 * L <= width; i += 4 * L) {
        for (int k = 0; k < 4; ++k) {
            const F v = S::load(x + i + k * L);
            sums[k] = S::fma(v, v, sums[k]);
        }
    }
    float sum = S::reduce_add(S::add(S::add(sums[0], sums[1]), S::add(sums[2], sums[3])));
    for (; i < width; ++i) sum += x[i] * x[i];
    const float scale = 1.f / std::sqrt(sum * factor + eps);
    for (i = 0; i + L <= width; i += L) {
        S::store(out + i, S::mul(S::mul(S::load(x + i), S::set1(scale)), S::load(weight + i)));
    }
    for (; i < width; ++i) out[i] = x[i] * scale * weight[i];
}

template <class S>
void norm_rows(const NormOp& op, int64_t r0, int64_t r1) {
    const bool per_group = static_cast<int64_t>(op.weight.size()) > op.x.width;
    for (int64_t r = r0; r < r1; ++r) {
        for (int64_t g = 0; g < op.x.groups; ++g) {
            const float* weight = op.weight.data() + (per_group ? g * op.x.width : 0);
            norm_group<S>(op.x.at(r, g), weight, op.factor, op.eps, op.x.width, op.dst.at(r, g));
        }
    }
}

}  // namespace hybridkv

// The selective state space of Mamba-1. Source: Mamba, arXiv 2312.00752, algorithm 2.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "math.h"
#include "view.h"

namespace hybridkv {

// Per channel, with dt = softplus(dt + bias): S = exp(rate dt) S + dt x b; dst = S . c + skip x.
// The state is [sequence][channel][state dim].
struct Mamba1Op {
    View x, dt, dst;                // one group of channels
    View b, c;                      // one group of state dims
    std::vector<float> rate;        // [channel][state dim]
    std::vector<float> bias, skip;  // per channel
    int64_t state;
};

// Channels [c0, c1) of one sequence, whose tokens lie in rows from row0 on; state: of that sequence.
template <class S>
HYBRIDKV_KERNEL void mamba1_channels(const Mamba1Op& op, float* state, int64_t row0, int64_t n_tokens, int64_t c0,
                                     int64_t c1) {
    using F = typename S::F;
    constexpr int L = S::lanes;
    const int64_t n = op.b.width;
    for (int64_t r = row0; r < row0 + n_tokens; ++r) {
        const float *x = op.x.at(r, 0), *b = op.b.at(r, 0), *c = op.c.at(r, 0), *raw = op.dt.at(r, 0);
        float* out = op.dst.at(r, 0);
        for (int64_t ch = c0; ch < c1; ++ch) {
            const size_t k = static_cast<size_t>(ch);
            const float dt = softplus(raw[ch] + op.bias[k]), change = dt * x[ch], *rate = op.rate.data() + ch * n;
            float* s = state + ch * n;
            F sums = S::set1(0.f);
            int64_t i = 0;
            for (; i + L <= n; i += L) {
                const F decay = exp_of<S>(S::mul(S::load(rate + i), S::set1(dt)));
                const F next = S::fma(S::set1(change), S::load(b + i), S::mul(decay, S::load(s + i)));
                S::store(s + i, next);
                sums = S::fma(next, S::load(c + i), sums);
            }
            float sum = S::reduce_add(sums);
            for (; i < n; ++i) {
                s[i] = std::fma(change, b[i], ::expf(rate[i] * dt) * s[i]);
                sum = std::fma(s[i], c[i], sum);
            }
            out[ch] = std::fma(op.skip[k], x[ch], sum);
        }
    }
}

}  // namespace hybridkv

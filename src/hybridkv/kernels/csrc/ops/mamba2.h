// The state space of Mamba-2. Source: Transformers are SSMs, arXiv 2405.21060.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "math.h"
#include "view.h"

namespace hybridkv {

// Per head, with dt = softplus(dt + bias): S = exp(rate dt) S + (dt x) b^T; dst = S c + skip x.
// The state is [sequence][head][head dim][state dim].
struct Mamba2Op {
    View x, dst;                          // heads
    View b, c;                            // groups of heads
    View dt;                              // one group, a value per head
    std::vector<float> rate, bias, skip;  // per head
    int64_t state;

    int64_t head_floats() const { return x.width * b.width; }
    int64_t group(int64_t head) const { return head * b.groups / x.groups; }
};

// R rows of the state for one token: decayed, updated and read out in one pass over them.
template <class S, int R>
inline void mamba2_rows(float* state, int64_t n, float decay, const float* change, const float* b, const float* c,
                        float* out) {
    using F = typename S::F;
    constexpr int L = S::lanes;
    const F kept = S::set1(decay);
    F sums[R], added[R];
    for (int r = 0; r < R; ++r) {
        sums[r] = S::set1(0.f);
        added[r] = S::set1(change[r]);
    }
    int64_t i = 0;
    for (; i + L <= n; i += L) {
        const F bi = S::load(b + i), ci = S::load(c + i);
        for (int r = 0; r < R; ++r) {
            float* at = state + r * n + i;
            const F s = S::fma(added[r], bi, S::mul(kept, S::load(at)));
            S::store(at, s);
            sums[r] = S::fma(s, ci, sums[r]);
        }
    }
    for (int r = 0; r < R; ++r) out[r] = S::reduce_add(sums[r]);
    for (; i < n; ++i) {
        for (int r = 0; r < R; ++r) {
            float& s = state[r * n + i];
            s = std::fma(change[r], b[i], decay * s);
            out[r] = std::fma(s, c[i], out[r]);
        }
    }
}

// Head dims [d0, d1) of one head of one sequence, whose tokens lie in rows from row0 on; state: of that head.
template <class S>
HYBRIDKV_KERNEL void mamba2_head(const Mamba2Op& op, float* state, int64_t row0, int64_t n_tokens, int64_t head,
                                 int64_t d0, int64_t d1) {
    constexpr int kRows = 4;
    const int64_t n = op.b.width, group = op.group(head);
    const size_t h = static_cast<size_t>(head);
    for (int64_t r = row0; r < row0 + n_tokens; ++r) {
        const float *x = op.x.at(r, head), *b = op.b.at(r, group), *c = op.c.at(r, group);
        const float dt = softplus(op.dt.at(r, 0)[head] + op.bias[h]), decay = ::expf(op.rate[h] * dt);
        float* out = op.dst.at(r, head);
        int64_t d = d0;
        for (; d + kRows <= d1; d += kRows) {
            float change[kRows], sums[kRows];
            for (int i = 0; i < kRows; ++i) change[i] = dt * x[d + i];
            mamba2_rows<S, kRows>(state + d * n, n, decay, change, b, c, sums);
            for (int i = 0; i < kRows; ++i) out[d + i] = std::fma(op.skip[h], x[d + i], sums[i]);
        }
        for (; d < d1; ++d) {
            const float change = dt * x[d];
            float sum;
            mamba2_rows<S, 1>(state + d * n, n, decay, &change, b, c, &sum);
            out[d] = std::fma(op.skip[h], x[d], sum);
        }
    }
}

}  // namespace hybridkv

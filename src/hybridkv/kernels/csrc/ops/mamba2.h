// The state space of Mamba-2. Source: Transformers are SSMs, arXiv 2405.21060.
#pragma once

#include <cmath>
#include <vector>

#include "math.h"
#include "view.h"

namespace hybridkv {

// Per head, with dt = softplus(dt + bias): S = exp(rate dt) S + b (dt x)^T; dst = S^T c + skip x.
// The state is [sequence][head][state dim][head dim]: lanes lie along the output, so that nothing is summed across them.
struct Mamba2Op {
    View x, dst;                          // heads
    View b, c;                            // groups of heads
    View dt;                              // one group, a value per head
    std::vector<float> rate, bias, skip;  // per head
    int64_t state;

    int64_t head_floats() const { return x.width * b.width; }
    int64_t group(int64_t head) const { return head * b.groups / x.groups; }
};

// NV vectors of head dims from d0 on: the state is decayed, updated and read out in one pass over it. Two of its rows at a
// time: enough sums to hide a multiply-add's latency.
template <class S, int NV>
HYBRIDKV_KERNEL void mamba2_columns(const Mamba2Op& op, float* state, int64_t row0, int64_t n_tokens, int64_t head,
                                    int64_t d0) {
    using F = typename S::F;
    constexpr int L = S::lanes;
    const int64_t n = op.b.width, stride = op.x.width, group = op.group(head);
    const size_t h = static_cast<size_t>(head);
    for (int64_t r = row0; r < row0 + n_tokens; ++r) {
        const float *x = op.x.at(r, head) + d0, *b = op.b.at(r, group), *c = op.c.at(r, group);
        const float dt = softplus(op.dt.at(r, 0)[head] + op.bias[h]);
        const F decay = S::set1(::expf(op.rate[h] * dt));
        F sums[2][NV], change[NV];
        for (int v = 0; v < NV; ++v) {
            change[v] = S::mul(S::set1(dt), S::load(x + v * L));
            sums[0][v] = sums[1][v] = S::set1(0.f);
        }
        const auto row = [&](int64_t i, F (&sum)[NV]) {
            float* s = state + i * stride + d0;
            const F bi = S::set1(b[i]), ci = S::set1(c[i]);
            for (int v = 0; v < NV; ++v) {
                const F next = S::fma(bi, change[v], S::mul(decay, S::load(s + v * L)));
                S::store(s + v * L, next);
                sum[v] = S::fma(next, ci, sum[v]);
            }
        };
        int64_t i = 0;
        for (; i + 2 <= n; i += 2) {
            row(i, sums[0]);
            row(i + 1, sums[1]);
        }
        if (i < n) row(i, sums[0]);
        float* out = op.dst.at(r, head) + d0;
        for (int v = 0; v < NV; ++v) {
            S::store(out + v * L, S::fma(S::set1(op.skip[h]), S::load(x + v * L), S::add(sums[0][v], sums[1][v])));
        }
    }
}

// One head dim, where no whole vector is left.
template <class S>
void mamba2_column(const Mamba2Op& op, float* state, int64_t row0, int64_t n_tokens, int64_t head, int64_t d) {
    const int64_t group = op.group(head);
    const size_t h = static_cast<size_t>(head);
    for (int64_t r = row0; r < row0 + n_tokens; ++r) {
        const float x = op.x.at(r, head)[d], *b = op.b.at(r, group), *c = op.c.at(r, group);
        const float dt = softplus(op.dt.at(r, 0)[head] + op.bias[h]), decay = ::expf(op.rate[h] * dt);
        float sum = 0.f;
        for (int64_t i = 0; i < op.b.width; ++i) {
            float& s = state[i * op.x.width + d];
            s = std::fma(b[i], dt * x, decay * s);
            sum = std::fma(s, c[i], sum);
        }
        op.dst.at(r, head)[d] = std::fma(op.skip[h], x, sum);
    }
}

// Head dims [d0, d1) of one head of one sequence, whose tokens lie in rows from row0 on; state: of that head.
template <class S>
void mamba2_head(const Mamba2Op& op, float* state, int64_t row0, int64_t n_tokens, int64_t head, int64_t d0,
                 int64_t d1) {
    constexpr int L = S::lanes;
    for (; d0 + 4 * L <= d1; d0 += 4 * L) mamba2_columns<S, 4>(op, state, row0, n_tokens, head, d0);
    for (; d0 + L <= d1; d0 += L) mamba2_columns<S, 1>(op, state, row0, n_tokens, head, d0);
    for (; d0 < d1; ++d0) mamba2_column<S>(op, state, row0, n_tokens, head, d0);
}

}  // namespace hybridkv

// The gated delta rule and what its heads are gated with. Source: Gated Delta Networks, arXiv 2412.06464, equation 10.
#pragma once

#include <vector>

#include "math.h"
#include "view.h"

namespace hybridkv {

// decay = exp(rate * softplus(a + bias)), beta = scale * sigmoid(b), per value head
struct DecayOp {
    View a, b;         // value heads in groups of any size
    View decay, beta;  // one group
    std::vector<float> rate, bias;
    float scale;
};

// S = decay * S; S += k (beta * (v - S^T k))^T; dst = S^T q. The state is [sequence][value head][key dim][value dim].
struct DeltaOp {
    View q, k, v, decay, beta, dst;
    int64_t state;
    bool tiled;  // value head h uses key head h % key heads; else h / (value heads / key heads)

    int64_t head_floats() const { return k.width * v.width; }
    int64_t key_head(int64_t head) const { return tiled ? head % k.groups : head * k.groups / v.groups; }
};

template <class S>
void decay_rows(const DecayOp& op, int64_t r0, int64_t r1) {
    for (int64_t r = r0; r < r1; ++r) {
        float *decay = op.decay.at(r, 0), *beta = op.beta.at(r, 0);
        for (int64_t h = 0; h < op.decay.width; ++h) {
            const float x = op.a.at(r, h / op.a.width)[h % op.a.width] + op.bias[static_cast<size_t>(h)];
            decay[h] = ::expf(op.rate[static_cast<size_t>(h)] * softplus(x));
            beta[h] = op.scale * sigmoid(op.b.at(r, h / op.b.width)[h % op.b.width]);
        }
    }
}

// NV vectors of value dims from d0 on. Two rows of the state at a time: enough sums to hide a multiply-add's latency.
template <class S, int NV>
HYBRIDKV_KERNEL void delta_columns(const DeltaOp& op, float* state, int64_t row0, int64_t n_tokens, int64_t head,
                                   int64_t d0) {
    using F = typename S::F;
    constexpr int L = S::lanes;
    const int64_t key_head = op.key_head(head), rows = op.k.width, stride = op.v.width;
    for (int64_t r = row0; r < row0 + n_tokens; ++r) {
        const float *q = op.q.at(r, key_head), *k = op.k.at(r, key_head), *v = op.v.at(r, head) + d0;
        const F decay = S::set1(op.decay.at(r, 0)[head]), beta = S::set1(op.beta.at(r, 0)[head]);
        F sums[2][NV], change[NV];
        for (auto& half : sums) for (F& s : half) s = S::set1(0.f);
        float* s = state + d0;
        for (int64_t i = 0; i < rows; i += 2, s += 2 * stride) {
            const F k0 = S::set1(k[i]), k1 = S::set1(k[i + 1]);
            for (int n = 0; n < NV; ++n) {
                sums[0][n] = S::fma(S::load(s + n * L), k0, sums[0][n]);
                sums[1][n] = S::fma(S::load(s + stride + n * L), k1, sums[1][n]);
            }
        }
        for (int n = 0; n < NV; ++n) {
            const F known = S::mul(S::add(sums[0][n], sums[1][n]), decay);
            change[n] = S::mul(beta, S::sub(S::load(v + n * L), known));
            sums[0][n] = sums[1][n] = S::set1(0.f);
        }
        s = state + d0;
        for (int64_t i = 0; i < rows; i += 2, s += 2 * stride) {
            const F k0 = S::set1(k[i]), k1 = S::set1(k[i + 1]), q0 = S::set1(q[i]), q1 = S::set1(q[i + 1]);
            for (int n = 0; n < NV; ++n) {
                const F a = S::fma(k0, change[n], S::mul(decay, S::load(s + n * L)));
                const F b = S::fma(k1, change[n], S::mul(decay, S::load(s + stride + n * L)));
                S::store(s + n * L, a);
                S::store(s + stride + n * L, b);
                sums[0][n] = S::fma(a, q0, sums[0][n]);
                sums[1][n] = S::fma(b, q1, sums[1][n]);
            }
        }
        float* out = op.dst.at(r, head) + d0;
        for (int n = 0; n < NV; ++n) S::store(out + n * L, S::add(sums[0][n], sums[1][n]));
    }
}

// Value dims [d0, d1) of one head of one sequence; state: of that head.
template <class S>
void delta_head(const DeltaOp& op, float* state, int64_t row0, int64_t n_tokens, int64_t head, int64_t d0, int64_t d1) {
    constexpr int L = S::lanes;
    for (; d0 + 4 * L <= d1; d0 += 4 * L) delta_columns<S, 4>(op, state, row0, n_tokens, head, d0);
    for (; d0 < d1; d0 += L) delta_columns<S, 1>(op, state, row0, n_tokens, head, d0);
}

}  // namespace hybridkv

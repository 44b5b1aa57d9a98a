// The short convolution before a recurrent state.
#pragma once

#include <algorithm>
#include <vector>

#include "math.h"
#include "view.h"

namespace hybridkv {

// Causal depthwise convolution, with SiLU or without. The state [sequence][kernel][channel] holds the newest inputs, oldest first.
struct ConvOp {
    View x, dst;  // one group
    std::vector<float> weight, bias;  // [kernel][channel]; [channel] or empty
    int64_t kernel, state;
    bool silu;
};

// The input `back` tokens before token t of the call, or the state's.
static inline const float* conv_input(const ConvOp& op, const float* state, int64_t row0, int64_t t, int64_t back) {
    return t >= back ? op.x.at(row0 + t - back, 0) : state + (op.kernel + t - back) * op.x.width;
}

// Channels [c0, c1) of the tokens [row0, row0 + n_tokens) of one sequence; state: of that sequence.
template <class S>
void conv_channels(const ConvOp& op, float* state, int64_t row0, int64_t n_tokens, int64_t c0, int64_t c1) {
    using F = typename S::F;
    constexpr int L = S::lanes;
    const int64_t channels = op.x.width, taps = op.kernel;
    const float* bias = op.bias.empty() ? nullptr : op.bias.data();
    for (int64_t t = 0; t < n_tokens; ++t) {
        float* out = op.dst.at(row0 + t, 0);
        int64_t c = c0;
        for (; c + L <= c1; c += L) {
            F sum = bias ? S::load(bias + c) : S::set1(0.f);
            for (int64_t j = 0; j < taps; ++j) {
                const float* x = conv_input(op, state, row0, t, taps - 1 - j);
                sum = S::fma(S::load(op.weight.data() + j * channels + c), S::load(x + c), sum);
            }
            S::store(out + c, op.silu ? S::mul(sum, sigmoid_of<S>(sum)) : sum);
        }
        for (; c < c1; ++c) {
            float sum = bias ? bias[c] : 0.f;
            for (int64_t j = 0; j < taps; ++j) {
                sum += op.weight[static_cast<size_t>(j * channels + c)] *
                       conv_input(op, state, row0, t, taps - 1 - j)[c];
            }
            out[c] = op.silu ? sum * sigmoid(sum) : sum;
        }
    }
    // Oldest first, so that a row is read before it is overwritten.
    for (int64_t j = 0; j < taps; ++j) {
        const float* x = conv_input(op, state, row0, n_tokens - 1, taps - 1 - j);
        std::copy(x + c0, x + c1, state + j * channels + c0);
    }
}

}  // namespace hybridkv

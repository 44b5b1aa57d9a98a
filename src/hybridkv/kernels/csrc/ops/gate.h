// Products with a gate: SwiGLU, GEGLU and the gates of attention and of recurrent layers.
#pragma once

#include <cmath>

#include "math.h"
#include "view.h"

namespace hybridkv {

// What g becomes: 1 / (1 + e^-g); g times that; g itself; g times a normal distribution's share below it, by its usual
// formula with tanh, or exactly; g where it is positive, else 0.
enum class Gate : uint8_t { sigmoid, silu, product, gelu, gelu_erf, relu };

// dst = x * gate(g)
struct GateOp {
    View x, g, dst;
    Gate gate;
};

// tanh(u) = 2 sigmoid(2 u) - 1, so GELU's share is sigmoid(2 sqrt(2 / pi) (g + 0.044715 g^3)).
constexpr float kGelu = 1.5957691216f, kGeluCubic = 0.071354816272f;

// |g| times a normal distribution's share above |g|. Source: Numerical Recipes, erfc by a Chebyshev fit (erfcc),
// relative error below 1.2e-7.
template <class S>
inline typename S::F gelu_tail(typename S::F g) {
    using F = typename S::F;
    const auto at_least = [](float low, F x) { return S::max(S::set1(low), x); };
    const F negative = S::sub(S::set1(0.f), g);
    // From 20 on it is nothing, and infinity times nothing would be NaN.
    const F size = S::sub(S::set1(0.f), at_least(-20.f, S::sub(S::set1(0.f), S::max(negative, g))));
    const F z = S::mul(size, S::set1(0.70710678f));
    const F t = S::div(S::set1(1.f), S::fma(z, S::set1(0.5f), S::set1(1.f)));
    F y = S::set1(0.17087277f);
    for (float c : {-0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f, -0.18628806f, 0.09678418f, 0.37409196f,
                    1.00002368f, -1.26551223f}) {
        y = S::fma(y, t, S::set1(c));
    }
    y = S::sub(y, S::mul(z, z));
    return S::mul(S::mul(size, S::set1(0.5f)), S::mul(t, exp_of<S>(y)));
}

static inline float gated(Gate gate, float g) {
    switch (gate) {
        case Gate::sigmoid: return sigmoid(g);
        case Gate::silu: return g * sigmoid(g);
        case Gate::gelu: return g * sigmoid(g * std::fma(g * g, kGeluCubic, kGelu));
        case Gate::gelu_erf: return 0.5f * g * std::erfc(g * -0.70710678f);
        case Gate::relu: return g > 0.f || g != g ? g : 0.f;
        case Gate::product: break;
    }
    return g;
}

template <class S, Gate G>
inline typename S::F gated(typename S::F g) {
    using F = typename S::F;
    if constexpr (G == Gate::sigmoid) return sigmoid_of<S>(g);
    if constexpr (G == Gate::silu) return S::mul(g, sigmoid_of<S>(g));
    if constexpr (G == Gate::gelu) {
        const F inner = S::fma(S::mul(g, g), S::set1(kGeluCubic), S::set1(kGelu));
        return S::mul(g, sigmoid_of<S>(S::mul(g, inner)));
    }
    // Where g is positive, g less the tail, else the tail.
    if constexpr (G == Gate::gelu_erf) return S::sub(S::max(S::set1(0.f), g), gelu_tail<S>(g));
    if constexpr (G == Gate::relu) return S::max(S::set1(0.f), g);
    return g;
}

template <class S, Gate G>
inline void gate_group(const float* x, const float* g, int64_t width, float* out) {
    constexpr int L = S::lanes;
    int64_t i = 0;
    for (; i + L <= width; i += L) S::store(out + i, S::mul(S::load(x + i), gated<S, G>(S::load(g + i))));
    for (; i < width; ++i) out[i] = x[i] * gated(G, g[i]);
}

template <class S>
void gate_rows(const GateOp& op, int64_t r0, int64_t r1) {
    constexpr void (*kKinds[])(const float*, const float*, int64_t, float*) = {
        gate_group<S, Gate::sigmoid>, gate_group<S, Gate::silu>,     gate_group<S, Gate::product>,
        gate_group<S, Gate::gelu>,    gate_group<S, Gate::gelu_erf>, gate_group<S, Gate::relu>};
    const auto run = kKinds[static_cast<size_t>(op.gate)];
    for (int64_t r = r0; r < r1; ++r) {
        for (int64_t g = 0; g < op.x.groups; ++g) run(op.x.at(r, g), op.g.at(r, g), op.x.width, op.dst.at(r, g));
    }
}

}  // namespace hybridkv

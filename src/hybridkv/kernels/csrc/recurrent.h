// A step's operations between its matrix products: norms, gates, rotary positions, short convolutions and the gated
// delta rule. Included once per instruction set.
#pragma once

#include <algorithm>
#include <cmath>

#include "dots.h"
#include "step.h"

namespace {

inline float sigmoid(float x) { return 1.f / (1.f + ::expf(-x)); }

inline F sigmoid(F x) {
    const F e = exp(Simd::sub(Simd::set1(0.f), Simd::max(Simd::set1(-80.f), x)));
    return Simd::div(Simd::set1(1.f), Simd::add(e, Simd::set1(1.f)));
}

// tanh(u) = 2 sigmoid(2 u) - 1, so GELU's share is sigmoid(2 sqrt(2 / pi) (g + 0.044715 g^3)).
constexpr float kGelu = 1.5957691216f, kGeluCubic = 0.071354816272f;

// |g| times a normal distribution's share above |g|. Source: Numerical Recipes, erfc by a Chebyshev fit (erfcc),
// relative error below 1.2e-7.
inline F gelu_tail(F g) {
    const auto at_least = [](float low, F x) { return Simd::max(Simd::set1(low), x); };
    const F negative = Simd::sub(Simd::set1(0.f), g);
    // From 20 on it is nothing, and infinity times nothing would be NaN.
    const F size = Simd::sub(Simd::set1(0.f), at_least(-20.f, Simd::sub(Simd::set1(0.f), Simd::max(negative, g))));
    const F z = Simd::mul(size, Simd::set1(0.70710678f));
    const F t = Simd::div(Simd::set1(1.f), Simd::fma(z, Simd::set1(0.5f), Simd::set1(1.f)));
    F y = Simd::set1(0.17087277f);
    for (float c : {-0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f, -0.18628806f, 0.09678418f, 0.37409196f,
                    1.00002368f, -1.26551223f}) {
        y = Simd::fma(y, t, Simd::set1(c));
    }
    y = Simd::sub(y, Simd::mul(z, z));
    return Simd::mul(Simd::mul(size, Simd::set1(0.5f)), Simd::mul(t, exp(y)));
}

inline void norm_group(const float* x, const float* weight, float factor, float eps, int64_t width, float* out) {
    F sums[4];
    for (F& s : sums) s = Simd::set1(0.f);
    int64_t i = 0;
    for (; i + 4 * L <= width; i += 4 * L) {
        for (int k = 0; k < 4; ++k) {
            const F v = Simd::load(x + i + k * L);
            sums[k] = Simd::fma(v, v, sums[k]);
        }
    }
    float sum = Simd::reduce_add(Simd::add(Simd::add(sums[0], sums[1]), Simd::add(sums[2], sums[3])));
    for (; i < width; ++i) sum += x[i] * x[i];
    const float scale = 1.f / std::sqrt(sum * factor + eps);
    for (i = 0; i + L <= width; i += L) {
        Simd::store(out + i, Simd::mul(Simd::mul(Simd::load(x + i), Simd::set1(scale)), Simd::load(weight + i)));
    }
    for (; i < width; ++i) out[i] = x[i] * scale * weight[i];
}

void norm_rows(const NormOp& op, int64_t r0, int64_t r1) {
    const bool per_group = static_cast<int64_t>(op.weight.size()) > op.x.width;
    for (int64_t r = r0; r < r1; ++r) {
        for (int64_t g = 0; g < op.x.groups; ++g) {
            const float* weight = op.weight.data() + (per_group ? g * op.x.width : 0);
            norm_group(op.x.at(r, g), weight, op.factor, op.eps, op.x.width, op.dst.at(r, g));
        }
    }
}

inline float gated(Gate gate, float g) {
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

template <Gate G>
inline F gated(F g) {
    if constexpr (G == Gate::sigmoid) return sigmoid(g);
    if constexpr (G == Gate::silu) return Simd::mul(g, sigmoid(g));
    if constexpr (G == Gate::gelu) {
        const F inner = Simd::fma(Simd::mul(g, g), Simd::set1(kGeluCubic), Simd::set1(kGelu));
        return Simd::mul(g, sigmoid(Simd::mul(g, inner)));
    }
    // Where g is positive, g less the tail, else the tail.
    if constexpr (G == Gate::gelu_erf) return Simd::sub(Simd::max(Simd::set1(0.f), g), gelu_tail(g));
    if constexpr (G == Gate::relu) return Simd::max(Simd::set1(0.f), g);
    return g;
}

template <Gate G>
inline void gate_group(const float* x, const float* g, int64_t width, float* out) {
    int64_t i = 0;
    for (; i + L <= width; i += L) Simd::store(out + i, Simd::mul(Simd::load(x + i), gated<G>(Simd::load(g + i))));
    for (; i < width; ++i) out[i] = x[i] * gated(G, g[i]);
}

void gate_rows(const GateOp& op, int64_t r0, int64_t r1) {
    constexpr void (*kKinds[])(const float*, const float*, int64_t, float*) = {
        gate_group<Gate::sigmoid>, gate_group<Gate::silu>, gate_group<Gate::product>, gate_group<Gate::gelu>,
        gate_group<Gate::gelu_erf>, gate_group<Gate::relu>};
    const auto run = kKinds[static_cast<size_t>(op.gate)];
    for (int64_t r = r0; r < r1; ++r) {
        for (int64_t g = 0; g < op.x.groups; ++g) run(op.x.at(r, g), op.g.at(r, g), op.x.width, op.dst.at(r, g));
    }
}

void rope_rows(const RopeOp& op, const float* cos, const float* sin, int64_t n_angles, int64_t r0, int64_t r1) {
    const int64_t half = op.n_rotated / 2;
    for (int64_t r = r0; r < r1; ++r) {
        const float *c = cos + r % n_angles * half, *s = sin + r % n_angles * half;
        for (int64_t g = 0; g < op.x.groups; ++g) {
            const int64_t step = op.neighbours ? 2 : 1;
            float *a = op.x.at(r, g), *b = a + (op.neighbours ? 1 : half);
            for (int64_t i = 0; i < half; ++i) {
                const float x = a[i * step], y = b[i * step];
                a[i * step] = x * c[i] - y * s[i];
                b[i * step] = y * c[i] + x * s[i];
            }
        }
    }
}

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

void weigh_rows(const WeighOp& op, int64_t r0, int64_t r1) {
    for (int64_t r = r0; r < r1; ++r) {
        const float factor = sigmoid(op.g.at(r, 0)[0]), *x = op.x.at(r, 0);
        float* dst = op.dst.at(r, 0);
        int64_t i = 0;
        for (; i + L <= op.x.width; i += L) {
            Simd::store(dst + i, Simd::fma(Simd::load(x + i), Simd::set1(factor), Simd::load(dst + i)));
        }
        for (; i < op.x.width; ++i) dst[i] = std::fma(x[i], factor, dst[i]);
    }
}

void rotate_rows(const View& x, int64_t block, int64_t r0, int64_t r1) {
    const float factor = 1.f / std::sqrt(static_cast<float>(block));
    for (int64_t r = r0; r < r1; ++r) {
        for (int64_t g = 0; g < x.groups; ++g) {
            float* p = x.at(r, g);
            for (int64_t half = 1; half < block; half *= 2) {
                for (int64_t i = 0; i < x.width; i += 2 * half) {
                    int64_t j = i;
                    for (; half >= L && j < i + half; j += L) {
                        const F a = Simd::load(p + j), b = Simd::load(p + j + half);
                        Simd::store(p + j, Simd::add(a, b));
                        Simd::store(p + j + half, Simd::sub(a, b));
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

// The input `back` tokens before token t of the call, or the state's.
inline const float* conv_input(const ConvOp& op, const float* state, int64_t row0, int64_t t, int64_t back) {
    return t >= back ? op.x.at(row0 + t - back, 0) : state + (op.kernel + t - back) * op.x.width;
}

void conv_channels(const ConvOp& op, float* state, int64_t row0, int64_t n_tokens, int64_t c0, int64_t c1) {
    const int64_t channels = op.x.width, taps = op.kernel;
    const float* bias = op.bias.empty() ? nullptr : op.bias.data();
    for (int64_t t = 0; t < n_tokens; ++t) {
        float* out = op.dst.at(row0 + t, 0);
        int64_t c = c0;
        for (; c + L <= c1; c += L) {
            F sum = bias ? Simd::load(bias + c) : Simd::set1(0.f);
            for (int64_t j = 0; j < taps; ++j) {
                const float* x = conv_input(op, state, row0, t, taps - 1 - j);
                sum = Simd::fma(Simd::load(op.weight.data() + j * channels + c), Simd::load(x + c), sum);
            }
            Simd::store(out + c, op.silu ? Simd::mul(sum, sigmoid(sum)) : sum);
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

// NV vectors of value dims from d0 on. Two rows of the state at a time: enough sums to hide a multiply-add's latency. With
// `next`, lines from there on are asked for meanwhile, as many as these columns have.
template <int NV>
HYBRIDKV_PHASE void delta_columns(const DeltaOp& op, float* state, int64_t row0, int64_t n_tokens, int64_t head,
                                  int64_t d0, const float* next) {
    const int64_t key_head = op.key_head(head), rows = op.k.width, stride = op.v.width;
    for (int64_t r = row0; r < row0 + n_tokens; ++r) {
        const float *q = op.q.at(r, key_head), *k = op.k.at(r, key_head), *v = op.v.at(r, head) + d0;
        const F decay = Simd::set1(op.decay.at(r, 0)[head]), beta = Simd::set1(op.beta.at(r, 0)[head]);
        F sums[2][NV], change[NV];
        for (auto& half : sums) for (F& s : half) s = Simd::set1(0.f);
        float* s = state + d0;
        for (int64_t i = 0; i < rows; i += 2, s += 2 * stride) {
            const F k0 = Simd::set1(k[i]), k1 = Simd::set1(k[i + 1]);
            for (int n = 0; n < NV; ++n) {
                sums[0][n] = Simd::fma(Simd::load(s + n * L), k0, sums[0][n]);
                sums[1][n] = Simd::fma(Simd::load(s + stride + n * L), k1, sums[1][n]);
            }
        }
        for (int n = 0; n < NV; ++n) {
            const F known = Simd::mul(Simd::add(sums[0][n], sums[1][n]), decay);
            change[n] = Simd::mul(beta, Simd::sub(Simd::load(v + n * L), known));
            sums[0][n] = sums[1][n] = Simd::set1(0.f);
        }
        s = state + d0;
        for (int64_t i = 0; i < rows; i += 2, s += 2 * stride) {
            const F k0 = Simd::set1(k[i]), k1 = Simd::set1(k[i + 1]), q0 = Simd::set1(q[i]), q1 = Simd::set1(q[i + 1]);
            if (next) {
                for (int line = 0; line < 2 * NV * L; line += 16) __builtin_prefetch(next + i * NV * L + line, 0, 2);
            }
            for (int n = 0; n < NV; ++n) {
                const F a = Simd::fma(k0, change[n], Simd::mul(decay, Simd::load(s + n * L)));
                const F b = Simd::fma(k1, change[n], Simd::mul(decay, Simd::load(s + stride + n * L)));
                Simd::store(s + n * L, a);
                Simd::store(s + stride + n * L, b);
                sums[0][n] = Simd::fma(a, q0, sums[0][n]);
                sums[1][n] = Simd::fma(b, q1, sums[1][n]);
            }
        }
        float* out = op.dst.at(r, head) + d0;
        for (int n = 0; n < NV; ++n) Simd::store(out + n * L, Simd::add(sums[0][n], sums[1][n]));
    }
}

// A whole head of one token asks for the state of the next head, which lies behind it: columns are short pieces far apart,
// which no processor foresees, and the states of several sequences do not stay in its caches.
void delta_head(const DeltaOp& op, float* state, int64_t row0, int64_t n_tokens, int64_t head, int64_t d0, int64_t d1) {
    const int64_t rows = op.k.width, width = op.v.width;
    const bool ask = n_tokens == 1 && d0 == 0 && d1 == width && width % (4 * L) == 0 && head + 1 < op.v.groups;
    const float* next = state + rows * width;
    for (; d0 + 4 * L <= d1; d0 += 4 * L) {
        delta_columns<4>(op, state, row0, n_tokens, head, d0, ask ? next + rows * d0 : nullptr);
    }
    for (; d0 < d1; d0 += L) delta_columns<1>(op, state, row0, n_tokens, head, d0, nullptr);
}

}  // namespace

// Functions that several operations compute, for one value or for vectors of an instruction set S (a Simd).
#pragma once

#include <cmath>
#include <initializer_list>

// A kernel stays a function of its own: profiles show it by name.
#define HYBRIDKV_KERNEL __attribute__((noinline))

namespace hybridkv {

// In each unit by itself: one instruction set's code must not be merged with another's.
static inline float softplus(float x) { return x > 20.f ? x : std::log1p(::expf(x)); }
static inline float sigmoid(float x) { return 1.f / (1.f + ::expf(-x)); }

// e^x for x <= 80; NaN stays NaN. Source: Cephes expf, degree 5, error below 2 ulp.
template <class S>
inline typename S::F exp_of(typename S::F x) {
    using F = typename S::F;
    x = S::max(S::set1(-87.f), x);
    const F n = S::round(S::mul(x, S::set1(1.44269504f)));
    F r = S::fma(n, S::set1(-0.693359375f), x);
    r = S::fma(n, S::set1(2.12194440e-4f), r);
    F y = S::set1(1.9875691500e-4f);
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
        y = S::fma(y, r, S::set1(c));
    }
    y = S::add(S::fma(y, S::mul(r, r), r), S::set1(1.f));
    return S::mul(y, S::pow2(n));
}

template <class S>
inline typename S::F sigmoid_of(typename S::F x) {
    const typename S::F e = exp_of<S>(S::sub(S::set1(0.f), S::max(S::set1(-80.f), x)));
    return S::div(S::set1(1.f), S::add(e, S::set1(1.f)));
}

}  // namespace hybridkv

// Short names for the vectors of the instruction set at hand, for kernels that are written once over all of them. Include
// a simd_*.h first.
#pragma once

// A phase of a kernel stays a function of its own: profiles show it by name, and nothing is gained by inlining.
#define HYBRIDKV_PHASE __attribute__((noinline))

namespace {

using F = Simd::F;
using I = Simd::I;
constexpr int L = Simd::lanes;

// A number of rows that a kernel is compiled for.
template <int N>
struct Rows {
    static constexpr int count = N;
};

}  // namespace

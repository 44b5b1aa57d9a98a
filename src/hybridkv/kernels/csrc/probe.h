// What the machine can do at best, for the benchmark's ceilings: reads, and multiply-adds in the instructions that the
// kernels use. Included once per instruction set.
#pragma once

#include "dots.h"

namespace {

// Twelve chains hide the latency of a multiply-add on every processor at hand. The sums are returned through `sink`
// so that the work cannot be left out.
double probe_float(int64_t rounds, float* sink) {
    F acc[12];
    for (int i = 0; i < 12; ++i) acc[i] = Simd::set1(sink[0] + static_cast<float>(i));
    const F x = Simd::set1(sink[1]);
    for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
        for (F& a : acc) a = Simd::fma(a, x, x);
    }
    for (int i = 1; i < 12; ++i) acc[0] = Simd::add(acc[0], acc[i]);
    sink[0] = Simd::reduce_add(acc[0]);
    return static_cast<double>(rounds) * 12 * L;
}

// Of integers: int8 tiles with AMX, pairs of int16 elsewhere.
double probe_integer(int64_t rounds, float* sink) {
#if defined(HYBRIDKV_AMX)
    alignas(64) int8_t ones[1024];
    alignas(64) int32_t sums[256];
    std::memset(ones, sink[0] > 0.f, sizeof ones);
    Amx::configure();
    Amx::written();
    _tile_loadd(4, ones, 64);
    _tile_loadd(5, ones, 64);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < rounds; ++i) {
        _tile_dpbssd(0, 4, 5);
        _tile_dpbssd(1, 4, 5);
        _tile_dpbssd(2, 4, 5);
        _tile_dpbssd(3, 4, 5);
    }
    _tile_stored(0, sums, 64);
    Amx::release();
    sink[0] = static_cast<float>(sums[0]);
    return static_cast<double>(rounds) * 4 * 16 * 16 * 64;
#else
    I acc[12];
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) acc[i] = Simd::set1i(i);
    I x = Simd::set1i(static_cast<int32_t>(sink[0]));
    for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
        for (I& a : acc) {
            Simd::settle(x);  // another one each time, as far as the compiler knows: every product is made
            Simd::add_dot2(a, x, x);
        }
    }
    F sum = Simd::to_float(acc[0]);
#pragma GCC unroll 12
    for (int i = 1; i < 12; ++i) sum = Simd::add(sum, Simd::to_float(acc[i]));
    sink[0] = Simd::reduce_add(sum);
    return static_cast<double>(rounds) * 12 * 2 * L;
#endif
}

double probe_read(const float* data, int64_t count, float* sink) {
    F acc[8];
    for (F& a : acc) a = Simd::set1(0.f);
    for (int64_t i = 0; i + 8 * L <= count; i += 8 * L) {
        for (int k = 0; k < 8; ++k) acc[k] = Simd::add(acc[k], Simd::load(data + i + k * L));
    }
    for (int k = 1; k < 8; ++k) acc[0] = Simd::add(acc[0], acc[k]);
    sink[0] = Simd::reduce_add(acc[0]);
    return static_cast<double>(count) * sizeof(float);
}

}  // namespace

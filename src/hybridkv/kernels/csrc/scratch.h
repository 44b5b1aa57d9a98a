// The memory of one task and how it is cut up. Included once per instruction set.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "stage.h"

namespace {

// Scratch of one task; every array is 64-byte aligned. Bytes depend on the head dims, never on the cache.
struct Scratch {
    float *q, *q_unit, *q_sum, *scores, *top, *alpha, *m, *l, *sum, *peak, *p_unit, *unit, *bias, *q_center, *acc;
    float *k, *k_d, *k_m, *v, *v_d, *v_m, *d_row, *d_block, *d_inverse, *flat;
    int16_t *p16, *d16, *pd16;
    int8_t* codes;
    int64_t *lo, *hi;
    int32_t* q_start;
    size_t bytes;
};

inline Scratch carve(const AttendParams& a, void* memory) {
    const int64_t dk = padded(a.head_dim_k()), dv = padded(a.head_dim_v()), wide = dk > dv ? dk : dv;
    const int64_t all = a.group() * a.n_tokens, rows = all < kMaxRows ? (all + 7) / 8 * 8 : kMaxRows;
    char* base = static_cast<char*>(memory);
    size_t used = 0;
    const auto take = [&](auto*& p, int64_t count) {
        if (base) p = reinterpret_cast<std::remove_reference_t<decltype(p)>>(base + used);
        used += (static_cast<size_t>(count) * sizeof(*p) + 63) / 64 * 64;
    };
    Scratch s{};
    take(s.q, rows * (dk + kBlock));  // float32, or int16, or packed terms
    take(s.q_sum, rows * dk / kBlock);
    take(s.q_start, rows * dk / kBlock);
    take(s.scores, rows * kTile);
    take(s.p16, rows * kTile);
    take(s.pd16, rows * kTile);
    take(s.acc, rows * dv);
    for (float** p : {&s.q_unit, &s.q_center, &s.top, &s.alpha, &s.m, &s.l, &s.sum, &s.peak, &s.p_unit, &s.unit,
                      &s.bias}) {
        take(*p, rows + 16);  // whole vectors
    }
    take(s.lo, rows);
    take(s.hi, rows);
    take(s.k, (dk + kBlock) * kStagedK);
    take(s.k_d, scale_blocks(dk / kBlock) * kTile);
    take(s.k_m, scale_blocks(dk / kBlock) * kTile);
    take(s.v, kBlock * kTile);
    take(s.v_d, scale_blocks(dv / kBlock) * kTile);
    take(s.v_m, scale_blocks(dv / kBlock) * kTile);
    take(s.d_row, kTile);
    take(s.d16, dv / kBlock * kTile);
    take(s.d_block, dv / kBlock);
    take(s.d_inverse, dv / kBlock);
    take(s.flat, wide / kBlock * kTile + 8);
    take(s.codes, wide * kTile * 3 / 2 + 64);  // and packed nibbles behind them
    s.bytes = used;
    return s;
}

}  // namespace

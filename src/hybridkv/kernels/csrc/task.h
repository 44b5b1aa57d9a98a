// What the phases of one attention task share while they read one segment: its sizes, its scratch, and the way
// around values that are not finite. Included once per instruction set.
#pragma once

#include <cmath>
#include <limits>

#include "dots.h"
#include "scratch.h"

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

struct Task {
    const AttendParams& a;
    const AttendTask& task;
    const Segment& seg;
    Scratch s;
    int rows;            // query rows
    int64_t head;        // b * Hkv + h, as the planes count
    int64_t dk, dv;      // padded
    int64_t j0, j1;      // rows of the task in this segment
    bool k_int, v_int;

    Task(const AttendParams& params, const AttendTask& t, const Segment& segment, const Scratch& scratch)
        : a(params), task(t), seg(segment), s(scratch), rows(static_cast<int>(t.r1 - t.r0)),
          head(t.batch * params.n_kv_heads + t.kv_head), dk(padded(segment.k.head_dim)), dv(padded(segment.v.head_dim)),
          j0(t.j0 > segment.begin ? t.j0 : segment.begin), j1(t.j1 < segment.end ? t.j1 : segment.end),
          k_int(segment.k.format->quantized()), v_int(segment.v.format->quantized()) {}

    int64_t token(int r) const { return (task.r0 + r) / a.group(); }
    int64_t q_head(int r) const { return task.kv_head * a.group() + (task.r0 + r) % a.group(); }

    // Bytes that the phase of K has time to ask for: this tile's V; and the phase of V: the next tile's K.
    Prefetch ahead_of_v(int64_t j, int n, int64_t steps) const { return Prefetch(seg.v, head, seg.shift + j, n, steps); }
    Prefetch ahead_of_k(int64_t j, int64_t steps) const {
        const int64_t next = j + kTile, left = j1 - next;
        return Prefetch(seg.k, head, seg.shift + next, left < kTile ? left : kTile, steps);
    }

    // What the minima of block b add to each of its dims.
    float bias(int r, int64_t b) const {
        F sum = Simd::set1(0.f);
        for (int i = 0; i < kTile; i += L) {
            sum = Simd::fma(Simd::load(s.scores + r * kTile + i), Simd::load(s.v_m + b * kTile + i), sum);
        }
        return Simd::reduce_add(sum);
    }

    // The tile holds a NaN or an infinity in block b, perhaps under a mask: exclude by select, never by 0 * NaN. The
    // values are in s.v.
    void accumulate_unmasked(int64_t b, int first, int count) {
        for (int r = first; r < first + count; ++r) {
            float* out = s.acc + r * dv + b * kBlock;
            for (int i = 0; i < kTile; ++i) {
                const float p = s.scores[r * kTile + i];
                if (p == 0.f) continue;
                for (int e = 0; e < kBlock; ++e) out[e] += p * s.v[i * kBlock + e];
            }
        }
    }

    // The same for a block of codes with a scale that is not finite.
    void accumulate_unmasked_codes(const Codes& codes, int64_t b) {
        for (int i = 0; i < kTile; ++i) {
            const float d = s.v_d[b * kTile + i], m = seg.v.format->has_min() ? s.v_m[b * kTile + i] : 0.f;
            for (int e = 0; e < kBlock; ++e) s.v[i * kBlock + e] = d * codes.row(i)[b * kBlock + e] + m;
        }
        accumulate_unmasked(b, 0, rows);
    }
};

}  // namespace

// One attention task on one instruction set: a block of query rows of one KV head over a range of stored rows,
// with an online softmax that resumes from segment to segment. K and V are separate phases of a tile, so that a format costs one staging function
// for both and not one kernel per K x V pair. Included once per instruction set.
#pragma once

#include <algorithm>

#if defined(HYBRIDKV_AMX)
#include "amx.h"
#elif defined(HYBRIDKV_DOTPROD)
#include "dots_neon.h"
#else
#include "plain.h"
namespace {
using Products = PlainProducts;
}
#endif

namespace {

struct Attend : Products {
    using Products::Products;

    // The rows of one segment.
    void run() {
        start();
        for (int r = 0; r < rows; ++r) start_row(r);
        for (int64_t j = j0; j < j1; j += kTile) {
            const int n = j1 - j < kTile ? static_cast<int>(j1 - j) : kTile;
            if (a.mask && !seen(j, n)) continue;
            scores(j, n);
            if (v_int) stage_v_scales(j, n);
            if (softmax(j, n)) values(j, n);
        }
        end();
    }

    // Before the first segment, and after the last.
    void reset_rows() {
        for (int r = 0; r < rows; ++r) {
            s.m[r] = -kInf;
            s.l[r] = 0.f;
        }
        std::memset(s.acc, 0, static_cast<size_t>(rows * dv) * sizeof(float));
    }
    void finish_rows() {
        for (int r = 0; r < rows; ++r) finish_row(r);
    }

    const uint8_t* mask_row(int r) const {
        return a.mask + task.batch * a.mask_stride_b + q_head(r) * a.mask_stride_h + token(r) * a.mask_stride_t;
    }

    // Whether the mask shows any row of a tile to any query: padding, and what lies after the queries, is skipped.
    bool seen(int64_t j, int n) const {
        const uint8_t* before = nullptr;
        for (int r = 0; r < rows; ++r) {
            const uint8_t* keep = mask_row(r) + j;
            if (keep != before && std::memchr(keep, 1, static_cast<size_t>(n))) return true;
            before = keep;
        }
        return false;
    }

    void start_row(int r) {
        const int64_t pos = a.n_stored() - a.n_tokens + token(r);
        const int64_t lo = a.window && pos >= a.window ? pos - a.window + 1 : 0;
        s.lo[r] = lo < j0 ? j0 : lo;
        const int64_t hi = a.causal ? pos + 1 : a.n_stored();
        s.hi[r] = hi < j1 ? hi : j1;
        const float* q = a.q + task.batch * a.q_stride_b + q_head(r) * a.q_stride_h + token(r) * a.q_stride_t;
        float* row = s.flat;
        const int64_t dims = seg.k.head_dim;
        std::memcpy(row, q, static_cast<size_t>(dims) * sizeof(float));
        std::memset(row + dims, 0, static_cast<size_t>(dk - dims) * sizeof(float));
        s.q_center[r] = seg.center ? a.scale * dot(row, seg.center + head * dims, dims) : 0.f;
        if (k_int) return quantize_query(r, row);
        stage_query_values(r, row);
        s.q_unit[r] = a.scale;
    }

    static float dot(const float* x, const float* y, int64_t count) {
        F sum = Simd::set1(0.f);
        int64_t i = 0;
        for (; i + L <= count; i += L) sum = Simd::fma(Simd::load(x + i), Simd::load(y + i), sum);
        float rest = 0.f;
        for (; i < count; ++i) rest += x[i] * y[i];
        return Simd::reduce_add(sum) + rest;
    }

    // To integers with one scale per row.
    HYBRIDKV_PHASE void quantize_query(int r, const float* q) {
        F largest = Simd::set1(0.f), check = Simd::set1(0.f);
        for (int64_t e = 0; e < dk; e += L) {
            const F x = Simd::load(q + e);
            largest = Simd::max(Simd::abs(x), largest);
            check = Simd::fma(x, Simd::set1(0.f), check);
        }
        const bool finite = Simd::reduce_add(check) == 0.f;
        const float top = Simd::reduce_max(largest);
        const F units = Simd::set1(finite && top > 1e-30f ? q_units / top : 0.f);
        s.q_unit[r] = finite ? a.scale * (top / q_units) : std::numeric_limits<float>::quiet_NaN();
        int32_t* codes = reinterpret_cast<int32_t*>(s.flat) + dk;
        for (int64_t b = 0; b < dk / kBlock; ++b) {
            F sum = Simd::set1(0.f);
            for (int64_t e = b * kBlock; e < (b + 1) * kBlock; e += L) {
                const I code = Simd::to_int(finite ? Simd::mul(Simd::load(q + e), units) : Simd::set1(0.f));
                Simd::storei(codes + e, code);
                sum = Simd::add(sum, Simd::to_float(code));
            }
            s.q_sum[r * (dk / kBlock) + b] = Simd::reduce_add(sum);
        }
        stage_query_codes(r, codes);
    }

    // Scales of V in units of 1 / d_units: over the largest of their block in this tile (d_block), and of these, over
    // the largest of the row (d_row), so that neither a block nor a row of large values costs the others precision.
    HYBRIDKV_PHASE void stage_v_scales(int64_t j, int n) {
        stage_scales(seg.v, head, seg.shift + j, n, s.flat, s.v_d, s.v_m);
        const int64_t blocks = dv / kBlock;
        F rows_top[kTile / L];
        for (F& x : rows_top) x = Simd::set1(0.f);
        for (int64_t b = 0; b < blocks; ++b) {
            F top = Simd::set1(0.f), check = Simd::set1(0.f);
            for (int r = 0; r < kTile; r += L) {
                const F x = Simd::load(s.v_d + b * kTile + r);
                top = Simd::max(Simd::abs(x), top);
                check = Simd::fma(x, Simd::set1(0.f), check);
                if (!seg.v.format->has_min()) continue;
                check = Simd::fma(Simd::load(s.v_m + b * kTile + r), Simd::set1(0.f), check);
            }
            // NaN marks a block with a scale that is not finite: those go through accumulate_unmasked.
            const float largest = Simd::reduce_max(top) + Simd::reduce_add(check);
            s.d_block[b] = largest;
            s.d_inverse[b] = largest > 1e-37f && largest < kInf ? 1.f / largest : 0.f;
            if (!(largest < kInf)) continue;
            const F inverse = Simd::set1(s.d_inverse[b]);
            for (int i = 0; i < kTile / L; ++i) {
                const F x = Simd::mul(Simd::load(s.v_d + b * kTile + i * L), inverse);
                rows_top[i] = Simd::max(Simd::abs(x), rows_top[i]);
            }
        }
        for (int i = 0; i < kTile / L; ++i) {
            Simd::store(s.d_row + i * L, rows_top[i]);
            const F units = Simd::div(Simd::set1(d_units), Simd::max(rows_top[i], Simd::set1(1e-30f)));
            for (int64_t b = 0; b < blocks; ++b) {
                if (!(s.d_block[b] < kInf)) continue;
                const F x = Simd::mul(Simd::load(s.v_d + b * kTile + i * L), Simd::set1(s.d_inverse[b]));
                Simd::store_i16(s.d16 + b * kTile + i * L, Simd::to_int(Simd::mul(x, units)));
            }
        }
    }

    // Scores to probabilities relative to the running maximum, pass by pass over all rows: one row at a time would wait
    // for its own reductions. False if no row sees anything here.
    HYBRIDKV_PHASE bool softmax(int64_t j, int n) {
        for (int r = 0; r < rows; ++r) s.top[r] = mask_and_max(r, j, n);
        bool any = false, rescale = false;
        for (int r = 0; r < rows; r += L) {
            const F m = Simd::load(s.m + r), top = Simd::max(m, Simd::load(s.top + r));
            Simd::store(s.alpha + r, Simd::if_eq(m, top, Simd::set1(1.f), exp(Simd::sub(m, top))));
            Simd::store(s.m + r, top);
        }
        for (int r = 0; r < rows; ++r) {
            any |= s.top[r] != -kInf;
            rescale |= s.alpha[r] != 1.f;
        }
        if (!any) return false;
        if (rescale) rescale_rows();
        for (int r = 0; r < rows; ++r) exponentials(r);
        for (int r = 0; r < rows; r += L) {
            Simd::store(s.l + r, Simd::fma(Simd::load(s.l + r), Simd::load(s.alpha + r), Simd::load(s.sum + r)));
            // The largest p times scale of a row counts p_units.
            const F peak = Simd::max(Simd::load(s.peak + r), Simd::set1(1e-30f));
            Simd::store(s.p_unit + r, Simd::mul(peak, Simd::set1(32768.f / (p_units * d_units))));
            Simd::store(s.peak + r, Simd::div(Simd::set1(p_units), peak));
        }
        for (int r = 0; v_int && r < rows; ++r) {
            const F units = Simd::set1(s.peak[r]);
            for (int i = 0; i < kTile; i += L) {
                const F p = Simd::mul(Simd::load(s.scores + r * kTile + i), Simd::load(s.d_row + i));
                Simd::store_i16(s.p16 + r * kTile + i, Simd::to_int(Simd::mul(p, units)));
            }
        }
        return true;
    }

    void rescale_rows() {
        for (int r = 0; r < rows; ++r) {
            const F alpha = Simd::set1(s.alpha[r]);
            if (s.alpha[r] == 1.f) continue;
            for (float* x = s.acc + r * dv; x < s.acc + (r + 1) * dv; x += L) Simd::store(x, Simd::mul(Simd::load(x), alpha));
        }
    }

    void exponentials(int r) {
        float* x = s.scores + r * kTile;
        const F top = Simd::set1(s.m[r]);
        F sum = Simd::set1(0.f), peak = Simd::set1(0.f);
        for (int i = 0; i < kTile; i += L) {
            const F score = Simd::load(x + i);
            const F p = Simd::if_eq(score, Simd::set1(-kInf), Simd::set1(0.f), exp(Simd::sub(score, top)));
            sum = Simd::add(sum, p);
            Simd::store(x + i, p);
            if (v_int) peak = Simd::max(Simd::mul(p, Simd::load(s.d_row + i)), peak);
        }
        s.sum[r] = Simd::reduce_add(sum);
        if (v_int) s.peak[r] = Simd::reduce_max(peak);
    }

    // Scales, caps and masks the scores of row r; their largest.
    HYBRIDKV_PHASE float mask_and_max(int r, int64_t j, int n) {
        float* x = s.scores + r * kTile;
        const int64_t first = s.lo[r] - j > 0 ? s.lo[r] - j : 0, last = s.hi[r] - j < n ? s.hi[r] - j : n;
        const F unit = Simd::set1(s.q_unit[r]), center = Simd::set1(s.q_center[r]);
        F top = Simd::set1(-kInf);
        if (first == 0 && last == kTile && !a.mask && a.softcap <= 0.f) {  // most tiles
            for (int i = 0; i < kTile; i += L) {
                const F y = Simd::fma(Simd::load(x + i), unit, center);
                Simd::store(x + i, y);
                top = Simd::max(Simd::if_eq(y, y, y, Simd::set1(kInf)), top);
            }
            return Simd::reduce_max(top);
        }
        for (int i = 0; i < kTile; i += L) {
            F y = Simd::fma(Simd::load(x + i), unit, center);
            if (a.softcap > 0.f) y = soft_cap(y);
            Simd::store(x + i, y);
        }
        for (int64_t i = 0; i < first && i < kTile; ++i) x[i] = -kInf;
        for (int64_t i = last > 0 ? last : 0; i < kTile; ++i) x[i] = -kInf;
        if (a.mask) {
            const uint8_t* keep = mask_row(r) + j;
            for (int64_t i = first; i < last; ++i) x[i] = keep[i] ? x[i] : -kInf;
        }
        for (int i = 0; i < kTile; i += L) {
            const F y = Simd::load(x + i);
            top = Simd::max(Simd::if_eq(y, y, y, Simd::set1(kInf)), top);  // a NaN score makes the row NaN
        }
        return Simd::reduce_max(top);
    }

    F soft_cap(F x) const {  // cap * tanh(x / cap), tanh y = 1 - 2 / (e^2y + 1)
        const F y = Simd::mul(x, Simd::set1(2.f / a.softcap));
        const F limited = Simd::sub(Simd::set1(0.f), Simd::max(Simd::set1(-40.f), Simd::sub(Simd::set1(0.f), y)));
        const F e = Simd::add(exp(limited), Simd::set1(1.f));
        return Simd::fma(Simd::div(Simd::set1(-2.f), e), Simd::set1(a.softcap), Simd::set1(a.softcap));
    }

    HYBRIDKV_PHASE void finish_row(int r) {
        const int64_t dims = a.head_dim_v();
        const float* acc = s.acc + r * dv;
        if (task.partial) {
            float* out = task.partial + r * (2 + dims);
            out[0] = s.m[r];
            out[1] = s.l[r];
            std::memcpy(out + 2, acc, static_cast<size_t>(dims) * sizeof(float));
            return;
        }
        float m = s.m[r], l = s.l[r], keep = 1.f;
        if (a.sinks && l != 0.f) {
            const float sink = a.sinks[q_head(r)], top = sink > m ? sink : m;
            keep = ::expf(m - top);
            l = l * keep + ::expf(sink - top);
        }
        float* out = a.out + ((task.batch * a.n_heads + q_head(r)) * a.n_tokens + token(r)) * dims;
        const float factor = l == 0.f ? 0.f : keep / l;
        for (int64_t e = 0; e < dims; ++e) out[e] = acc[e] * factor;
    }
};

size_t scratch_bytes(const AttendParams& a) { return carve(a, nullptr).bytes; }

// The running softmax lies in the scratch: segments add to it one after another, and need not be merged.
void attend(const AttendParams& a, const AttendTask& task, void* memory) {
    const Scratch scratch = carve(a, memory);
    Attend(a, task, a.segments.front(), scratch).reset_rows();
    for (const Segment& segment : a.segments) {
        Attend part(a, task, segment, scratch);
        if (part.j0 < part.j1) part.run();
    }
    Attend(a, task, a.segments.back(), scratch).finish_rows();
}

// Sums over a tile have the same bits for any number of query rows, but for those that go another way.
int64_t tokens_together(const AttendParams& a) {
#if defined(HYBRIDKV_AMX) || defined(HYBRIDKV_DOTPROD)
    (void)a;
    return 1;
#else
    if (a.window || a.n_tokens != 1 || a.n_batch != 1) return 1;
    int64_t most = kMaxRows / a.group();
    for (const Segment& s : a.segments) {
        const bool floats = !s.k.format->quantized() || !s.v.format->quantized();
        if (floats && a.group() <= FewRows::most) most = std::min<int64_t>(most, FewRows::most / a.group());
    }
    return std::max<int64_t>(1, most);
#endif
}

// Several tokens of one cache as one call of which each sees all rows.
AttendParams joined(const AttendParams* const* calls, int64_t count) {
    AttendParams all = *calls[0];
    all.n_tokens = count;
    all.q_stride_t = count > 1 ? calls[1]->q - calls[0]->q : 0;
    all.causal = false;
    return all;
}

size_t scratch_together(const AttendParams& a, int64_t count) {
    AttendParams all = a;
    all.n_tokens = count;
    return carve(all, nullptr).bytes + carve(a, nullptr).bytes;
}

// The tiles that the first token sees whole are the same for all of them. What is behind those, each reads by itself: a
// tile's scales depend on the rows that are in it.
void attend_together(const AttendParams* const* calls, const AttendTask* tasks, int64_t count, void* memory) {
    const AttendParams all = joined(calls, count), &first = *calls[0];
    AttendTask shared = tasks[0];
    shared.r1 = count * first.group();
    if (tasks[count - 1].j1 != tasks[0].j1) {
        const int64_t begin = std::max(tasks[0].j0, first.segments.back().begin);
        shared.j1 = begin + (tasks[0].j1 - begin) / kTile * kTile;
    }
    const Scratch scratch = carve(all, memory), own = carve(first, static_cast<char*>(memory) + scratch.bytes);
    Attend(all, shared, all.segments.front(), scratch).reset_rows();
    for (const Segment& segment : all.segments) {
        Attend part(all, shared, segment, scratch);
        if (part.j0 < part.j1) part.run();
    }
    const int64_t rows = first.group(), dv = padded(first.head_dim_v());
    for (int64_t t = 0; t < count; ++t) {
        std::copy_n(scratch.m + t * rows, rows, own.m);
        std::copy_n(scratch.l + t * rows, rows, own.l);
        std::copy_n(scratch.acc + t * rows * dv, rows * dv, own.acc);
        AttendTask rest = tasks[t];
        rest.j0 = std::max(rest.j0, shared.j1);
        for (const Segment& segment : calls[t]->segments) {
            Attend part(*calls[t], rest, segment, own);
            if (part.j0 < part.j1) part.run();
        }
        Attend(*calls[t], rest, calls[t]->segments.back(), own).finish_rows();
    }
}

}  // namespace

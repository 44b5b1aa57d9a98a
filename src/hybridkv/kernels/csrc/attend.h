// One attention task on one instruction set: a block of query rows of one KV head over a range of stored rows,
// with an online softmax. K and V are separate phases of a tile, so that a format costs one staging function
// for both and not one kernel per K x V pair. Included once per instruction set.
#pragma once

#include <cmath>
#include <limits>

#include "dots.h"
#include "scratch.h"
#if defined(HYBRIDKV_AMX)
#include "amx.h"
#endif

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
#if defined(HYBRIDKV_AMX)
constexpr bool kAmx = true;
constexpr float kQUnits = Amx::units;
constexpr float kPUnits = 16000.f;
#else
constexpr bool kAmx = false;
constexpr float kQUnits = 32767.f;  // integer units of a query row's largest value
constexpr float kPUnits = 32000.f;  // and of the largest probability times scale of a query row in a tile
#endif

struct Attend {
    const AttendParams& a;
    const AttendTask& task;
    Scratch s;
    int rows;
    int64_t head;        // b * Hkv + h, as the planes count
    int64_t dk, dv;      // padded
    bool k_int, v_int;

    Attend(const AttendParams& params, const AttendTask& t, void* memory)
        : a(params), task(t), s(carve(params, memory)), rows(static_cast<int>(t.r1 - t.r0)),
          head(t.batch * params.n_kv_heads + t.kv_head), dk(padded(params.k.head_dim)),
          dv(padded(params.v.head_dim)), k_int(params.k.format->quantized()), v_int(params.v.format->quantized()) {}

    int64_t token(int r) const { return (task.r0 + r) / a.group(); }
    int64_t q_head(int r) const { return task.kv_head * a.group() + (task.r0 + r) % a.group(); }

    void run() {
#if defined(HYBRIDKV_AMX)
        Amx::configure();
        if (k_int) std::memset(s.q, 0, static_cast<size_t>((rows + 7) / 8 * 16 * dk));
#endif
        for (int r = 0; r < rows; ++r) start_row(r);
        for (int64_t j = task.j0; j < task.j1; j += kTile) {
            const int n = task.j1 - j < kTile ? static_cast<int>(task.j1 - j) : kTile;
            scores(j, n);
            bool any = false;
            if (v_int) stage_v_scales(j, n);
            for (int r = 0; r < rows; ++r) any |= softmax(r, j, n);
            if (any) values(j, n);
        }
        for (int r = 0; r < rows; ++r) finish_row(r);
#if defined(HYBRIDKV_AMX)
        Amx::release();
#endif
    }

    void start_row(int r) {
        const int64_t pos = a.n_stored - a.n_tokens + token(r);
        int64_t lo = a.seq_start ? a.seq_start[task.batch] : 0;
        if (a.window && pos - a.window + 1 > lo) lo = pos - a.window + 1;
        s.lo[r] = lo < task.j0 ? task.j0 : lo;
        const int64_t hi = a.causal ? pos + 1 : a.n_stored;
        s.hi[r] = hi < task.j1 ? hi : task.j1;
        s.m[r] = -kInf;
        s.l[r] = 0.f;
        std::memset(s.acc + r * dv, 0, static_cast<size_t>(dv) * sizeof(float));
        const float* q = a.q + task.batch * a.q_stride_b + q_head(r) * a.q_stride_h + token(r) * a.q_stride_t;
        if (k_int) return quantize_query(r, q);
        std::memcpy(s.q + r * dk, q, static_cast<size_t>(a.k.head_dim) * sizeof(float));
        std::memset(s.q + r * dk + a.k.head_dim, 0, static_cast<size_t>(dk - a.k.head_dim) * sizeof(float));
        s.q_unit[r] = a.scale;
    }

    // int16 with one scale per row, in the order in which stage_k lays out pairs of codes.
    HYBRIDKV_PHASE void quantize_query(int r, const float* q) {
        const int64_t dims = a.k.head_dim;
        float top = 0.f;
        bool finite = true;
        for (int64_t e = 0; e < dims; ++e) {
            const float x = ::fabsf(q[e]);
            top = x > top ? x : top;
            finite &= x < kInf;
        }
        const float units = finite && top > 0.f ? kQUnits / top : 0.f;
        s.q_unit[r] = finite ? a.scale * (top / kQUnits) : std::numeric_limits<float>::quiet_NaN();
#if defined(HYBRIDKV_AMX)
        for (int64_t e = 0; e < dims && units > 0.f; ++e) {
            const int c = static_cast<int>(::lrintf(q[e] * units));
            Amx::put_query(reinterpret_cast<int8_t*>(s.q), dk, r, e, c);
        }
#endif
        int16_t* out = reinterpret_cast<int16_t*>(s.q) + r * dk;
        const auto code = [&](int64_t e) {
            return e < dims && units > 0.f ? static_cast<int16_t>(::lrintf(q[e] * units)) : int16_t{0};
        };
        for (int64_t b = 0; b < dk / kBlock; ++b) {
            int32_t sum = 0;
            for (int64_t e = b * kBlock; e < (b + 1) * kBlock; e += 4, out += 4) {
                const int16_t c[4] = {code(e), code(e + 1), code(e + 2), code(e + 3)};
                if (!kAmx) {
                    out[0] = c[0];
                    out[1] = c[2];
                    out[2] = c[1];
                    out[3] = c[3];
                }
                sum += c[0] + c[1] + c[2] + c[3];
            }
            s.q_sum[r * (dk / kBlock) + b] = static_cast<float>(sum);
        }
    }

    HYBRIDKV_PHASE void scores(int64_t j, int n) {
        const int64_t row = a.start + j;
        Prefetch ahead(a.v, head, row, n, dk / kBlock);
        if (k_int) {
            const Codes codes = stage_codes(a.k, head, row, n, s.codes);
            stage_scales(a.k, head, row, n, s.flat, s.k_d, s.k_m);
#if defined(HYBRIDKV_AMX)
            for (int r = 0; r < rows; r += Amx::group) {
                ahead.step();
                const int count = rows - r < Amx::group ? rows - r : Amx::group;
                const auto f = a.k.format->has_min() ? Amx::k_codes<true> : Amx::k_codes<false>;
                f(reinterpret_cast<const int8_t*>(s.q) + r * dk * 2, codes, s.k_d, s.k_m, s.q_sum + r * (dk / kBlock),
                  dk / kBlock, count, s.scores + r * kTile);
            }
            return;
#endif
            int32_t* pairs = reinterpret_cast<int32_t*>(s.k);
            for (int64_t b = 0; b < dk / kBlock; ++b) {
                ahead.step();
                stage_k_pairs(codes, b, pairs + b * 16 * kTile);
            }
            const auto dot = [&](auto group, int r) {
                constexpr int NQ = decltype(group)::count;
                const int32_t* q = reinterpret_cast<const int32_t*>(s.q) + r * (dk / 2);
                const auto f = a.k.format->has_min() ? k_codes<NQ, true> : k_codes<NQ, false>;
                f(q, dk / 2, pairs, s.k_d, s.k_m, s.q_sum + r * (dk / kBlock), dk / kBlock, s.scores + r * kTile);
            };
            for_row_groups(rows, dot);
            return;
        }
        for (int64_t e = 0; e < dk; e += kBlock) {
            ahead.step();
            stage_values(a.k, head, row, n, e, s.v);
            for (int i = 0; i < kBlock; i += 8) {
                for (int r = 0; r < kTile; r += L) {
                    I dims[8];
                    Simd::transpose8(s.v + r * kBlock + i, kBlock * sizeof(float), dims);
                    int32_t* out = reinterpret_cast<int32_t*>(s.k) + (e + i) * kTile + r;
                    for (int k = 0; k < 8; ++k) Simd::storei(out + k * kTile, dims[k]);
                }
            }
        }
        for_row_groups(rows, [&](auto group, int r) {
            k_values<decltype(group)::count>(s.q + r * dk, dk, s.k, dk, s.scores + r * kTile);
        });
    }

    // Block b of the tile's codes to [16 pairs of dims][kTile].
    HYBRIDKV_PHASE static void stage_k_pairs(const Codes& codes, int64_t b, int32_t* pairs) {
        for (int r = 0; r < kTile; r += L, pairs += L) {
            I quads[8];
            Simd::transpose8(codes.row(r) + b * kBlock, codes.stride, quads);
            for (int i = 0; i < 8; ++i) {
                Simd::storei(pairs + 2 * i * kTile, Simd::even_codes(quads[i]));
                Simd::storei(pairs + (2 * i + 1) * kTile, Simd::odd_codes(quads[i]));
            }
        }
    }

    // Scales of V over the largest of their block in this tile, and per row the largest of those.
    HYBRIDKV_PHASE void stage_v_scales(int64_t j, int n) {
        stage_scales(a.v, head, a.start + j, n, s.flat, s.v_d, s.v_m);
        for (int r = 0; r < kTile; r += L) Simd::store(s.d_row + r, Simd::set1(0.f));
        for (int64_t b = 0; b < dv / kBlock; ++b) {
            float* d = s.v_d + b * kTile;
            F top = Simd::set1(0.f), check = Simd::set1(0.f);
            for (int r = 0; r < kTile; r += L) {
                const F x = Simd::load(d + r);
                top = Simd::max(Simd::abs(x), top);
                check = Simd::fma(x, Simd::set1(0.f), check);
                if (a.v.format->has_min()) check = Simd::fma(Simd::load(s.v_m + b * kTile + r), Simd::set1(0.f), check);
            }
            // NaN marks a block with a scale that is not finite: those go through careful_values.
            const float largest = Simd::reduce_max(top) + Simd::reduce_add(check);
            s.d_block[b] = largest;
            if (!(largest < kInf)) continue;
            const F inverse = Simd::set1(largest > 1e-37f ? 1.f / largest : 0.f);
            for (int r = 0; r < kTile; r += L) {
                const F x = Simd::mul(Simd::load(d + r), inverse);
                Simd::store(d + r, x);
                Simd::store(s.d_row + r, Simd::max(Simd::abs(x), Simd::load(s.d_row + r)));
            }
        }
    }

    // Scores of row r to probabilities relative to the running maximum; false if the row sees nothing here.
    HYBRIDKV_PHASE bool softmax(int r, int64_t j, int n) {
        float* x = s.scores + r * kTile;
        const int64_t first = s.lo[r] - j > 0 ? s.lo[r] - j : 0, last = s.hi[r] - j < n ? s.hi[r] - j : n;
        float top = first < last ? mask_and_max(r, x, j, first, last) : -kInf;
        s.alpha[r] = 1.f;
        s.p_unit[r] = v_int ? 0.f : 1.f;
        if (top == -kInf) {
            std::memset(x, 0, kTile * sizeof(float));
            return false;
        }
        top = top > s.m[r] ? top : s.m[r];
        if (top != s.m[r]) s.alpha[r] = ::expf(s.m[r] - top);
        s.m[r] = top;
        F sum = Simd::set1(0.f), peak = Simd::set1(0.f);
        for (int i = 0; i < kTile; i += L) {
            const F score = Simd::load(x + i);
            F p = exp(Simd::sub(score, Simd::set1(top)));
            p = Simd::if_eq(score, Simd::set1(-kInf), Simd::set1(0.f), p);
            sum = Simd::add(sum, p);
            Simd::store(x + i, p);
            if (v_int) peak = Simd::max(Simd::mul(p, Simd::load(s.d_row + i)), peak);
        }
        s.l[r] = s.l[r] * s.alpha[r] + Simd::reduce_add(sum);
        if (!v_int) return true;
        // From here on p counts in units that make the largest p times scale of the row kPUnits.
        const float unit = Simd::reduce_max(peak) / kPUnits;
        s.p_unit[r] = unit > 1e-37f ? unit : 1.f;
        const F inverse = Simd::set1(1.f / s.p_unit[r]);
        for (int i = 0; i < kTile; i += L) Simd::store(x + i, Simd::mul(Simd::load(x + i), inverse));
        return true;
    }

    HYBRIDKV_PHASE float mask_and_max(int r, float* x, int64_t j, int64_t first, int64_t last) {
        const F unit = Simd::set1(s.q_unit[r]);
        for (int i = 0; i < kTile; i += L) {
            F y = Simd::mul(Simd::load(x + i), unit);
            if (a.softcap > 0.f) y = soft_cap(y);
            Simd::store(x + i, y);
        }
        for (int64_t i = 0; i < first; ++i) x[i] = -kInf;
        for (int64_t i = last; i < kTile; ++i) x[i] = -kInf;
        if (a.mask) {
            const uint8_t* keep = a.mask + task.batch * a.mask_stride_b + q_head(r) * a.mask_stride_h +
                                  token(r) * a.mask_stride_t + j;
            for (int64_t i = first; i < last; ++i) x[i] = keep[i] ? x[i] : -kInf;
        }
        F top = Simd::set1(-kInf);
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

    HYBRIDKV_PHASE void values(int64_t j, int n) {
        const int64_t next = j + kTile, left = task.j1 - next;
        Prefetch ahead(a.k, head, a.start + next, left < kTile ? left : kTile, dv / kBlock);
        if (v_int) {
            value_codes(stage_codes(a.v, head, a.start + j, n, s.codes), ahead);
            return;
        }
        for (int64_t b = 0; b < dv / kBlock; ++b) {
            float* acc = s.acc + b * kBlock;
            ahead.step();
            if (!stage_values(a.v, head, a.start + j, n, b * kBlock, s.v)) {
                careful_values(acc);
                continue;
            }
            for_row_groups(rows, [&](auto group, int r) {
                v_values<decltype(group)::count>(s.scores + r * kTile, s.v, s.alpha + r, acc + r * dv, dv);
            });
        }
    }

    // True, and done, if a scale of block b is not finite.
    bool careful_block(const Codes& codes, int64_t b) {
        if (s.d_block[b] < kInf) return false;
        for (int i = 0; i < kTile; ++i) {
            const float d = s.v_d[b * kTile + i], m = a.v.format->has_min() ? s.v_m[b * kTile + i] : 0.f;
            for (int e = 0; e < kBlock; ++e) s.v[i * kBlock + e] = d * codes.row(i)[b * kBlock + e] + m;
        }
        careful_values(s.acc + b * kBlock);
        return true;
    }

#if defined(HYBRIDKV_AMX)
    // A product's operands are written one product ahead, and its sums read one product later: a tile does not load
    // what is still on its way to memory.
    void value_codes(const Codes& codes, Prefetch& ahead) {
        alignas(64) int8_t operands[2][2048], p[2][2 * Amx::group * kTile] = {};
        Amx::Product products[3];
        const int64_t groups = (rows + Amx::group - 1) / Amx::group, items = dv / kBlock * groups;
        const bool has_min = a.v.format->has_min();
        const auto prepare = [&](int64_t item) {
            const int64_t b = item / groups;
            const int r = static_cast<int>(item % groups) * Amx::group;
            Amx::Product& x = products[item % 3];
            x.n = 0;
            if (r == 0) {
                ahead.step();
                if (!careful_block(codes, b)) Amx::stage_v(codes, b, operands[b % 2]);
            }
            if (!(s.d_block[b] < kInf)) return;
            x.n = rows - r < Amx::group ? rows - r : Amx::group;
            x.alpha = s.alpha + r;
            x.acc = s.acc + r * dv + b * kBlock;
            for (int i = 0; i < x.n; ++i) {
                Amx::pack_p(s.scores + (r + i) * kTile, s.v_d + b * kTile, p[item % 2] + i * kTile);
                x.unit[i] = s.p_unit[r + i] * s.d_block[b];
                x.bias[i] = has_min ? bias(r + i, b) : 0.f;
            }
        };
        prepare(0);
        for (int64_t item = 0; item < items; ++item) {
            if (item + 1 < items) prepare(item + 1);
            Amx::v_product(p[item % 2], operands[item / groups % 2], products[item % 3]);
            if (item > 0) Amx::v_finish(products[(item - 1) % 3], dv);
        }
        Amx::v_finish(products[(items - 1) % 3], dv);
    }
#else
    void value_codes(const Codes& codes, Prefetch& ahead) {
        int32_t* pairs = reinterpret_cast<int32_t*>(s.v);
        for (int64_t b = 0; b < dv / kBlock; ++b) {
            ahead.step();
            if (careful_block(codes, b)) continue;
            for (int i = 0; i < kTile; i += 2) {
                Simd::interleave(codes.row(i) + b * kBlock, codes.row(i + 1) + b * kBlock, pairs + i / 2 * kBlock);
            }
            for (int r = 0; r < rows; ++r) quantize_p(r, b);
            for_row_groups(rows, [&](auto group, int r) {
                v_codes<decltype(group)::count>(s.p16 + r * kTile, pairs, s.alpha + r, s.unit + r, s.bias + r,
                                                s.acc + r * dv + b * kBlock, dv);
            });
        }
    }

    // p times the scale of block b, as int16 in units that make the row's largest one kPUnits.
    HYBRIDKV_PHASE void quantize_p(int r, int64_t b) {
        const float *p = s.scores + r * kTile, *d = s.v_d + b * kTile;
        for (int i = 0; i < kTile; i += L) {
            Simd::store_i16(s.p16 + r * kTile + i, Simd::to_int(Simd::mul(Simd::load(p + i), Simd::load(d + i))));
        }
        s.unit[r] = s.p_unit[r] * s.d_block[b];
        s.bias[r] = a.v.format->has_min() ? bias(r, b) : 0.f;
    }
#endif

    // What the minima of block b add to each of its dims.
    float bias(int r, int64_t b) const {
        F sum = Simd::set1(0.f);
        for (int i = 0; i < kTile; i += L) {
            sum = Simd::fma(Simd::load(s.scores + r * kTile + i), Simd::load(s.v_m + b * kTile + i), sum);
        }
        return Simd::reduce_add(sum) * s.p_unit[r];
    }

    // The tile holds a NaN or an infinity, perhaps under a mask: exclude by select, never by 0 * NaN.
    void careful_values(float* acc) {
        for (int r = 0; r < rows; ++r) {
            float* out = acc + r * dv;
            for (int e = 0; e < kBlock; ++e) out[e] *= s.alpha[r];
            for (int i = 0; i < kTile; ++i) {
                const float p = s.scores[r * kTile + i] * s.p_unit[r];
                if (p == 0.f) continue;
                for (int e = 0; e < kBlock; ++e) out[e] += p * s.v[i * kBlock + e];
            }
        }
    }

    HYBRIDKV_PHASE void finish_row(int r) {
        const int64_t dims = a.v.head_dim;
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

void attend(const AttendParams& a, const AttendTask& task, void* scratch) { Attend(a, task, scratch).run(); }

}  // namespace

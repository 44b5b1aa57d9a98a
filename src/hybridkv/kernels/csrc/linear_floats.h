// Linear layers in float32. Activations are rows of [packed inputs], a cache line apart from a power of two.
//
// Few rows: a panel streams past up to 8 rows. Many rows (Blocks): panels are brought to float32 once for all rows and
// kDepth inputs at a time, and are multiplied by as many rows as registers hold sums of.
#pragma once

#include "dots.h"
#include "pack.h"

namespace {

inline int64_t floats_stride(Code code, int64_t n_in) {
    return ((packed_inputs(code, n_in) + 15) / 16 * 16 + 16) * static_cast<int64_t>(sizeof(float));
}

inline void prepare_floats(Code code, const float* x, int64_t n_in, uint8_t* out) {
    std::memcpy(out, x, static_cast<size_t>(n_in) * sizeof(float));
    std::memset(out + n_in * 4, 0, static_cast<size_t>(packed_inputs(code, n_in) - n_in) * sizeof(float));
}

// Inputs 2i (half 0) or 2i + 1 of bf16 pairs.
inline F bf16_half(F pair, int half) {
    typedef uint32_t Bits __attribute__((vector_size(sizeof(F))));
    return half ? (F)((Bits)pair & 0xffff0000u) : (F)((Bits)pair << 16);
}

// One step of the inputs, one of f32 or two of bf16: acc[q] += w x[q]
template <Code C, int NQ, int NV>
inline __attribute__((always_inline)) void step_floats(const uint8_t* w, const uint8_t* x, int64_t x_stride,
                                                       F (&acc)[NQ][NV]) {
    constexpr int inputs = C == Code::f32 ? 1 : 2;
#pragma GCC unroll 2
    for (int k = 0; k < inputs; ++k) {
        F wv[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
            const F lanes = Simd::load(reinterpret_cast<const float*>(w) + v * L);
            wv[v] = C == Code::f32 ? lanes : bf16_half(lanes, k);
        }
#pragma GCC unroll 8
        for (int q = 0; q < NQ; ++q) {
            float value;
            std::memcpy(&value, x + q * x_stride + k * 4, 4);
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) acc[q][v] = Simd::fma(wv[v], Simd::set1(value), acc[q][v]);
        }
    }
}

// sums[NQ][16], of which NV vectors of output rows from `lane` on are written; `steps` as of step_floats
template <Code C, int NQ, int NV>
HYBRIDKV_PHASE void panel_floats(const uint8_t* panel, int64_t steps, const uint8_t* x, int64_t x_stride, int lane,
                                 float* sums) {
    constexpr int chains = NQ * NV >= 8 ? 1 : 8 / (NQ * NV) > 4 ? 4 : 8 / (NQ * NV);  // hide the latency of a sum
    constexpr int x_step = C == Code::f32 ? 4 : 8, w_step = kPanel * 4;
    F acc[chains][NQ][NV];
#pragma GCC unroll 4
    for (auto& chain : acc) for (auto& row : chain) for (F& a : row) a = Simd::set1(0.f);
    const uint8_t* w = panel + lane * 4;
    int64_t s = 0;
    for (; s + chains <= steps; s += chains) {
#pragma GCC unroll 4
        for (int i = 0; i < chains; ++i) step_floats<C>(w + (s + i) * w_step, x + (s + i) * x_step, x_stride, acc[i]);
    }
    for (; s < steps; ++s) step_floats<C>(w + s * w_step, x + s * x_step, x_stride, acc[0]);
#pragma GCC unroll 8
    for (int q = 0; q < NQ; ++q) {
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
            F sum = acc[0][q][v];
            for (int i = 1; i < chains; ++i) sum = Simd::add(sum, acc[i][q][v]);
            Simd::store(sums + q * kPanel + lane + v * L, sum);
        }
    }
}

struct Blocks {
    static constexpr int64_t kDepth = 256;    // inputs: panels of them stay in the first cache
    static constexpr int64_t kMaxRows = 120;  // rows that share converted panels: they stay in the second cache
    static constexpr int kVectors = 2;        // of output rows in a micro-kernel
    static constexpr int kRows = L == 16 ? 12 : L == 8 ? 6 : 4;  // so that all sums stay in registers
    static constexpr int kSide = L == 16 ? 2 : 1;  // panels that a micro-kernel may touch
    static constexpr int64_t kPanelFloats = kDepth * kPanel, kSums = kMaxRows * kPanel;

    static constexpr size_t scratch_bytes = kSide * (kPanelFloats + kSums) * sizeof(float);

    // Whether bringing panels to float32 pays. bf16 is cheap to widen anew for each row; without vector products of
    // 16 bits, integers never win.
    static bool wins(Code code, int64_t n_rows) {
        const int64_t least = code == Code::bf16 ? 16 : in_blocks(code) && L == 4 ? 1 : 8;
        return n_rows >= least;
    }

    // Calls f(Rows<N>, r) for groups of kRows rows and then ever fewer.
    template <int N = kRows, class Fn>
    static void for_rows(int64_t n, Fn&& f, int64_t r = 0) {
        for (; n - r >= N; r += N) f(Rows<N>{}, r);
        if constexpr (N > 1) for_rows<N == 12 ? 8 : N == 6 ? 4 : N / 2>(n, f, r);
    }

    // sums[panel][row][16] (+)= w x for NQ rows and NV vectors of output rows; w: [panel][input][16]
    template <int NQ, int NV>
    static HYBRIDKV_PHASE void multiply(const float* w, int64_t w_stride, const uint8_t* x, int64_t x_stride,
                                        int64_t depth, bool add, float* sums) {
        constexpr int in_panel = kPanel / L;  // vectors
        F acc[NQ][NV];
#pragma GCC unroll 12
        for (int q = 0; q < NQ; ++q) {
#pragma GCC unroll 2
            for (int v = 0; v < NV; ++v) {
                const float* before = sums + v / in_panel * kSums + q * kPanel + v % in_panel * L;
                acc[q][v] = add ? Simd::load(before) : Simd::set1(0.f);
            }
        }
        for (int64_t k = 0; k < depth; ++k, w += kPanel, x += 4) {
            F wv[NV];
#pragma GCC unroll 2
            for (int v = 0; v < NV; ++v) wv[v] = Simd::load(w + v / in_panel * w_stride + v % in_panel * L);
#pragma GCC unroll 12
            for (int q = 0; q < NQ; ++q) {
                float value;
                std::memcpy(&value, x + q * x_stride, 4);
#pragma GCC unroll 2
                for (int v = 0; v < NV; ++v) acc[q][v] = Simd::fma(wv[v], Simd::set1(value), acc[q][v]);
            }
        }
#pragma GCC unroll 12
        for (int q = 0; q < NQ; ++q) {
#pragma GCC unroll 2
            for (int v = 0; v < NV; ++v) {
                Simd::store(sums + v / in_panel * kSums + q * kPanel + v % in_panel * L, acc[q][v]);
            }
        }
    }

    // Inputs [k, k + depth) of a panel as [input][16] float32; both are multiples of a pair of blocks
    template <Code C>
    static HYBRIDKV_PHASE void convert_blocks(const uint8_t* panel, int64_t k, int64_t depth, float* out) {
        constexpr int parts = codes_per_byte(C), zero = zero_code(C);
        const uint8_t* pair = panel + k / 64 * pair_bytes(C);
        for (int64_t i = 0; i < depth; i += 64, pair += pair_bytes(C)) {
            for (int lane = 0; lane < 2 * kPanel; lane += L) {
                const F d = Simd::f16(reinterpret_cast<const uint16_t*>(pair) + lane);
                const F offset = Simd::mul(d, Simd::set1(static_cast<float>(-zero)));
                const uint8_t* codes = pair + kPairScales + lane / kPanel * block_bytes(C) + lane % kPanel * 4;
                float* to = out + (i + lane / kPanel * 32) * kPanel + lane % kPanel;
                for (int quad = 0; quad < 8 / parts; ++quad, codes += 64, to += 4 * kPanel) {
                    typedef uint32_t Bits __attribute__((vector_size(sizeof(I))));
                    const Bits w = (Bits)Simd::loadi(reinterpret_cast<const int32_t*>(codes));
#pragma GCC unroll 8
                    for (int j = 0; j < 4 * parts; ++j) {
                        const F code = Simd::to_float((I)(w >> (8 * (j % 4) + j / 4 * 4) & (2 * zero - 1)));
                        Simd::store(to + (j % 4 + j / 4 * 16) * kPanel, Simd::fma(code, d, offset));
                    }
                }
            }
        }
    }

    static HYBRIDKV_PHASE void convert_bf16(const uint8_t* panel, int64_t k, int64_t depth, float* out) {
        const float* pairs = reinterpret_cast<const float*>(panel) + k / 2 * kPanel;
        for (int64_t i = 0; i < depth; i += 2, pairs += kPanel, out += 2 * kPanel) {
            for (int lane = 0; lane < kPanel; lane += L) {
                const F pair = Simd::load(pairs + lane);
                Simd::store(out + lane, bf16_half(pair, 0));
                Simd::store(out + kPanel + lane, bf16_half(pair, 1));
            }
        }
    }

    // NP panels from `panel` on times n_rows rows of x, inputs from k on.
    template <int NP>
    static void block(const Weight& w, int64_t panel, const uint8_t* x, int64_t n_rows, int64_t k, float* converted,
                      float* sums) {
        constexpr int NV = NP == kSide ? kVectors : kVectors / 2;
        const int64_t n_in = packed_inputs(w.code, w.n_in), bytes = panel_bytes(w.code, w.n_in);
        const int64_t depth = n_in - k < kDepth ? n_in - k : kDepth, x_stride = floats_stride(w.code, w.n_in);
        const float* b = converted;
        int64_t b_stride = kPanelFloats;
        if (w.code == Code::f32) {
            b = reinterpret_cast<const float*>(w.data + panel * bytes) + k * kPanel;
            b_stride = bytes / 4;
        } else {
            const auto convert = w.code == Code::bytes     ? convert_blocks<Code::bytes>
                                 : w.code == Code::nibbles ? convert_blocks<Code::nibbles>
                                                           : convert_bf16;
            for (int i = 0; i < NP; ++i) convert(w.data + (panel + i) * bytes, k, depth, converted + i * kPanelFloats);
        }
        for (int lane = 0; lane < NP * kPanel; lane += NV * L) {
            for_rows(n_rows, [&](auto group, int64_t r) {
                constexpr int n = decltype(group)::count;
                multiply<n, NV>(b + lane, b_stride, x + r * x_stride + k * 4, x_stride, depth, k > 0,
                                sums + r * kPanel + lane);
            });
        }
    }

    template <class Out>
    static void linear(const Weight& w, const uint8_t* x, int64_t n_rows, int64_t panel0, int64_t panel1, void* scratch,
                       const Out& out) {
        float* converted = static_cast<float*>(scratch);
        float* sums = converted + kSide * kPanelFloats;
        for (int64_t r0 = 0; r0 < n_rows; r0 += kMaxRows) {
            const int64_t rows = n_rows - r0 < kMaxRows ? n_rows - r0 : kMaxRows;
            const uint8_t* from = x + r0 * floats_stride(w.code, w.n_in);
            for (int64_t p = panel0; p < panel1; p += kSide) {
                const bool whole = panel1 - p >= kSide;
                for (int64_t k = 0; k < w.n_in; k += kDepth) {
                    if (whole) block<kSide>(w, p, from, rows, k, converted, sums);
                    else block<1>(w, p, from, rows, k, converted, sums);
                }
                const int n = static_cast<int>(rows);
                for (int i = 0; i < (whole ? kSide : 1); ++i) out.put(sums + i * kSums, n, r0, p + i);
            }
        }
    }
};

}  // namespace

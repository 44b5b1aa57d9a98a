// Linear layers, y = W x: activations in the form that a weight's type takes, and panels times rows of them. Included
// once per instruction set. pack.h has the layout of a weight.
//
// q8_0 and q4_0: activations become integers with a scale per block of 32 (Dots says how many bits: far more than the
// weights have), products and sums of a block are exact. f32 and bf16, and blocks of many rows where there are no
// products of bytes: linear_floats.h. With AMX and many rows: linear_amx.h.
#pragma once

#include <limits>

#include "linear_floats.h"
#if defined(HYBRIDKV_AMX)
#include "linear_amx.h"
#endif
#if defined(__AVX512VNNI__)
#include "linear_vnni.h"
#else
#include "linear_words.h"
#endif

namespace {

// Where the results of a call go.
struct Output {
    float* y;
    int64_t stride, n_out;
    bool add;

    // Sixteen sums of `n` rows, of which as many are stored as there are outputs.
    void put(const float* sums, int n, int64_t row, int64_t panel) const {
        const int64_t width = n_out - panel * kPanel;
        float* out = y + row * stride + panel * kPanel;
        for (int q = 0; q < n; ++q, sums += kPanel, out += stride) {
            if (width >= kPanel) {
                for (int i = 0; i < kPanel; i += L) {
                    const F sum = Simd::load(sums + i);
                    Simd::store(out + i, add ? Simd::add(Simd::load(out + i), sum) : sum);
                }
            } else {
                for (int64_t i = 0; i < width; ++i) out[i] = add ? out[i] + sums[i] : sums[i];
            }
        }
    }
};

// ---- Activations as integers: rows of [block][64 bytes of Dots], [block] Unit.

struct Unit {
    float d;
    int32_t offset;  // what the zero in every code adds, to be taken off
};

inline int64_t integers_stride(int64_t n_in) {
    const int64_t blocks = packed_inputs(Code::bytes, n_in) / 32;
    return (blocks * (64 + static_cast<int64_t>(sizeof(Unit))) + 63) / 64 * 64;
}

// One block of 32. A block with a NaN or an infinity gets a NaN for its scale.
inline Unit put_integers(const float* x, int zero, uint8_t* out) {
    constexpr float kMagic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    constexpr uint32_t kInfinity = 0x7f800000u;
    uint32_t bits[32], top = 0;
    int32_t c[32] = {};
    std::memcpy(bits, x, sizeof bits);
    for (const uint32_t b : bits) top = (b & 0x7fffffffu) > top ? b & 0x7fffffffu : top;
    float largest;
    std::memcpy(&largest, &top, 4);
    Unit unit{largest / Dots::units, 0};
    if (top >= kInfinity) unit.d = std::numeric_limits<float>::quiet_NaN();
    if (largest < 1e-30f) unit.d = 0.f;  // its inverse may be infinite
    if (unit.d > 0.f) {
        const float inverse = Dots::units / largest;
        int32_t sum = 0;
        for (int i = 0; i < 32; ++i) {
            const float y = x[i] * inverse + kMagic;
            std::memcpy(&c[i], &y, 4);
            c[i] -= 0x4b400000;
            sum += c[i];
        }
        unit.offset = -zero * sum;
    }
    Dots::put(c, out);
    return unit;
}

HYBRIDKV_PHASE void prepare_integers(Code code, const float* x, int64_t n_in, uint8_t* out) {
    const int64_t blocks = packed_inputs(code, n_in) / 32;
    for (int64_t b = 0; b < blocks; ++b) {
        constexpr float kZeros[32] = {};
        const Unit unit = put_integers(b * 32 < n_in ? x + b * 32 : kZeros, zero_code(code), out + b * 64);
        std::memcpy(out + blocks * 64 + b * static_cast<int64_t>(sizeof unit), &unit, sizeof unit);
    }
}

// Asks for the pairs of blocks to come, across the end of a panel: processors look ahead too little. Measured with
// AVX-512: one row gains 5 %, four rows 30 % out of memory.
template <Code C>
inline void expect_pair(const uint8_t* pair) {
    constexpr int kNear = 2 * pair_bytes(Code::bytes), kFar = 8 * pair_bytes(Code::bytes), lines = pair_bytes(C) / 64;
#pragma GCC unroll 17
    for (int i = 0; i < lines; ++i) {
        __builtin_prefetch(pair + kNear + i * 64, 0, 3);
        __builtin_prefetch(pair + kFar + i * 64, 0, 2);
    }
}

// NV vectors of output rows from `lane` on, of NQ rows: they lie side by side in a panel, or are whole panels that lie
// `bytes` apart; with `ahead`, the memory to come is asked for. sums[panel][NQ][16]
template <Code C, int NQ, int NV>
HYBRIDKV_PHASE void panel_integers(const uint8_t* panel, int64_t bytes, int64_t blocks, const uint8_t* x,
                                   int64_t x_stride, int lane, bool ahead, float* sums) {
    constexpr bool whole = L == kPanel;
    F acc[NQ][NV];
#pragma GCC unroll 8
    for (auto& row : acc) for (F& a : row) a = Simd::set1(0.f);
    for (int64_t b = 0; b < blocks; b += 2, panel += pair_bytes(C)) {
        if constexpr (NQ <= 4) {
#pragma GCC unroll 2
            for (int v = 0; v < (whole ? NV : 1); ++v) {
                if (ahead) expect_pair<C>(panel + v * bytes);
            }
        }
#pragma GCC unroll 2
        for (int64_t half = 0; half < 2; ++half) {
            Unit unit[NQ];
            I block[NQ][NV];
#pragma GCC unroll 8
            for (int q = 0; q < NQ; ++q) {
                std::memcpy(&unit[q], x + q * x_stride + blocks * 64 + (b + half) * 8, sizeof unit[q]);
#pragma GCC unroll 4
                for (int v = 0; v < NV; ++v) block[q][v] = Simd::set1i(unit[q].offset);
            }
            const uint8_t* codes = panel + kPairScales + half * block_bytes(C) + lane * 4;
            Dots::block<C, NQ, NV>(codes, whole ? bytes : L * 4, x + (b + half) * 64, x_stride, block);
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) {
                const uint8_t* scales = panel + (half * kPanel + lane) * 2 + v * (whole ? bytes : L * 2);
                const F d = Simd::f16(reinterpret_cast<const uint16_t*>(scales));
#pragma GCC unroll 8
                for (int q = 0; q < NQ; ++q) {
                    acc[q][v] = Simd::fma(Simd::to_float(block[q][v]), Simd::mul(d, Simd::set1(unit[q].d)), acc[q][v]);
                }
            }
        }
    }
#pragma GCC unroll 8
    for (int q = 0; q < NQ; ++q) {
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
            Simd::store(sums + (whole ? v * NQ + q : q) * kPanel + lane + (whole ? 0 : v * L), acc[q][v]);
        }
    }
}

// ---- The four functions of StepKernels.

enum class Form { floats, blocks, integers, tiles };

inline Form form_of(Code code, RowCount rows) {
#if defined(HYBRIDKV_AMX)
    if (code != Code::f32 && rows.deciding() >= Tiles::min_rows) return Form::tiles;
#endif
    if (Blocks::wins(code, rows.deciding()) && !(in_blocks(code) && Dots::bytes)) return Form::blocks;
    return in_blocks(code) ? Form::integers : Form::floats;
}

size_t prepared_bytes(Code code, int64_t n_in, RowCount rows) {
    switch (form_of(code, rows)) {
#if defined(HYBRIDKV_AMX)
        case Form::tiles: return static_cast<size_t>(Tiles::prepared_bytes(packed_inputs(code, n_in), rows.n));
#endif
        case Form::integers: return static_cast<size_t>(rows.n * integers_stride(n_in));
        default: return static_cast<size_t>(rows.n * floats_stride(code, n_in));
    }
}

void prepare(Code code, const float* x, int64_t x_stride, int64_t n_in, RowCount rows, int64_t r0, int64_t r1,
             void* prepared) {
    uint8_t* out = static_cast<uint8_t*>(prepared);
    const Form form = form_of(code, rows);
    for (int64_t r = r0; r < r1; ++r) {
        const float* row = x + r * x_stride;
#if defined(HYBRIDKV_AMX)
        if (form == Form::tiles) Tiles::prepare(row, n_in, packed_inputs(code, n_in), r, out);
#endif
        if (form == Form::integers) prepare_integers(code, row, n_in, out + r * integers_stride(n_in));
        const bool floats = form == Form::floats || form == Form::blocks;
        if (floats) prepare_floats(code, row, n_in, out + r * floats_stride(code, n_in));
    }
}

size_t linear_scratch_bytes(Code code, int64_t n_in, RowCount rows) {
#if defined(HYBRIDKV_AMX)
    if (form_of(code, rows) == Form::tiles) return Tiles::scratch_bytes(rows.n);
#endif
    (void)n_in;
    return form_of(code, rows) == Form::blocks ? Blocks::scratch_bytes : 0;
}

// Vectors of a panel that a micro-kernel of NQ rows takes at once: four sums or more are under way.
template <int NQ>
constexpr int vectors() {
    constexpr int all = kPanel / L, most = NQ >= 4 ? 1 : 4 / NQ;
    return all < most ? all : most;
}

// Panels times groups of rows, each row by itself if `alone`: a panel is still in the first caches then.
template <class Kernel>
inline void for_panels(const Weight& w, int64_t n_rows, bool alone, int64_t panel0, int64_t panel1, const Output& out,
                       Kernel&& kernel) {
    const int64_t bytes = panel_bytes(w.code, w.n_in);
    for (int64_t p = panel0; p < panel1; ++p) {
        const auto multiply = [&](auto group, int r) {
            constexpr int n = decltype(group)::count;
            alignas(64) float sums[n * kPanel];
            for (int lane = 0; lane < kPanel; lane += vectors<n>() * L) {
                kernel(group, w.data + p * bytes, r, lane, sums);
            }
            out.put(sums, n, r, p);
        };
        if (!alone) for_row_groups(static_cast<int>(n_rows), multiply);
        for (int r = 0; alone && r < n_rows; ++r) multiply(Rows<1>{}, r);
    }
}

// The number of chains of sums depends on that of rows in a group: rows that are to get their own bits go alone.
template <Code C>
void linear_floats(const Weight& w, const uint8_t* x, RowCount rows, int64_t panel0, int64_t panel1,
                   const Output& out) {
    const int64_t stride = floats_stride(C, w.n_in), steps = C == Code::f32 ? w.n_in : packed_inputs(C, w.n_in) / 2;
    const bool alone = rows.each_alone;
    for_panels(w, rows.n, alone, panel0, panel1, out, [&](auto group, const uint8_t* panel, int r, int lane, float* sums) {
        constexpr int n = decltype(group)::count;
        panel_floats<C, n, vectors<n>()>(panel, steps, x + r * stride, stride, lane, sums);
    });
}

// A block's sum of products is exact and blocks are added in order: a row has the same bits in every group.
template <Code C>
void linear_integers(const Weight& w, const uint8_t* x, int64_t n_rows, int64_t panel0, int64_t panel1,
                     const Output& out) {
    const int64_t stride = integers_stride(w.n_in), blocks = packed_inputs(w.code, w.n_in) / 32;
    const int64_t bytes = panel_bytes(w.code, w.n_in);
    if constexpr (L == kPanel) {  // two panels at once: one broadcast for two products
        for (; n_rows > 4 && panel0 + 2 <= panel1; panel0 += 2) {
            Blocks::for_rows<4>(n_rows, [&](auto group, int64_t r) {
                constexpr int n = decltype(group)::count;
                alignas(64) float sums[2 * n * kPanel];
                panel_integers<C, n, 2>(w.data + panel0 * bytes, bytes, blocks, x + r * stride, stride, 0, r == 0,
                                     sums);
                out.put(sums, n, r, panel0);
                out.put(sums + n * kPanel, n, r, panel0 + 1);
            });
        }
    }
    for_panels(w, n_rows, false, panel0, panel1, out, [&](auto group, const uint8_t* panel, int r, int lane, float* sums) {
        constexpr int n = decltype(group)::count;
        panel_integers<C, n, vectors<n>()>(panel, bytes, blocks, x + r * stride, stride, lane, r == 0, sums);
    });
}

void linear(const Weight& w, const void* prepared, RowCount rows, int64_t panel0, int64_t panel1, float* y,
            int64_t y_stride, bool add, void* scratch) {
    const uint8_t* x = static_cast<const uint8_t*>(prepared);
    const Output out{y, y_stride, w.n_out, add};
    switch (form_of(w.code, rows)) {
#if defined(HYBRIDKV_AMX)
        case Form::tiles: return Tiles::linear(w, x, rows.n, panel0, panel1, scratch, out);
#endif
        case Form::blocks: return Blocks::linear(w, x, rows.n, panel0, panel1, scratch, out);
        default: break;
    }
    switch (w.code) {
        case Code::nibbles: return linear_integers<Code::nibbles>(w, x, rows.n, panel0, panel1, out);
        case Code::bytes: return linear_integers<Code::bytes>(w, x, rows.n, panel0, panel1, out);
        case Code::bf16: return linear_floats<Code::bf16>(w, x, rows, panel0, panel1, out);
        default: return linear_floats<Code::f32>(w, x, rows, panel0, panel1, out);
    }
}

}  // namespace

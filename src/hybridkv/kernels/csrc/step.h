// The records of a model's step outside of attention and products with weights: operations on buffers, and what one
// instruction set does with them. Knows no SIMD; step_program.cpp runs operations in order.
//
// A buffer holds one row per token: row `sequence * n_tokens + token`. All values are float32.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "ops/add.h"
#include "ops/copy.h"
#include "ops/mamba1.h"
#include "ops/mamba2.h"
#include "ops/view.h"

namespace hybridkv {

// dst = x * weight / sqrt(sum(x^2) * factor + eps), per group. RMSNorm: factor 1 / width. L2 norm: factor 1.
struct NormOp {
    View x, dst;
    std::vector<float> weight;  // [width], or [group][width]
    float factor, eps;
};

// What g becomes: 1 / (1 + e^-g); g times that; g itself; g times a normal distribution's share below it, by its usual
// formula with tanh, or exactly; g where it is positive, else 0.
enum class Gate : uint8_t { sigmoid, silu, product, gelu, gelu_erf, relu };

// dst = x * gate(g)
struct GateOp {
    View x, g, dst;
    Gate gate;
};

// The first `n_rotated` values of each group: halves (i, i + n_rotated / 2) or neighbours (2 i, 2 i + 1) turn by the
// row's angle i.
struct RopeOp {
    View x;
    int64_t n_rotated;
    bool neighbours;
    int64_t table;  // of the run's angles
};

// Causal depthwise convolution, with SiLU or without. The state [sequence][kernel][channel] holds the newest inputs, oldest first.
struct ConvOp {
    View x, dst;  // one group
    std::vector<float> weight, bias;  // [kernel][channel]; [channel] or empty
    int64_t kernel, state;
    bool silu;
};

// decay = exp(rate * softplus(a + bias)), beta = scale * sigmoid(b), per value head
struct DecayOp {
    View a, b;         // value heads in groups of any size
    View decay, beta;  // one group
    std::vector<float> rate, bias;
    float scale;
};

// dst += x * sigmoid(g), one g per row
struct WeighOp {
    View x, g, dst;  // one group
};

// Gated delta rule: S = decay * S; S += k (beta * (v - S^T k))^T; dst = S^T q. Source: Gated Delta Networks,
// arXiv 2412.06464, equation 10. The state is [sequence][value head][key dim][value dim].
struct DeltaOp {
    View q, k, v, decay, beta, dst;
    int64_t state;
    bool tiled;  // value head h uses key head h % key heads; else h / (value heads / key heads)

    int64_t head_floats() const { return k.width * v.width; }
    int64_t key_head(int64_t head) const { return tiled ? head % k.groups : head * k.groups / v.groups; }
};

// Attention of one layer for one new token per sequence: k and v are stored, q attends. Where the rows lie comes with
// each run: `call` counts the operations of this kind.
struct AttendOp {
    View q, k, v, dst;
    float scale;
    int64_t call;
};

struct StepKernels {
    // Rows [r0, r1). Widths need not be multiples of anything.
    void (*norm)(const NormOp& op, int64_t r0, int64_t r1);
    void (*gate)(const GateOp& op, int64_t r0, int64_t r1);
    // cos, sin: [n_angles][n_rotated / 2]; row r turns by those of r % n_angles
    void (*rope)(const RopeOp& op, const float* cos, const float* sin, int64_t n_angles, int64_t r0, int64_t r1);
    void (*decay)(const DecayOp& op, int64_t r0, int64_t r1);
    void (*weigh)(const WeighOp& op, int64_t r0, int64_t r1);
    void (*add)(const AddOp& op, int64_t r0, int64_t r1);
    void (*bias)(const BiasOp& op, int64_t r0, int64_t r1);
    // Orthonormal Walsh-Hadamard transform of blocks of `block` values (a power of two), in place.
    void (*rotate)(const View& x, int64_t block, int64_t r0, int64_t r1);
    // Channels [c0, c1) of the tokens [row0, row0 + n_tokens) of one sequence; state: of that sequence.
    void (*conv)(const ConvOp& op, float* state, int64_t row0, int64_t n_tokens, int64_t c0, int64_t c1);
    // Value dims [d0, d1) of one head of one sequence; state: of that head.
    void (*delta)(const DeltaOp& op, float* state, int64_t row0, int64_t n_tokens, int64_t head, int64_t d0,
                  int64_t d1);
    // Head dims [d0, d1) of one head of one sequence; state: of that head.
    void (*mamba2)(const Mamba2Op& op, float* state, int64_t row0, int64_t n_tokens, int64_t head, int64_t d0,
                   int64_t d1);
    // Channels [c0, c1) of one sequence; state: of that sequence.
    void (*mamba1)(const Mamba1Op& op, float* state, int64_t row0, int64_t n_tokens, int64_t c0, int64_t c1);
};

}  // namespace hybridkv

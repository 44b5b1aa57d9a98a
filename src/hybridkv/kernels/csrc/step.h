// What one instruction set does with the operations of a step outside of attention and products with weights; each has its
// record and its kernels in a header of ops/. step_program.cpp runs operations in order.
//
// A buffer holds one row per token: row `sequence * n_tokens + token`. All values are float32.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "ops/add.h"
#include "ops/conv.h"
#include "ops/copy.h"
#include "ops/delta.h"
#include "ops/gate.h"
#include "ops/mamba1.h"
#include "ops/mamba2.h"
#include "ops/norm.h"
#include "ops/rope.h"
#include "ops/rotate.h"
#include "ops/view.h"
#include "ops/weigh.h"

namespace hybridkv {

// Attention of one layer for one new token per sequence: k and v are stored, q attends. Where the rows lie comes with
// each run: `call` counts the operations of this kind.
struct AttendOp {
    View q, k, v, dst;
    float scale;
    int64_t call;
};

struct StepKernels {
    // Rows [r0, r1). Widths need not be multiples of anything. States are of one sequence, or of one head of it.
    void (*norm)(const NormOp& op, int64_t r0, int64_t r1);
    void (*gate)(const GateOp& op, int64_t r0, int64_t r1);
    void (*rope)(const RopeOp& op, const float* cos, const float* sin, int64_t n_angles, int64_t r0, int64_t r1);
    void (*decay)(const DecayOp& op, int64_t r0, int64_t r1);
    void (*weigh)(const WeighOp& op, int64_t r0, int64_t r1);
    void (*add)(const AddOp& op, int64_t r0, int64_t r1);
    void (*bias)(const BiasOp& op, int64_t r0, int64_t r1);
    void (*rotate)(const View& x, int64_t block, int64_t r0, int64_t r1);
    void (*conv)(const ConvOp& op, float* state, int64_t row0, int64_t n_tokens, int64_t c0, int64_t c1);
    void (*delta)(const DeltaOp& op, float* state, int64_t row0, int64_t n_tokens, int64_t head, int64_t d0,
                  int64_t d1);
    void (*mamba2)(const Mamba2Op& op, float* state, int64_t row0, int64_t n_tokens, int64_t head, int64_t d0,
                   int64_t d1);
    void (*mamba1)(const Mamba1Op& op, float* state, int64_t row0, int64_t n_tokens, int64_t c0, int64_t c1);
};

}  // namespace hybridkv

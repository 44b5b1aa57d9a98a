// A mixture of gated experts: rows are sent to the experts that their scores choose, and each expert's weights are read
// once for all of its rows.
#pragma once

#include <cstdint>

#include "linear/weight.h"
#include "step.h"

namespace hybridkv {

struct Isa;

// One matrix per expert, `stride` bytes apart.
struct Stack {
    Matrix first;
    int64_t count, stride;

    Matrix at(int64_t expert) const {
        Matrix m = first;
        m.data += expert * stride;
        return m;
    }
};

// dst += sum over a row's experts e of weight_e * down_e(silu(gate_e x) * up_e x). The `n_used` largest scores choose
// the experts; their weights are shares of the softmax over all scores, or over the chosen ones if `normalised`.
struct ExpertsOp {
    View x, scores, dst;  // one group
    Stack gate, up, down;
    int64_t n_used;
    bool normalised;
};

void run_experts(const ExpertsOp& op, const Isa& isa, int64_t n_rows, int n_threads);

}  // namespace hybridkv

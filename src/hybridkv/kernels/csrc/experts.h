// A mixture of experts: rows are sent to the experts that their scores choose, and each expert's weights are read
// once for all of its rows.
#pragma once

#include <cstdint>
#include <vector>

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

// Which experts a row is sent to, and how each is weighed.
//
// Softmax: the `n_used` largest scores choose; weights are shares of the softmax over all scores, or over the chosen ones
// if normalised. Sigmoid: the largest of sigmoid(score) + bias choose, in the `n_used_groups` groups whose two best are
// largest together; weights are the sigmoids, divided by their sum + eps if normalised. Either times `scale`.
struct Routing {
    bool sigmoid;
    std::vector<float> bias;  // per expert, or empty
    int64_t n_used, n_groups, n_used_groups;
    bool normalised;
    float eps, scale;
};

// dst = sum over a row's experts e of weight_e * down_e(act(gate_e x) * up_e x), added to what is there if `add`. Experts
// without a gate: act(up_e x) * up_e x, which is squared ReLU with Gate::relu.
struct ExpertsOp {
    View x, scores, dst;  // one group
    Stack gate, up, down;
    bool has_gate;
    Gate act;
    Routing routing;
    bool add;
};

void run_experts(const ExpertsOp& op, const Isa& isa, Activations wished, int64_t n_rows, int n_threads);

}  // namespace hybridkv

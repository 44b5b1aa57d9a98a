// A step's operations in order, over buffers of its caller. Addresses of states come with each run and are never kept:
// a program that remembered them would one day run a sequence on another's state.
#pragma once

#include <variant>
#include <vector>

#include "attention.h"
#include "experts.h"
#include "step.h"

namespace hybridkv {

// dst = W x for weights that share their input, added to what is there if `add`.
struct LinearOp {
    struct Target {
        Matrix weight;
        float* dst;
        int64_t dst_stride;
        bool add;
    };
    View x;  // one group
    std::vector<Target> targets;
};

using Op = std::variant<LinearOp, ExpertsOp, NormOp, GateOp, AddOp, BiasOp, CopyOp, RopeOp, ConvOp, DecayOp, WeighOp,
                        DeltaOp, Mamba2Op, Mamba1Op, AttendOp>;

enum class Health : int8_t { finite, bad_output, bad_input };

// One layer's cache in a run, of all sequences or of one.
struct AttendCall {
    std::vector<Segment> segments;  // what the new token attends: its own row is the last of the last
    int64_t window;                 // 0: none
    bool refit_k, refit_v;
    int64_t block_k, block_v;       // of the rotation; 0: none
    Health health;                  // of the output, set by the run
};

// Cosines and sines: [token, or sequence if separate][half of the rotated dims].
struct Angles {
    const float *cos, *sin;
};

// What changes from run to run: rows are sequences times tokens.
//
// Sequences share one cache, or are `separate`: each has a cache, a length and a position of its own, and one token. What
// comes by layer comes by layer and sequence then, and every sequence gets the bits that it gets in a run of its own.
struct StepRun {
    const Isa& isa;
    int64_t n_seqs, n_tokens;
    bool separate;
    std::vector<Angles> angles;  // by the tables that RopeOps name
    std::vector<float*> states;  // by the operations' indices: of all sequences together, or of each if separate
    std::vector<AttendCall>& calls;
    int n_threads;

    // A state of one sequence, of `floats` values.
    float* state(int64_t index, int64_t seq, int64_t floats) const {
        return separate ? states[static_cast<size_t>(index * n_seqs + seq)]
                        : states[static_cast<size_t>(index)] + seq * floats;
    }
};

// Seconds of each operation are added to `seconds`, one per operation, unless it is null.
void run_step(const std::vector<Op>& ops, size_t begin, size_t end, const StepRun& run, double* seconds);

// The name of an operation's kind.
const char* kind_of(const Op& op);

}  // namespace hybridkv

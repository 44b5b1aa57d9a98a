// A step's operations in order, over buffers of its caller. Addresses of states come with each run and are never kept:
// a program that remembered them would one day run a sequence on another's state.
#pragma once

#include <variant>
#include <vector>

#include "attention.h"
#include "experts.h"
#include "journal.h"
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

// The tokens of one sequence in a run: rows [row0, row0 + n_tokens).
struct Span {
    int64_t row0, n_tokens;
};

// What changes from run to run. Every token is a row.
//
// Sequences share one cache and have as many tokens each, or are `separate`: each has a cache, a length and a position of
// its own, and a number of tokens of its own. What comes by layer comes by layer and row then, and every row gets the
// bits that it gets in a run of its own.
struct StepRun {
    const Isa& isa;
    bool separate;
    int64_t n_tokens;  // of each sequence; 1 if separate, where `spans` says
    std::vector<Span> spans;  // by sequence
    int64_t n_rows;
    std::vector<Angles> angles;  // by the tables that RopeOps name
    std::vector<float*> states;  // by the operations' indices: of all sequences together, or of each if separate
    std::vector<float*> before;  // where a state lies before the run, if elsewhere than after it; as `states`, or empty
    std::vector<AttendCall>& calls;  // by layer, and by row if separate
    Journal* journal;  // keeps what is needed to advance `before` by fewer tokens; or null
    Activations activations;  // that products with quantized weights wish for
    int n_threads;

    // A state of one sequence, of `floats` values.
    float* state(int64_t index, int64_t seq, int64_t floats) const { return of(states, index, seq, floats); }
    const float* state_before(int64_t index, int64_t seq, int64_t floats) const {
        return before.empty() ? nullptr : of(before, index, seq, floats);
    }

private:
    float* of(const std::vector<float*>& all, int64_t index, int64_t seq, int64_t floats) const {
        return separate ? all[static_cast<size_t>(index) * spans.size() + static_cast<size_t>(seq)]
                        : all[static_cast<size_t>(index)] + seq * floats;
    }
};

// Seconds of each operation are added to `seconds`, one per operation, unless it is null.
void run_step(const std::vector<Op>& ops, size_t begin, size_t end, const StepRun& run, double* seconds);

// Advances the run's states, in place, by the tokens of its spans, whose rows are those that the journal has kept.
void replay_states(const Journal& journal, const StepRun& run);

// The name of an operation's kind.
const char* kind_of(const Op& op);

}  // namespace hybridkv

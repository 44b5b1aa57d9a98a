#include "step_program.h"

#include <algorithm>

#include "pack.h"
#include "pool.h"

namespace hybridkv {
namespace {

constexpr int64_t kTaskValues = 16 << 10;    // of elementwise work
constexpr int64_t kConvChannels = 256;       // of one sequence in a task
constexpr int64_t kDeltaDims = 64;           // value dims of one head in a task

// Calls rows(r0, r1) over all rows, on several threads where there is enough to do.
template <class Rows>
void by_rows(int64_t n_rows, int64_t values_per_row, int n_threads, const Rows& rows) {
    const int64_t per_task = std::max<int64_t>(1, kTaskValues / std::max<int64_t>(1, values_per_row));
    if (n_rows <= per_task) return rows(0, n_rows);
    parallel_for((n_rows + per_task - 1) / per_task, n_threads,
                 [&](int64_t i, int) { rows(i * per_task, std::min(n_rows, (i + 1) * per_task)); });
}

class Runner {
public:
    explicit Runner(const StepRun& run) : run_(run), step_(*run.isa.step), rows_(run.n_seqs * run.n_tokens) {}

    void operator()(const NormOp& op) const {
        by_rows(rows_, op.x.groups * op.x.width, run_.n_threads, [&](int64_t a, int64_t b) { step_.norm(op, a, b); });
    }
    void operator()(const GateOp& op) const {
        by_rows(rows_, op.x.groups * op.x.width * 4, run_.n_threads,
                [&](int64_t a, int64_t b) { step_.gate(op, a, b); });
    }
    void operator()(const RopeOp& op) const {
        by_rows(rows_, op.x.groups * op.n_rotated, run_.n_threads,
                [&](int64_t a, int64_t b) { step_.rope(op, run_.cos, run_.sin, run_.n_tokens, a, b); });
    }
    void operator()(const DecayOp& op) const {
        by_rows(rows_, op.a.width * 32, run_.n_threads, [&](int64_t a, int64_t b) { step_.decay(op, a, b); });
    }

    void operator()(const ConvOp& op) const {
        const int64_t channels = op.x.width, parts = (channels + kConvChannels - 1) / kConvChannels;
        const auto part = [&](int64_t i) {
            const int64_t seq = i / parts, c0 = i % parts * kConvChannels;
            float* state = run_.states[static_cast<size_t>(op.state)] + seq * op.kernel * channels;
            step_.conv(op, state, seq * run_.n_tokens, run_.n_tokens, c0, std::min(channels, c0 + kConvChannels));
        };
        const int threads = rows_ * channels * op.kernel < kTaskValues ? 1 : run_.n_threads;
        parallel_for(run_.n_seqs * parts, threads, [&](int64_t i, int) { part(i); });
    }

    void operator()(const DeltaOp& op) const {
        const int64_t heads = op.v.groups, dims = op.v.width, parts = (dims + kDeltaDims - 1) / kDeltaDims;
        parallel_for(run_.n_seqs * heads * parts, run_.n_threads, [&](int64_t i, int) {
            const int64_t seq = i / parts / heads, head = i / parts % heads, d0 = i % parts * kDeltaDims;
            float* state = run_.states[static_cast<size_t>(op.state)] + (seq * heads + head) * op.head_floats();
            step_.delta(op, state, seq * run_.n_tokens, run_.n_tokens, head, d0, std::min(dims, d0 + kDeltaDims));
        });
    }

    void operator()(const LinearOp& op) const {
        const Code code = op.targets[0].weight.code;
        const int64_t n_in = op.x.width;
        char* prepared = static_cast<char*>(call_memory(step_.prepared_bytes(code, n_in, rows_)));
        by_rows(rows_, n_in, run_.n_threads, [&](int64_t a, int64_t b) {
            step_.prepare(code, op.x.data, op.x.row_stride, n_in, rows_, a, b, prepared);
        });
        struct Part {
            const LinearOp::Target* target;
            int64_t panel0, panel1;
        };
        std::vector<Part> parts;
        for (const LinearOp::Target& t : op.targets) {
            const int64_t n = t.weight.n_panels(), step = panels_per_task(t.weight, rows_, run_.n_threads);
            for (int64_t p = 0; p < n; p += step) parts.push_back({&t, p, std::min(n, p + step)});
        }
        const size_t scratch = step_.linear_scratch_bytes(code, n_in, rows_);
        parallel_for(static_cast<int64_t>(parts.size()), run_.n_threads, [&](int64_t i, int) {
            const Part& part = parts[static_cast<size_t>(i)];
            const LinearOp::Target& t = *part.target;
            step_.linear(t.weight, prepared, rows_, part.panel0, part.panel1, t.dst, t.dst_stride, t.add,
                         thread_scratch(scratch));
        });
    }

private:
    const StepRun& run_;
    const StepKernels& step_;
    const int64_t rows_;
};

}  // namespace

void run_step(const std::vector<Op>& ops, size_t begin, size_t end, const StepRun& run) {
    const Runner runner(run);
    for (size_t i = begin; i < end; ++i) std::visit(runner, ops[i]);
}

}  // namespace hybridkv

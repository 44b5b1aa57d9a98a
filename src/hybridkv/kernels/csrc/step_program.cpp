#include "step_program.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "finite.h"
#include "pool.h"
#include "schedule.h"

namespace hybridkv {
namespace {

constexpr int64_t kTaskValues = 16 << 10;    // of elementwise work
constexpr int64_t kConvChannels = 256;       // of one sequence in a task
// Values of a state, times the tokens that it takes: as many are done sooner than another thread has its share of them.
constexpr int64_t kStateValues = 1 << 15;
constexpr int64_t kDeltaDims = 64;           // value dims of one head in a task, where there are few heads
constexpr int64_t kMamba2Dims = 64;          // head dims of one head in a task, where there are few heads
constexpr int64_t kHeadsPerThread = 4;       // from so many on, a task is a head
constexpr int64_t kMamba1Channels = 128;     // of one sequence in a task

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
    explicit Runner(const StepRun& run) : run_(run), step_(*run.isa.step), rows_(run.n_rows) {}

    size_t index = 0;  // of the operation that runs

    void operator()(const NormOp& op) const {
        by_rows(rows_, op.x.groups * op.x.width, run_.n_threads, [&](int64_t a, int64_t b) { step_.norm(op, a, b); });
    }
    void operator()(const GateOp& op) const {
        by_rows(rows_, op.x.groups * op.x.width * 4, run_.n_threads,
                [&](int64_t a, int64_t b) { step_.gate(op, a, b); });
    }
    void operator()(const RopeOp& op) const {
        const Angles& angles = run_.angles.at(static_cast<size_t>(op.table));
        const int64_t n_angles = run_.separate ? rows_ : run_.n_tokens;
        by_rows(rows_, op.x.groups * op.n_rotated, run_.n_threads,
                [&](int64_t a, int64_t b) { step_.rope(op, angles.cos, angles.sin, n_angles, a, b); });
    }
    void operator()(const DecayOp& op) const {
        by_rows(rows_, op.decay.width * 32, run_.n_threads, [&](int64_t a, int64_t b) { step_.decay(op, a, b); });
    }
    void operator()(const WeighOp& op) const {
        by_rows(rows_, op.x.width, run_.n_threads, [&](int64_t a, int64_t b) { step_.weigh(op, a, b); });
    }

    void operator()(const AddOp& op) const {
        by_rows(rows_, op.x.width, run_.n_threads, [&](int64_t a, int64_t b) { step_.add(op, a, b); });
    }
    void operator()(const BiasOp& op) const {
        by_rows(rows_, op.dst.width, run_.n_threads, [&](int64_t a, int64_t b) { step_.bias(op, a, b); });
    }
    void operator()(const CopyOp& op) const {
        by_rows(rows_, op.x.width, run_.n_threads, [&](int64_t a, int64_t b) { copy_rows(op, a, b); });
    }

    void operator()(const ConvOp& op) const {
        keep(op);
        const int64_t channels = op.x.width, parts = (channels + kConvChannels - 1) / kConvChannels;
        const int threads = rows_ * channels * op.kernel < kTaskValues ? 1 : run_.n_threads;
        parallel_for(n_seqs() * parts, threads, [&](int64_t i, int) {
            const int64_t seq = i / parts, c0 = i % parts * kConvChannels, c1 = std::min(channels, c0 + kConvChannels);
            const int64_t floats = op.kernel * channels;
            float* state = run_.state(op.state, seq, floats);
            bring(state, run_.state_before(op.state, seq, floats), op.kernel, channels, c0, c1);
            step_.conv(op, state, span(seq).row0, span(seq).n_tokens, c0, c1);
        });
    }

    void operator()(const DeltaOp& op) const {
        keep(op);
        by_heads(op, op.v, op.k.width, kDeltaDims, step_.delta);
    }

    void operator()(const Mamba2Op& op) const {
        keep(op);
        by_heads(op, op.x, op.b.width, kMamba2Dims, step_.mamba2);
    }

    void operator()(const Mamba1Op& op) const {
        keep(op);
        const int64_t channels = op.x.width, parts = (channels + kMamba1Channels - 1) / kMamba1Channels;
        parallel_for(n_seqs() * parts, run_.n_threads, [&](int64_t i, int) {
            const int64_t seq = i / parts, c0 = i % parts * kMamba1Channels;
            const int64_t c1 = std::min(channels, c0 + kMamba1Channels), floats = channels * op.b.width;
            float* state = run_.state(op.state, seq, floats);
            bring(state, run_.state_before(op.state, seq, floats), 1, floats, c0 * op.b.width, c1 * op.b.width);
            step_.mamba1(op, state, span(seq).row0, span(seq).n_tokens, c0, c1);
        });
    }

    void operator()(const AttendOp& op) const {
        const int64_t n_calls = run_.separate ? rows_ : 1, share = rows_ / n_calls;
        AttendCall* calls = run_.calls.data() + op.call * n_calls;
        std::vector<AttendParams> attended;
        for (int64_t i = 0; i < n_calls; ++i) attended.push_back(store_new(op, calls[i], i * share, share));
        run_attention(run_.isa, attended, tokens_of_caches(), run_.n_threads);
        for (int64_t i = 0; i < n_calls; ++i) {
            const int64_t r0 = i * share, r1 = r0 + share;
            if (calls[i].block_v) step_.rotate(op.dst, calls[i].block_v, r0, r1);
            if (finite(op.dst, r0, r1)) continue;
            const bool fine = finite(op.q, r0, r1) && finite(op.k, r0, r1) && finite(op.v, r0, r1);
            calls[i].health = fine ? Health::bad_output : Health::bad_input;
        }
    }

    void operator()(const LinearOp& op) const {
        const LinearKernels& kernels = *run_.isa.linear;
        const int64_t n_in = op.x.width;
        // x in the forms that the targets take.
        size_t starts[kOperands] = {}, total = 0;
        bool takes[kOperands] = {};
        for (const LinearOp::Target& t : op.targets) {
            const Operand operand = kernels.operand(*t.weight.type, rows_, run_.activations);
            const size_t form = static_cast<size_t>(operand);
            if (takes[form]) continue;
            takes[form] = true;
            starts[form] = total;
            total += (kernels.prepared_bytes(operand, n_in, rows_) + 63) / 64 * 64;
        }
        char* prepared = static_cast<char*>(call_memory(total));
        by_rows(rows_, n_in, run_.n_threads, [&](int64_t a, int64_t b) {
            for (const Operand form : {Operand::ints, Operand::pairs, Operand::bytes, Operand::floats, Operand::int8}) {
                if (!takes[static_cast<size_t>(form)]) continue;
                kernels.prepare(form, op.x.data, op.x.row_stride, n_in, a, b, prepared + starts[static_cast<size_t>(form)]);
            }
        });
        struct Part {
            const LinearOp::Target* target;
            int64_t row0, row1;
        };
        int64_t left = 0;
        for (const LinearOp::Target& t : op.targets) left += t.weight.n_out * t.weight.row_bytes;
        std::vector<Part> parts;
        for (const LinearOp::Target& t : op.targets) {
            cut_rows(t.weight, left, run_.n_threads, [&](int64_t r0, int64_t r1) { parts.push_back({&t, r0, r1}); });
        }
        parallel_for(static_cast<int64_t>(parts.size()), run_.n_threads, [&](int64_t i, int) {
            const Part& part = parts[static_cast<size_t>(i)];
            const LinearOp::Target& t = *part.target;
            const Operand operand = kernels.operand(*t.weight.type, rows_, run_.activations);
            kernels.linear(t.weight, operand, prepared + starts[static_cast<size_t>(operand)], nullptr, rows_,
                           part.row0, part.row1, t.dst, t.dst_stride, t.add,
                           thread_scratch(kernels.scratch_bytes(*t.weight.type, operand, rows_)));
        });
    }

    void operator()(const ExpertsOp& op) const { run_experts(op, run_.isa, run_.activations, rows_, run_.n_threads); }

private:
    int64_t n_seqs() const { return static_cast<int64_t>(run_.spans.size()); }
    const Span& span(int64_t seq) const { return run_.spans[static_cast<size_t>(seq)]; }

    // How many calls of an attention are of one cache.
    std::vector<int64_t> tokens_of_caches() const {
        if (!run_.separate) return {1};
        std::vector<int64_t> found;
        for (const Span& own : run_.spans) found.push_back(own.n_tokens);
        return found;
    }

    template <class Op>
    void keep(const Op& op) const {
        if (run_.journal) run_.journal->keep(index, op, rows_);
    }

    // Columns [c0, c1) of a state [rows][stride] from where it was before the run, if that is elsewhere. The kernel reads
    // them next, out of the processor's cache.
    static void bring(float* state, const float* before, int64_t rows, int64_t stride, int64_t c0, int64_t c1) {
        if (!before || before == state) return;
        for (int64_t at = c0; at < rows * stride; at += stride) {
            std::memcpy(state + at, before + at, static_cast<size_t>(c1 - c0) * sizeof(float));
        }
    }

    // Runs a state space over `state_rows` rows of each head of every sequence, so many columns in a task.
    template <class Op, class Kernel>
    void by_heads(const Op& op, const View& columns, int64_t state_rows, int64_t task_columns, Kernel kernel) const {
        const int64_t heads = columns.groups, dims = columns.width, head_floats = op.head_floats();
        const int threads = rows_ * heads * head_floats <= kStateValues ? 1 : run_.n_threads;
        // A whole head's state is read in one piece, which memory gives twice as fast as every other half of its rows.
        if (n_seqs() * heads >= kHeadsPerThread * threads) task_columns = dims;
        const int64_t parts = (dims + task_columns - 1) / task_columns;
        parallel_for_at_home(n_seqs() * heads * parts, threads, [&](int64_t i, int) {
            const int64_t seq = i / parts / heads, head = i / parts % heads, d0 = i % parts * task_columns;
            const int64_t d1 = std::min(dims, d0 + task_columns), offset = head * head_floats;
            float* state = run_.state(op.state, seq, heads * head_floats) + offset;
            const float* before = run_.state_before(op.state, seq, heads * head_floats);
            bring(state, before ? before + offset : nullptr, state_rows, dims, d0, d1);
            kernel(op, state, span(seq).row0, span(seq).n_tokens, head, d0, d1);
        });
    }

    // Stores the new rows [r0, r0 + n_rows) of one cache; how they are attended.
    AttendParams store_new(const AttendOp& op, const AttendCall& call, int64_t r0, int64_t n_rows) const {
        if (call.block_k) {
            step_.rotate(op.q, call.block_k, r0, r0 + n_rows);
            step_.rotate(op.k, call.block_k, r0, r0 + n_rows);
        }
        if (call.block_v) step_.rotate(op.v, call.block_v, r0, r0 + n_rows);
        const Segment& newest = call.segments.back();
        const int64_t row = newest.end - 1 + newest.shift;
        if (newest.center) subtract(op.k, newest.center, r0, n_rows);
        store(op.k, newest.k, row, call.refit_k, r0, n_rows);
        store(op.v, newest.v, row, call.refit_v, r0, n_rows);
        AttendParams a{};
        a.q = op.q.at(r0, 0);
        a.q_stride_b = op.q.row_stride;
        a.q_stride_h = op.q.group_stride;
        a.segments = call.segments;
        a.n_batch = n_rows;
        a.n_heads = op.q.groups;
        a.n_kv_heads = op.k.groups;
        a.n_tokens = 1;
        a.scale = op.scale;
        a.window = call.window;
        a.causal = true;
        a.out = op.dst.at(r0, 0);
        return a;
    }

    // y: [row][group][width]
    void subtract(const View& x, const float* y, int64_t r0, int64_t n_rows) const {
        for (int64_t r = r0; r < r0 + n_rows; ++r) {
            for (int64_t g = 0; g < x.groups; ++g, y += x.width) {
                for (int64_t i = 0; i < x.width; ++i) x.at(r, g)[i] -= y[i];
            }
        }
    }

    void store(const View& x, const Stored& to, int64_t row, bool refit, int64_t r0, int64_t n_rows) const {
        EncodeParams e{};
        e.x = x.at(r0, 0);
        e.x_type = BitLayout::f32;
        e.x_stride_b = x.row_stride;
        e.x_stride_h = x.group_stride;
        e.format = to.format;
        e.head_dim = to.head_dim;
        e.cap = to.cap;
        e.start = row;
        e.n_kv_heads = x.groups;
        e.n_tokens = 1;
        e.refit = refit;
        for (int i = 0; i < to.format->n_planes; ++i) e.planes[i] = const_cast<uint8_t*>(to.planes[i]);
        run_encode(run_.isa, e, n_rows * x.groups, run_.n_threads);
    }

    bool finite(const View& x, int64_t r0, int64_t r1) const {
        bool found = true;
        for (int64_t r = r0; r < r1; ++r) {
            for (int64_t g = 0; g < x.groups; ++g) found = all_finite(x.at(r, g), x.width) && found;
        }
        return found;
    }

    const StepRun& run_;
    const StepKernels& step_;
    const int64_t rows_;
};

}  // namespace

void run_step(const std::vector<Op>& ops, size_t begin, size_t end, const StepRun& run, double* seconds) {
    using Clock = std::chrono::steady_clock;
    Runner runner(run);
    expect_steps();
    for (size_t i = begin; i < end; ++i) {
        runner.index = i;
        const Clock::time_point start = seconds ? Clock::now() : Clock::time_point{};
        std::visit(runner, ops[i]);
        if (seconds) seconds[i] += std::chrono::duration<double>(Clock::now() - start).count();
    }
}

void replay_states(const Journal& journal, const StepRun& run) {
    const Runner runner(run);
    journal.each(runner);
}

const char* kind_of(const Op& op) {
    struct Names {
        const char* operator()(const LinearOp&) const { return "product"; }
        const char* operator()(const ExpertsOp&) const { return "experts"; }
        const char* operator()(const NormOp&) const { return "norm"; }
        const char* operator()(const GateOp&) const { return "gate"; }
        const char* operator()(const AddOp&) const { return "sum"; }
        const char* operator()(const BiasOp&) const { return "bias"; }
        const char* operator()(const CopyOp&) const { return "copy"; }
        const char* operator()(const RopeOp&) const { return "rope"; }
        const char* operator()(const ConvOp&) const { return "convolution"; }
        const char* operator()(const DecayOp&) const { return "decay"; }
        const char* operator()(const WeighOp&) const { return "weighed sum"; }
        const char* operator()(const DeltaOp&) const { return "delta rule"; }
        const char* operator()(const Mamba2Op&) const { return "Mamba-2"; }
        const char* operator()(const Mamba1Op&) const { return "Mamba-1"; }
        const char* operator()(const AttendOp&) const { return "attention"; }
    };
    return std::visit(Names{}, op);
}

}  // namespace hybridkv

// The step program as a Python class: addresses and strides in. hybridkv/kernels/step.py checks them and keeps the
// memory alive.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "module.h"
#include "step_program.h"

namespace nb = nanobind;

namespace hybridkv {
namespace {

// data, row stride, group stride, groups, width
using Columns = std::tuple<Address, int64_t, int64_t, int64_t, int64_t>;
// type, n_out, n_in, rows
using WeightRows = std::tuple<std::string, int64_t, int64_t, Address>;
// weight, destination, its row stride, whether to add
using Target = std::tuple<WeightRows, Address, int64_t, bool>;
// of the first matrix, how many there are, and how many bytes they lie apart
using Matrices = std::tuple<WeightRows, int64_t, int64_t>;
using Values = std::vector<float>;
// whether by sigmoids, bias, experts used, groups, groups used, whether normalised, eps, scale
using Choice = std::tuple<bool, Values, int64_t, int64_t, int64_t, bool, float, float>;
// of K or V: head dim, whether to refit, rotation block
using Store = std::tuple<int64_t, bool, int64_t>;
// segments, K, V, window
using Call = std::tuple<std::vector<SegmentRows>, Store, Store, int64_t>;

AttendCall attend_call(const Call& c) {
    const auto& [rows, k, v, window] = c;
    const auto& [head_dim_k, refit_k, block_k] = k;
    const auto& [head_dim_v, refit_v, block_v] = v;
    return {segments_of(rows, head_dim_k, head_dim_v), window, refit_k, refit_v, block_k, block_v, Health::finite};
}

// A call as it was before its newest `n` rows came; of a window, with the rows that were in it then.
Call without_newest(const Call& call, int64_t n) {
    Call c = call;
    std::vector<SegmentRows>& rows = std::get<0>(c);
    std::get<3>(rows.back()) -= n;
    int64_t total = 0;
    for (const SegmentRows& r : rows) total += std::get<3>(r);
    const int64_t window = std::get<3>(c);
    for (int64_t old = window ? total - window : 0; old > 0;) {
        auto& [k, v, start, length, center] = rows.front();
        const int64_t gone = std::min(old, length);
        start += gone;
        length -= gone;
        old -= gone;
        if (!length) rows.erase(rows.begin());
    }
    return c;
}

std::vector<float*> pointers(const std::vector<Address>& addresses) {
    std::vector<float*> found;
    for (const Address address : addresses) found.push_back(reinterpret_cast<float*>(address));
    return found;
}

Matrix matrix(const WeightRows& w) {
    const auto& [type, n_out, n_in, data] = w;
    const WeightType& t = weight_type(type.c_str());
    return {&t, n_out, n_in, t.row_bytes(n_in), reinterpret_cast<const uint8_t*>(data)};
}

Stack stack(const Matrices& m) { return {matrix(std::get<0>(m)), std::get<1>(m), std::get<2>(m)}; }

View view(const Columns& c) {
    return {reinterpret_cast<float*>(std::get<0>(c)), std::get<1>(c), std::get<2>(c), std::get<3>(c), std::get<4>(c)};
}

Routing routing(const Choice& c) {
    const auto& [sigmoid, bias, n_used, n_groups, n_used_groups, normalised, eps, scale] = c;
    return {sigmoid, bias, n_used, n_groups, n_used_groups, normalised, eps, scale};
}

Gate gate_named(const std::string& kind) {
    constexpr std::pair<const char*, Gate> kGates[] = {{"sigmoid", Gate::sigmoid}, {"silu", Gate::silu},
                                                       {"product", Gate::product}, {"gelu", Gate::gelu},
                                                       {"gelu_erf", Gate::gelu_erf}, {"relu", Gate::relu}};
    for (const auto& [name, gate] : kGates) {
        if (kind == name) return gate;
    }
    throw std::invalid_argument("no gate " + kind);
}

class Program {
public:
    explicit Program(bool int8) : activations_(int8 ? Activations::int8 : Activations::int16) {}
    Program(const Program&) = delete;
    Program& operator=(const Program&) = delete;

    void linear(const Columns& x, const std::vector<Target>& targets) {
        LinearOp op{view(x), {}};
        for (const auto& [weight, dst, stride, add] : targets) {
            op.targets.push_back({matrix(weight), reinterpret_cast<float*>(dst), stride, add});
        }
        ops_.emplace_back(std::move(op));
    }
    // gate: none or one
    void experts(const Columns& x, const Columns& scores, const Columns& dst, const std::vector<Matrices>& gate,
                 const Matrices& up, const Matrices& down, const std::string& act, const Choice& choice, bool add) {
        ops_.emplace_back(ExpertsOp{view(x), view(scores), view(dst), stack(gate.empty() ? up : gate[0]), stack(up),
                                    stack(down), !gate.empty(), gate_named(act), routing(choice),
                                    add});
    }
    void norm(const Columns& x, const Columns& dst, const Values& weight, float factor, float eps) {
        ops_.emplace_back(NormOp{view(x), view(dst), weight, factor, eps});
    }
    void gate(const Columns& x, const Columns& g, const Columns& dst, const std::string& kind) {
        ops_.emplace_back(GateOp{view(x), view(g), view(dst), gate_named(kind)});
    }
    void add(const Columns& x, const Columns& dst, float factor) {
        ops_.emplace_back(AddOp{view(x), view(dst), factor});
    }
    void copy(const Columns& x, const Columns& dst) { ops_.emplace_back(CopyOp{view(x), view(dst)}); }
    void bias(const Columns& dst, const Values& bias) { ops_.emplace_back(BiasOp{view(dst), bias}); }
    void rope(const Columns& x, int64_t n_rotated, bool neighbours, int64_t table) {
        ops_.emplace_back(RopeOp{view(x), n_rotated, neighbours, table});
    }
    void conv(const Columns& x, const Columns& dst, const Values& weight, const Values& bias, int64_t kernel,
              int64_t state, bool silu) {
        ops_.emplace_back(ConvOp{view(x), view(dst), weight, bias, kernel, state, silu});
    }
    void decay(const Columns& a, const Columns& b, const Columns& decay, const Columns& beta, const Values& rate,
               const Values& bias, float scale) {
        ops_.emplace_back(DecayOp{view(a), view(b), view(decay), view(beta), rate, bias, scale});
    }
    void delta(const Columns& q, const Columns& k, const Columns& v, const Columns& decay, const Columns& beta,
               const Columns& dst, int64_t state, bool tiled) {
        ops_.emplace_back(DeltaOp{view(q), view(k), view(v), view(decay), view(beta), view(dst), state, tiled});
    }
    void mamba2(const Columns& x, const Columns& b, const Columns& c, const Columns& dt, const Columns& dst,
                const Values& rate, const Values& bias, const Values& skip, int64_t state) {
        ops_.emplace_back(Mamba2Op{view(x), view(dst), view(b), view(c), view(dt), rate, bias, skip, state});
    }
    void mamba1(const Columns& x, const Columns& b, const Columns& c, const Columns& dt, const Columns& dst,
                const Values& rate, const Values& bias, const Values& skip, int64_t state) {
        ops_.emplace_back(Mamba1Op{view(x), view(dt), view(dst), view(b), view(c), rate, bias, skip, state});
    }
    void weigh(const Columns& x, const Columns& g, const Columns& dst) {
        ops_.emplace_back(WeighOp{view(x), view(g), view(dst)});
    }

    void attend(const Columns& q, const Columns& k, const Columns& v, const Columns& dst, float scale, int64_t call) {
        ops_.emplace_back(AttendOp{view(q), view(k), view(v), view(dst), scale, call});
    }

    size_t size() const { return ops_.size(); }

    // Starts timing every operation; what was timed before is forgotten.
    void start_timing() { seconds_.assign(ops_.size(), 0.); }

    // Kind of each operation, and seconds since timing was started; no seconds if it never was.
    std::vector<std::tuple<std::string, double>> timing() const {
        std::vector<std::tuple<std::string, double>> found;
        for (size_t i = 0; i < seconds_.size(); ++i) found.emplace_back(kind_of(ops_[i]), seconds_[i]);
        return found;
    }

    // The health of each call's output, as Health counts. Sequences of separate caches come with the tokens of each; with
    // the states before the run, what the states' operations read is kept for `replay`.
    std::vector<int> run(const std::string& isa, size_t begin, size_t end, int64_t n_seqs, int64_t n_tokens,
                         const std::vector<int64_t>& separate, const std::vector<std::tuple<Address, Address>>& angles,
                         const std::vector<Address>& states, const std::vector<Address>& before,
                         const std::vector<Call>& calls, int n_threads) {
        if (begin > end || end > ops_.size()) throw std::out_of_range("operations of a step");
        std::vector<Span> spans;
        int64_t n_rows = 0;
        for (int64_t i = 0; i < n_seqs; ++i) {
            spans.push_back({n_rows, separate.empty() ? n_tokens : separate.at(static_cast<size_t>(i))});
            n_rows += spans.back().n_tokens;
        }
        std::vector<AttendCall> attended;
        for (size_t i = 0; i < calls.size(); ++i) {
            const int64_t rows = separate.empty() ? 1 : spans[i % spans.size()].n_tokens;
            for (int64_t row = 0; row < rows; ++row) attended.push_back(attend_call(without_newest(calls[i], rows - 1 - row)));
        }
        Journal* journal = before.empty() ? nullptr : &journal_;
        StepRun run{isa_named(isa), !separate.empty(), separate.empty() ? n_tokens : 1, std::move(spans), n_rows, {},
                    pointers(states), pointers(before), attended, journal, activations_, n_threads};
        for (const auto& [cos, sin] : angles) {
            run.angles.push_back({reinterpret_cast<const float*>(cos), reinterpret_cast<const float*>(sin)});
        }
        {
            nb::gil_scoped_release unlocked;
            run_step(ops_, begin, end, run, seconds_.empty() ? nullptr : seconds_.data());
        }
        std::vector<int> health;
        for (const AttendCall& call : attended) health.push_back(static_cast<int>(call.health));
        return health;
    }

    // Advances states of separate caches by the first tokens of the last run that had states before it: by cache, its
    // first row there and how many tokens.
    void replay(const std::string& isa, const std::vector<std::tuple<int64_t, int64_t>>& taken,
                const std::vector<Address>& states, int n_threads) const {
        std::vector<Span> spans;
        int64_t n_rows = 0;
        for (const auto& [row0, n_tokens] : taken) {
            spans.push_back({row0, n_tokens});
            n_rows += n_tokens;
        }
        std::vector<AttendCall> none;
        const StepRun run{isa_named(isa), true, 1, std::move(spans), n_rows, {}, pointers(states), {}, none, nullptr, activations_, n_threads};
        nb::gil_scoped_release unlocked;
        replay_states(journal_, run);
    }

private:
    friend class HeldStep;

    // Runs all operations.
    void run_all(const StepRun& run) { run_step(ops_, 0, ops_.size(), run, seconds_.empty() ? nullptr : seconds_.data()); }

    Activations activations_;
    std::vector<Op> ops_;
    Journal journal_;
    std::vector<double> seconds_;  // while operations are timed
};

// One token of the same sequences after another, from embedding to logits, in one call each: nothing but lengths and
// positions changes from call to call. Of one sequence also several tokens, of which `keep` says how many stay.
// hybridkv/kernels/held.py checks what it is given, and that it still holds.
class HeldStep {
public:
    // angles: of the first token, and how many there are of each; next: memory beside the states, for `draft`, or empty;
    // calls: as they were before the first token
    HeldStep(Program& layers, Program& head, const WeightRows& embedding, float embed_scale, Address x, Address head_x,
             Address logits, int64_t n_vocab, const std::string& isa, int64_t n_seqs,
             const std::vector<std::tuple<Address, Address, int64_t>>& angles, const std::vector<Address>& states,
             const std::vector<Address>& next, const std::vector<Call>& calls, int n_threads)
        : layers_(layers), head_(head), embedding_(matrix(embedding)), embed_scale_(embed_scale),
          x_(reinterpret_cast<float*>(x)), head_x_(reinterpret_cast<float*>(head_x)),
          logits_(reinterpret_cast<const float*>(logits)), n_vocab_(n_vocab), calls_(attend_calls(calls)),
          run_{isa_named(isa), false, 1, spans(n_seqs), n_seqs, {}, pointers(states), {}, calls_, nullptr, layers.activations_, n_threads},
          head_run_{run_.isa, false, 1, spans(n_seqs), n_seqs, {}, {}, {}, none_, nullptr, head.activations_, n_threads},
          draft_{run_.isa, true, 1, {{0, 1}}, 1, {}, pointers(next), {}, drafted_, &layers.journal_, layers.activations_, n_threads},
          head_draft_{run_.isa, true, 1, {}, 1, {}, {}, {}, none_, nullptr, head.activations_, n_threads} {
        for (const auto& [cos, sin, n] : angles) {
            run_.angles.push_back({reinterpret_cast<const float*>(cos), reinterpret_cast<const float*>(sin)});
            n_angles_.push_back(n);
        }
    }
    HeldStep(const HeldStep&) = delete;
    HeldStep& operator=(const HeldStep&) = delete;

    // Runs a token of each sequence and writes its logits to `out`; the health of each layer's attention.
    std::vector<int> step(const std::vector<int64_t>& tokens, Address out) {
        if (tokens.size() != run_.spans.size()) throw std::invalid_argument("tokens of a step");
        {
            nb::gil_scoped_release unlocked;
            for (AttendCall& call : calls_) {
                ++call.segments.back().end;
                call.health = Health::finite;
            }
            run(tokens, run_, head_run_, out);
            turn(1);
        }
        return health_of(calls_);
    }

    // Runs tokens of the one sequence, each as if it came alone, and writes their logits to `out`; the health by layer and
    // token. States go on in `next`; `keep` follows.
    std::vector<int> draft(const std::vector<int64_t>& tokens, Address out) {
        if (run_.n_rows != 1 || draft_.states.size() != run_.states.size()) throw std::invalid_argument("tokens of a step");
        {
            nb::gil_scoped_release unlocked;
            const auto n = static_cast<int64_t>(tokens.size());
            draft_.spans = {{0, n}};
            head_draft_.spans = spans(n);
            draft_.n_rows = head_draft_.n_rows = n;
            draft_.angles = run_.angles;
            draft_.before = run_.states;
            drafted_.clear();
            for (const AttendCall& call : calls_) {
                for (int64_t i = 1; i <= n; ++i) {
                    drafted_.push_back(call);
                    drafted_.back().segments.back().end += i;
                    drafted_.back().health = Health::finite;
                }
            }
            run(tokens, draft_, head_draft_, out);
        }
        return health_of(drafted_);
    }

    // Goes on behind the first tokens of the last `draft`.
    void keep(int64_t n_tokens) {
        if (n_tokens < 1 || n_tokens > draft_.n_rows) throw std::out_of_range("tokens of a step");
        nb::gil_scoped_release unlocked;
        for (AttendCall& call : calls_) call.segments.back().end += n_tokens;
        turn(n_tokens);
        if (n_tokens == draft_.n_rows) {
            std::swap(run_.states, draft_.states);
            return;
        }
        const StepRun again{run_.isa, true, 1, {{0, n_tokens}}, n_tokens, {}, run_.states, {}, none_, nullptr, run_.activations, run_.n_threads};
        replay_states(layers_.journal_, again);
    }

private:
    // Runs everything over some tokens and writes their logits to `out`.
    void run(const std::vector<int64_t>& tokens, const StepRun& layers, const StepRun& head, Address out) {
        embed(tokens);
        layers_.run_all(layers);
        std::memcpy(head_x_, x_, tokens.size() * static_cast<size_t>(embedding_.n_in) * sizeof(float));
        head_.run_all(head);
        std::memcpy(reinterpret_cast<float*>(out), logits_, tokens.size() * static_cast<size_t>(n_vocab_) * sizeof(float));
    }
    // Goes on to the angles behind `n_tokens`.
    void turn(int64_t n_tokens) {
        for (size_t i = 0; i < n_angles_.size(); ++i) {
            run_.angles[i].cos += n_tokens * n_angles_[i];
            run_.angles[i].sin += n_tokens * n_angles_[i];
        }
    }
    static std::vector<int> health_of(const std::vector<AttendCall>& calls) {
        std::vector<int> health;
        for (const AttendCall& call : calls) health.push_back(static_cast<int>(call.health));
        return health;
    }
    static std::vector<AttendCall> attend_calls(const std::vector<Call>& calls) {
        std::vector<AttendCall> found;
        for (const Call& call : calls) found.push_back(attend_call(call));
        return found;
    }
    static std::vector<Span> spans(int64_t n_seqs) {
        std::vector<Span> found;
        for (int64_t i = 0; i < n_seqs; ++i) found.push_back({i, 1});
        return found;
    }
    void embed(const std::vector<int64_t>& tokens) const {
        const int64_t width = embedding_.n_in;
        for (size_t i = 0; i < tokens.size(); ++i) {
            float* row = x_ + static_cast<int64_t>(i) * width;
            embedding_.type->decode(embedding_.data + tokens[i] * embedding_.row_bytes, width, row);
            if (embed_scale_ == 1) continue;
            for (int64_t c = 0; c < width; ++c) row[c] *= embed_scale_;
        }
    }

    Program& layers_;
    Program& head_;
    Matrix embedding_;
    float embed_scale_;
    float *x_, *head_x_;
    const float* logits_;
    int64_t n_vocab_;
    std::vector<AttendCall> calls_, none_, drafted_;
    std::vector<int64_t> n_angles_;
    StepRun run_, head_run_, draft_, head_draft_;
};

}  // namespace

void bind_step(nb::module_& m) {
    nb::class_<Program>(m, "Program")
        .def(nb::init<bool>())
        .def("linear", &Program::linear)
        .def("experts", &Program::experts)
        .def("norm", &Program::norm)
        .def("gate", &Program::gate)
        .def("add", &Program::add)
        .def("bias", &Program::bias)
        .def("copy", &Program::copy)
        .def("rope", &Program::rope)
        .def("conv", &Program::conv)
        .def("decay", &Program::decay)
        .def("weigh", &Program::weigh)
        .def("delta", &Program::delta)
        .def("mamba2", &Program::mamba2)
        .def("mamba1", &Program::mamba1)
        .def("attend", &Program::attend)
        .def("run", &Program::run)
        .def("replay", &Program::replay)
        .def("start_timing", &Program::start_timing)
        .def("timing", &Program::timing)
        .def("__len__", &Program::size);
    nb::class_<HeldStep>(m, "HeldStep")
        .def(nb::init<Program&, Program&, const WeightRows&, float, Address, Address, Address, int64_t, const std::string&,
                      int64_t, const std::vector<std::tuple<Address, Address, int64_t>>&, const std::vector<Address>&,
                      const std::vector<Address>&, const std::vector<Call>&, int>(),
             nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>())
        .def("step", &HeldStep::step)
        .def("draft", &HeldStep::draft)
        .def("keep", &HeldStep::keep);
}

}  // namespace hybridkv

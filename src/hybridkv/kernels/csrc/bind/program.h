// A step program as a Python class: addresses and strides in. hybridkv/kernels/step.py checks them and keeps the memory
// alive.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "../module.h"
#include "../step_program.h"

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

}  // namespace
}  // namespace hybridkv

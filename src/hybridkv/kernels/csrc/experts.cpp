#include "experts.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <vector>

#include "attention.h"
#include "pool.h"

namespace hybridkv {
namespace {

constexpr int64_t kRowsPerTask = 8;  // of routing, activations and sums

// The k experts of largest values, in falling order.
void largest(const float* values, int64_t n, int64_t k, int32_t* experts) {
    int64_t held = 0;
    for (int64_t e = 0; e < n; ++e) {
        if (held == k && values[e] <= values[experts[k - 1]]) continue;
        int64_t at = held < k ? held++ : k - 1;
        for (; at > 0 && values[experts[at - 1]] < values[e]; --at) experts[at] = experts[at - 1];
        experts[at] = static_cast<int32_t>(e);
    }
}

// Rules out the experts of groups whose two best are not among the `n_used_groups` largest together.
void keep_best_groups(const Routing& how, float* values, int64_t n) {
    const int64_t size = n / how.n_groups;
    std::vector<float> sums(static_cast<size_t>(how.n_groups));
    std::vector<int32_t> best(static_cast<size_t>(how.n_used_groups));
    for (int64_t g = 0; g < how.n_groups; ++g) {
        float first = -std::numeric_limits<float>::infinity(), second = first;
        for (int64_t e = g * size; e < (g + 1) * size; ++e) {
            second = std::max(second, std::min(first, values[e]));
            first = std::max(first, values[e]);
        }
        sums[static_cast<size_t>(g)] = first + second;
    }
    largest(sums.data(), how.n_groups, how.n_used_groups, best.data());
    for (int64_t e = 0; e < n; ++e) {
        if (std::find(best.begin(), best.end(), static_cast<int32_t>(e / size)) == best.end()) {
            values[e] = -std::numeric_limits<float>::infinity();
        }
    }
}

// Of the chosen experts, from all experts' scores.
void softmax_weights(const Routing& how, const float* scores, int64_t n, const int32_t* experts, float* weights) {
    const float most = *std::max_element(scores, scores + n);
    float sum = 0.f;
    for (int64_t j = 0; j < how.n_used; ++j) weights[j] = std::exp(scores[experts[j]] - most);
    if (how.normalised) {
        for (int64_t j = 0; j < how.n_used; ++j) sum += weights[j];
    } else {
        for (int64_t e = 0; e < n; ++e) sum += std::exp(scores[e] - most);
    }
    for (int64_t j = 0; j < how.n_used; ++j) weights[j] *= how.scale / sum;
}

void sigmoid_weights(const Routing& how, const float* shares, const int32_t* experts, float* weights) {
    float sum = how.eps;
    for (int64_t j = 0; j < how.n_used; ++j) sum += weights[j] = shares[experts[j]];
    for (int64_t j = 0; j < how.n_used; ++j) weights[j] *= how.normalised ? how.scale / sum : how.scale;
}

// A row's choice: experts in falling order, and their weights.
void choose(const ExpertsOp& op, int64_t row, int32_t* experts, float* weights) {
    const Routing& how = op.routing;
    const float* scores = op.scores.at(row, 0);
    const int64_t n = op.scores.width, k = how.n_used;
    if (!std::all_of(scores, scores + n, [](float s) { return std::isfinite(s); })) {
        // No choice can be right: the row's result is to show it.
        for (int64_t j = 0; j < k; ++j) experts[j] = static_cast<int32_t>(j);
        std::fill(weights, weights + k, std::numeric_limits<float>::quiet_NaN());
        return;
    }
    if (!how.sigmoid) {
        largest(scores, n, k, experts);
        return softmax_weights(how, scores, n, experts, weights);
    }
    static thread_local std::vector<float> shares, values;
    shares.resize(static_cast<size_t>(n));
    for (int64_t e = 0; e < n; ++e) shares[static_cast<size_t>(e)] = 1.f / (1.f + std::exp(-scores[e]));
    values = shares;
    for (size_t e = 0; e < how.bias.size(); ++e) values[e] += how.bias[e];
    if (how.n_groups > 1) keep_best_groups(how, values.data(), n);
    largest(values.data(), n, k, experts);
    sigmoid_weights(how, shares.data(), experts, weights);
}

// The rows of all experts, those of one expert side by side: place p holds row rows[p].
struct Routes {
    std::vector<int32_t> experts;     // [row][n_used]
    std::vector<float> weights;       // [row][n_used]
    std::vector<int32_t> places;      // [row][n_used]
    std::vector<int32_t> rows;        // [place]
    std::vector<int64_t> starts;      // [expert + 1]

    void sort(int64_t n_experts, int64_t n_used) {
        starts.assign(static_cast<size_t>(n_experts) + 1, 0);
        for (const int32_t e : experts) ++starts[static_cast<size_t>(e) + 1];
        for (size_t e = 1; e < starts.size(); ++e) starts[e] += starts[e - 1];
        std::vector<int64_t> next(starts.begin(), starts.end() - 1);
        places.resize(experts.size());
        rows.resize(experts.size());
        for (size_t i = 0; i < experts.size(); ++i) {
            const int64_t place = next[static_cast<size_t>(experts[i])]++;
            places[i] = static_cast<int32_t>(place);
            rows[static_cast<size_t>(place)] = static_cast<int32_t>(static_cast<int64_t>(i) / n_used);
        }
    }
};

struct Part {
    const Stack* stack;
    int64_t expert, row0, row1;  // output rows
};

// Output rows of every expert that has rows, in tasks.
std::vector<Part> parts_of(std::initializer_list<const Stack*> stacks, const Routes& routes, int n_threads) {
    const auto has_rows = [&](int64_t e) {
        return routes.starts[static_cast<size_t>(e) + 1] > routes.starts[static_cast<size_t>(e)];
    };
    int64_t left = 0;
    for (const Stack* stack : stacks) {
        for (int64_t e = 0; e < stack->count; ++e) left += has_rows(e) * stack->first.n_out * stack->first.row_bytes;
    }
    std::vector<Part> parts;
    for (const Stack* stack : stacks) {
        for (int64_t e = 0; e < stack->count; ++e) {
            if (!has_rows(e)) continue;
            cut_rows(stack->first, left, n_threads,
                     [&](int64_t r0, int64_t r1) { parts.push_back({stack, e, r0, r1}); });
        }
    }
    return parts;
}

template <class Work>
void by_rows(int64_t n, int n_threads, const Work& work) {
    parallel_for((n + kRowsPerTask - 1) / kRowsPerTask, n_threads, [&](int64_t i, int) {
        work(i * kRowsPerTask, std::min(n, (i + 1) * kRowsPerTask));
    });
}

// Memory of one call, 64-byte aligned parts of it in turn.
class Memory {
public:
    size_t add(size_t bytes) {
        const size_t at = total_;
        total_ += (bytes + 63) / 64 * 64;
        return at;
    }
    void allocate() { base_ = static_cast<char*>(call_memory(total_)); }
    template <class T>
    T* at(size_t offset) const {
        return reinterpret_cast<T*>(base_ + offset);
    }

private:
    size_t total_ = 0;
    char* base_ = nullptr;
};

}  // namespace

void run_experts(const ExpertsOp& op, const Isa& isa, Activations wished, int64_t n_rows, int n_threads) {
    const LinearKernels& kernels = *isa.linear;
    const int64_t width = op.up.first.n_out, hidden = op.down.first.n_out, k = op.routing.n_used, n_places = n_rows * k;
    const auto operand_of = [&](const Stack& stack) { return kernels.operand(*stack.first.type, n_rows, wished); };
    const Operand for_up = operand_of(op.up), for_gate = op.has_gate ? operand_of(op.gate) : for_up;
    const Operand for_down = operand_of(op.down);
    const int64_t n_in = op.up.first.n_in;

    static thread_local Routes routes;
    routes.experts.resize(static_cast<size_t>(n_places));
    routes.weights.resize(static_cast<size_t>(n_places));
    Routes& chosen = routes;
    by_rows(n_rows, n_rows < 8 ? 1 : n_threads, [&](int64_t a, int64_t b) {
        for (int64_t r = a; r < b; ++r) choose(op, r, chosen.experts.data() + r * k, chosen.weights.data() + r * k);
    });
    chosen.sort(op.up.count, k);

    Memory memory;
    const size_t gate_form = memory.add(kernels.prepared_bytes(for_gate, n_in, n_rows));
    const size_t up_form = for_up == for_gate ? gate_form : memory.add(kernels.prepared_bytes(for_up, n_in, n_rows));
    const size_t ups = memory.add(static_cast<size_t>(n_places * width) * 4);
    const size_t gates = op.has_gate ? memory.add(static_cast<size_t>(n_places * width) * 4) : ups;
    const size_t down_form = memory.add(kernels.prepared_bytes(for_down, width, n_places));
    const size_t results = memory.add(static_cast<size_t>(n_places * hidden) * 4);
    memory.allocate();
    float *gate = memory.at<float>(gates), *up = memory.at<float>(ups), *result = memory.at<float>(results);

    by_rows(n_rows, n_threads, [&](int64_t a, int64_t b) {
        kernels.prepare(for_gate, op.x.data, op.x.row_stride, n_in, a, b, memory.at<char>(gate_form));
        if (up_form == gate_form) return;
        kernels.prepare(for_up, op.x.data, op.x.row_stride, n_in, a, b, memory.at<char>(up_form));
    });
    const auto multiply = [&](const Part& part, Operand operand, const char* x, const int32_t* x_rows, float* y) {
        const int64_t p0 = chosen.starts[static_cast<size_t>(part.expert)];
        const int64_t n = chosen.starts[static_cast<size_t>(part.expert) + 1] - p0;
        const Matrix w = part.stack->at(part.expert);
        void* scratch = thread_scratch(kernels.scratch_bytes(*w.type, operand, n));
        const size_t row = kernels.prepared_bytes(operand, w.n_in, 1);
        const char* from = x_rows ? x : x + static_cast<size_t>(p0) * row;
        kernels.linear(w, operand, from, x_rows ? x_rows + p0 : nullptr, n, part.row0, part.row1, y + p0 * w.n_out, w.n_out, false,
                       scratch);
    };
    const std::vector<Part> parts =
        op.has_gate ? parts_of({&op.gate, &op.up}, chosen, n_threads) : parts_of({&op.up}, chosen, n_threads);
    parallel_for(static_cast<int64_t>(parts.size()), n_threads, [&](int64_t i, int) {
        const Part& part = parts[static_cast<size_t>(i)];
        if (part.stack == &op.gate) multiply(part, for_gate, memory.at<char>(gate_form), chosen.rows.data(), gate);
        else multiply(part, for_up, memory.at<char>(up_form), chosen.rows.data(), up);
    });
    by_rows(n_places, n_threads, [&](int64_t a, int64_t b) {
        const int64_t stride = width, n = b - a;
        const View g{gate + a * stride, stride, 0, 1, width}, u{up + a * stride, stride, 0, 1, width};
        isa.step->gate(GateOp{u, g, u, op.act}, 0, n);
        kernels.prepare(for_down, up, stride, width, a, b, memory.at<char>(down_form));
    });
    const std::vector<Part> last = parts_of({&op.down}, chosen, n_threads);
    parallel_for(static_cast<int64_t>(last.size()), n_threads, [&](int64_t i, int) {
        multiply(last[static_cast<size_t>(i)], for_down, memory.at<char>(down_form), nullptr, result);
    });
    by_rows(n_rows, n_threads, [&](int64_t a, int64_t b) {
        for (int64_t r = a; r < b; ++r) {
            float* dst = op.dst.at(r, 0);
            if (!op.add) std::fill(dst, dst + hidden, 0.f);
            for (int64_t j = 0; j < k; ++j) {  // in the row's own order: its bits do not depend on other rows
                const size_t at = static_cast<size_t>(r * k + j);
                const float weight = chosen.weights[at], *y = result + chosen.places[at] * hidden;
                for (int64_t i = 0; i < hidden; ++i) dst[i] += weight * y[i];
            }
        }
    });
}

}  // namespace hybridkv

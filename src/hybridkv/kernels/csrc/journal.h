// What a recurrent operation read in a run, kept so that its state can be advanced again by fewer tokens.
//
// A run over drafted tokens leaves the states after all of them. Where only some are accepted, the state from before the
// run takes those again: the same kernel on the same inputs, so the same bits. The rows of a run are few and short beside
// a state, which would otherwise have to be copied after every token.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <variant>
#include <vector>

#include "step.h"

namespace hybridkv {

using StateOp = std::variant<ConvOp, DeltaOp, Mamba2Op, Mamba1Op>;

class Journal {
public:
    // Keeps the inputs of operation `index`, rows [0, n_rows) of its buffers.
    template <class Op>
    void keep(size_t index, const Op& op, int64_t n_rows) {
        if (entries_.size() <= index) entries_.resize(index + 1);
        Entry& entry = entries_[index];
        if (entry.n_rows < n_rows || !entry.op) entry = room_for(op, n_rows);
        const Op& kept = std::get<Op>(*entry.op);
        for (const auto input : inputs(op)) copy(op.*input, kept.*input, n_rows);
    }

    // Calls run(op) for every operation that was kept, on what was kept.
    template <class Run>
    void each(const Run& run) const {
        for (const Entry& entry : entries_) {
            if (entry.op) std::visit(run, *entry.op);
        }
    }

private:
    struct Entry {
        int64_t n_rows = 0;
        std::vector<float> memory;
        std::unique_ptr<StateOp> op;  // reads the memory, and writes its output where the operation itself does
    };

    template <class Op>
    using Inputs = std::vector<View Op::*>;

    static Inputs<ConvOp> inputs(const ConvOp&) { return {&ConvOp::x}; }
    static Inputs<DeltaOp> inputs(const DeltaOp&) {
        return {&DeltaOp::q, &DeltaOp::k, &DeltaOp::v, &DeltaOp::decay, &DeltaOp::beta};
    }
    static Inputs<Mamba2Op> inputs(const Mamba2Op&) {
        return {&Mamba2Op::x, &Mamba2Op::b, &Mamba2Op::c, &Mamba2Op::dt};
    }
    static Inputs<Mamba1Op> inputs(const Mamba1Op&) {
        return {&Mamba1Op::x, &Mamba1Op::b, &Mamba1Op::c, &Mamba1Op::dt};
    }

    template <class Op>
    static Entry room_for(const Op& op, int64_t n_rows) {
        Entry entry;
        entry.n_rows = n_rows;
        entry.op = std::make_unique<StateOp>(op);
        int64_t total = 0;
        for (const auto input : inputs(op)) total += n_rows * (op.*input).groups * (op.*input).width;
        entry.memory.resize(static_cast<size_t>(total));
        float* at = entry.memory.data();
        for (const auto input : inputs(op)) {
            View& v = std::get<Op>(*entry.op).*input;
            v = {at, v.groups * v.width, v.width, v.groups, v.width};
            at += n_rows * v.row_stride;
        }
        return entry;
    }

    static void copy(const View& from, const View& to, int64_t n_rows) {
        for (int64_t r = 0; r < n_rows; ++r) {
            for (int64_t g = 0; g < from.groups; ++g) {
                std::memcpy(to.at(r, g), from.at(r, g), static_cast<size_t>(from.width) * sizeof(float));
            }
        }
    }

    std::vector<Entry> entries_;  // by the operations' indices
};

}  // namespace hybridkv

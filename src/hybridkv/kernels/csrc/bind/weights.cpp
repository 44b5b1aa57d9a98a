// Binds products with ggml weight rows, for tests, benches and embeddings; a model's step calls LinearKernels directly.
// kernels/weights.py checks shapes, dtypes and bounds.
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <memory>
#include <new>
#include <tuple>
#include <utility>
#include <vector>

#include "linear/weight.h"
#include "module.h"
#include "pool.h"

namespace nb = nanobind;

namespace hybridkv {
namespace {

constexpr int64_t kRowsPerTask = 16;

Matrix matrix(const std::string& type, int64_t n_out, int64_t n_in, Address data) {
    const WeightType& t = weight_type(type.c_str());
    return {&t, n_out, n_in, t.row_bytes(n_in), reinterpret_cast<const uint8_t*>(data)};
}

template <class Work>
void by_rows(int64_t n, int n_threads, const Work& work) {
    parallel_for((n + kRowsPerTask - 1) / kRowsPerTask, n_threads,
                 [&](int64_t i, int) { work(i * kRowsPerTask, std::min(n, (i + 1) * kRowsPerTask)); });
}

struct Free {
    void operator()(void* memory) const { ::operator delete(memory, std::align_val_t{64}); }
};

// x_rows: address of n_rows int32, or 0; n_x: rows of x
void weight_linear(const std::string& isa, const std::string& type, int64_t n_out, int64_t n_in, Address data, Address x,
                   int64_t x_stride, int64_t n_x, Address x_rows, int64_t n_rows, Address y, int64_t y_stride, bool add,
                   bool int8, int n_threads) {
    const LinearKernels& kernels = *isa_named(isa).linear;
    const Matrix w = matrix(type, n_out, n_in, data);
    const Operand operand = kernels.operand(*w.type, n_rows, int8 ? Activations::int8 : Activations::int16);
    nb::gil_scoped_release unlocked;
    const std::unique_ptr<void, Free> prepared(
        ::operator new(kernels.prepared_bytes(operand, n_in, n_x), std::align_val_t{64}));
    by_rows(n_x, n_threads, [&](int64_t a, int64_t b) {
        kernels.prepare(operand, reinterpret_cast<const float*>(x), x_stride, n_in, a, b, prepared.get());
    });
    std::vector<std::pair<int64_t, int64_t>> parts;
    int64_t left = n_out * w.row_bytes;
    cut_rows(w, left, n_threads, [&](int64_t r0, int64_t r1) { parts.emplace_back(r0, r1); });
    const size_t scratch = kernels.scratch_bytes(*w.type, operand, n_rows);
    parallel_for(static_cast<int64_t>(parts.size()), n_threads, [&](int64_t i, int) {
        const auto [r0, r1] = parts[static_cast<size_t>(i)];
        kernels.linear(w, operand, prepared.get(), reinterpret_cast<const int32_t*>(x_rows), n_rows, r0, r1,
                       reinterpret_cast<float*>(y), y_stride, add, thread_scratch(scratch));
    });
}

void weight_rows(const std::string& type, int64_t n_out, int64_t n_in, Address data, Address ids, int64_t n_ids,
                 Address out, int n_threads) {
    const Matrix w = matrix(type, n_out, n_in, data);
    const int64_t* rows = reinterpret_cast<const int64_t*>(ids);
    nb::gil_scoped_release unlocked;
    by_rows(n_ids, n_threads, [&](int64_t a, int64_t b) {
        for (int64_t i = a; i < b; ++i) {
            w.type->decode(w.data + rows[i] * w.row_bytes, n_in, reinterpret_cast<float*>(out) + i * n_in);
        }
    });
}

// Row and block of the first scale that is no number; (-1, -1) if there is none.
std::tuple<int64_t, int64_t> weight_bad_block(const std::string& type, int64_t n_out, int64_t n_in, Address data,
                                              int n_threads) {
    const Matrix w = matrix(type, n_out, n_in, data);
    nb::gil_scoped_release unlocked;
    std::vector<int64_t> found(static_cast<size_t>((n_out + kRowsPerTask - 1) / kRowsPerTask), -1);
    const int64_t blocks = n_in / w.type->block;
    by_rows(n_out, n_threads, [&](int64_t a, int64_t b) {
        // Rows lie side by side: their blocks are one run.
        found[static_cast<size_t>(a / kRowsPerTask)] = w.type->find_bad(w.data + a * w.row_bytes, (b - a) * blocks);
    });
    for (size_t i = 0; i < found.size(); ++i) {
        const int64_t at = found[i];
        if (at >= 0) return {static_cast<int64_t>(i) * kRowsPerTask + at / blocks, at % blocks};
    }
    return {-1, -1};
}

}  // namespace

void bind_weights(nb::module_& m) {
    m.def("set_grid", [](const std::string& type, Address bytes, size_t size) {
        set_grid(type.c_str(), reinterpret_cast<const void*>(bytes), size);
    });
    m.def("weight_linear", &weight_linear);
    m.def("weight_takes_int8", [](const std::string& isa, const std::string& type) {
        return isa_named(isa).linear->operand(weight_type(type.c_str()), 1, Activations::int8) == Operand::int8;
    });
    m.def("weight_rows", &weight_rows);
    m.def("weight_bad_block", &weight_bad_block);
}

}  // namespace hybridkv

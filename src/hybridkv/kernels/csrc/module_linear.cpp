// Binds linear layers by themselves, for tests, benches and the embedding; a model's step calls StepKernels directly.
// kernels/linear.py checks shapes, dtypes and bounds.
#include <nanobind/stl/string.h>

#include <algorithm>
#include <memory>
#include <new>

#include "module.h"
#include "pack.h"
#include "pool.h"

namespace nb = nanobind;

namespace hybridkv {
namespace {

constexpr int64_t kRowsPerTask = 16;

int64_t packed_bytes(const std::string& type, int64_t n_out, int64_t n_in) {
    const Weight w{format_named(type).code, n_out, n_in, nullptr};
    return w.n_panels() * panel_bytes(w.code, n_in);
}

void unpack_rows(const std::string& type, int64_t n_out, int64_t n_in, Address data, Address ids, int64_t n_ids,
                 Address out, int n_threads) {
    const Weight w{format_named(type).code, n_out, n_in, reinterpret_cast<const uint8_t*>(data)};
    const int64_t* rows = reinterpret_cast<const int64_t*>(ids);
    nb::gil_scoped_release unlocked;
    parallel_for((n_ids + kRowsPerTask - 1) / kRowsPerTask, n_threads, [&](int64_t task, int) {
        for (int64_t i = task * kRowsPerTask; i < std::min(n_ids, (task + 1) * kRowsPerTask); ++i) {
            unpack_row(w, rows[i], reinterpret_cast<float*>(out) + i * n_in);
        }
    });
}

// Rows that a type holds as they are: found[row] says so, and their planes are written. Rows lie side by side.
void exact_rows(const std::string& type, Address x, int64_t n_rows, int64_t n_in, Address d, Address codes,
                Address found, int n_threads) {
    const Code code = format_named(type).code;
    const int64_t blocks = n_in / 32, row_bytes = n_in / codes_per_byte(code);
    const float* rows = reinterpret_cast<const float*>(x);
    uint16_t* scales = reinterpret_cast<uint16_t*>(d);
    uint8_t* bytes = reinterpret_cast<uint8_t*>(codes);
    uint8_t* exact = reinterpret_cast<uint8_t*>(found);
    nb::gil_scoped_release unlocked;
    parallel_for((n_rows + kRowsPerTask - 1) / kRowsPerTask, n_threads, [&](int64_t task, int) {
        for (int64_t r = task * kRowsPerTask; r < std::min(n_rows, (task + 1) * kRowsPerTask); ++r) {
            exact[r] = exact_codes(code, rows + r * n_in, n_in, scales + r * blocks, bytes + r * row_bytes);
        }
    });
}

struct Free {
    void operator()(void* memory) const { ::operator delete(memory, std::align_val_t{64}); }
};

void linear(const std::string& isa, const std::string& type, int64_t n_out, int64_t n_in, Address data, Address x,
            int64_t x_stride, int64_t n_rows, bool each_alone, Address y, int64_t y_stride, bool add, int n_threads) {
    const RowCount rows{n_rows, each_alone};
    const StepKernels& kernels = *isa_named(isa).step;
    const Weight w{format_named(type).code, n_out, n_in, reinterpret_cast<const uint8_t*>(data)};
    nb::gil_scoped_release unlocked;
    const std::unique_ptr<void, Free> prepared(
        ::operator new(kernels.prepared_bytes(w.code, n_in, rows), std::align_val_t{64}));
    parallel_for((n_rows + kRowsPerTask - 1) / kRowsPerTask, n_threads, [&](int64_t task, int) {
        kernels.prepare(w.code, reinterpret_cast<const float*>(x), x_stride, n_in, rows, task * kRowsPerTask,
                        std::min(n_rows, (task + 1) * kRowsPerTask), prepared.get());
    });
    const int64_t panels = panels_per_task(w, n_rows, n_threads);
    const size_t scratch = kernels.linear_scratch_bytes(w.code, n_in, rows);
    parallel_for((w.n_panels() + panels - 1) / panels, n_threads, [&](int64_t task, int) {
        kernels.linear(w, prepared.get(), rows, task * panels, std::min(w.n_panels(), (task + 1) * panels),
                       reinterpret_cast<float*>(y), y_stride, add, thread_scratch(scratch));
    });
}

}  // namespace

void bind_linear(nb::module_& m) {
    m.def("packed_bytes", &packed_bytes);
    m.def("unpack_rows", &unpack_rows);
    m.def("exact_rows", &exact_rows);
    m.def("linear", &linear);
}

}  // namespace hybridkv

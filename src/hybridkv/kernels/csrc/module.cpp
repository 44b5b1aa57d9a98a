// The extension module hybridkv._cpu: plain integers and addresses in, nothing of torch. cpu_native.py checks shapes,
// dtypes and bounds before it calls; nothing here is for users.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "finite.h"
#include "mapped.h"
#include "module.h"
#include "pool.h"
#include "processor.h"
#include "schedule.h"
#include "system.h"

namespace nb = nanobind;
using namespace hybridkv;

namespace {

using Planes = std::vector<Address>;

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (const Isa* isa : offered()) names.emplace_back(isa->name);
    return names;
}

std::vector<int64_t> plane_bytes(const std::string& type, int64_t head_dim) {
    const Format& f = format_named(type);
    std::vector<int64_t> bytes;
    for (int i = 0; i < f.n_planes; ++i) bytes.push_back(plane_row_bytes(f, i, head_dim));
    return bytes;
}

using Strides = std::tuple<int64_t, int64_t, int64_t>;

size_t attend(const std::string& isa, Address q, Strides q_strides, const std::vector<SegmentRows>& segments,
              int64_t head_dim_k, int64_t head_dim_v, int64_t n_batch, int64_t n_heads, int64_t n_kv_heads,
              int64_t n_tokens, float scale, float softcap, Address sinks, int64_t window, Address mask,
              Strides mask_strides, bool causal, Address out, int n_threads) {
    AttendParams a{};
    a.q = reinterpret_cast<const float*>(q);
    std::tie(a.q_stride_b, a.q_stride_h, a.q_stride_t) = q_strides;
    a.segments = segments_of(segments, head_dim_k, head_dim_v);
    a.n_batch = n_batch;
    a.n_heads = n_heads;
    a.n_kv_heads = n_kv_heads;
    a.n_tokens = n_tokens;
    a.scale = scale;
    a.softcap = softcap;
    a.sinks = reinterpret_cast<const float*>(sinks);
    a.window = window;
    a.mask = reinterpret_cast<const uint8_t*>(mask);
    std::tie(a.mask_stride_b, a.mask_stride_h, a.mask_stride_t) = mask_strides;
    a.causal = causal;
    a.out = reinterpret_cast<float*>(out);
    const Isa& record = isa_named(isa);
    nb::gil_scoped_release unlocked;
    run_attention(record, a, n_threads);
    return attention_scratch_bytes(record, a, n_threads);
}

void encode(const std::string& isa, Address x, const std::string& x_type, Strides x_strides,
            const std::string& type, bool refit, const Planes& planes, int64_t n_batch, int64_t n_kv_heads,
            int64_t n_tokens, int64_t head_dim, int64_t cap, int64_t start, int n_threads) {
    EncodeParams e{};
    e.x = reinterpret_cast<const void*>(x);
    e.x_type = format_named(x_type).layout;
    std::tie(e.x_stride_b, e.x_stride_h, e.x_stride_t) = x_strides;
    e.format = &format_named(type);
    e.head_dim = head_dim;
    e.cap = cap;
    e.start = start;
    e.n_kv_heads = n_kv_heads;
    e.n_tokens = n_tokens;
    e.refit = refit;
    if (planes.size() != static_cast<size_t>(e.format->n_planes)) throw std::invalid_argument("planes of " + type);
    for (size_t i = 0; i < planes.size(); ++i) e.planes[i] = reinterpret_cast<uint8_t*>(planes[i]);
    const Isa& record = isa_named(isa);
    nb::gil_scoped_release unlocked;
    run_encode(record, e, n_batch * n_kv_heads * n_tokens, n_threads);
}

bool is_finite(Address data, int64_t n) { return all_finite(reinterpret_cast<const float*>(data), n); }

// Best of many short bursts, in multiply-adds or bytes per second: kind is "float", "integer" or "read".
double probe(const std::string& isa, const std::string& kind, Address data, int64_t count, int n_threads) {
    const Isa& record = isa_named(isa);
    nb::gil_scoped_release unlocked;
    double best = 0.;
    for (int repeat = 0; repeat < (kind == "read" ? 12 : 60); ++repeat) {
        std::vector<double> done(static_cast<size_t>(n_threads));
        const auto begin = std::chrono::steady_clock::now();
        parallel_for(n_threads, n_threads, [&](int64_t i, int) {
            float sink[2] = {1e-3f, 1e-3f};
            const int64_t share = count / n_threads;
            const float* mine = reinterpret_cast<const float*>(data) + i * share;
            double& out = done[static_cast<size_t>(i)];
            if (kind == "read") out = record.probe_read(mine, share, sink);
            if (kind == "float") out = record.probe_float(count, sink);
            if (kind == "integer") out = record.probe_integer(count, sink);
        });
        const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
        double total = 0.;
        for (const double d : done) total += d;
        best = std::max(best, total / seconds);
    }
    return best;
}

}  // namespace

namespace hybridkv {

const Isa& isa_named(const std::string& name) {
    for (const Isa* isa : offered()) {
        if (name == isa->name) return *isa;
    }
    throw std::invalid_argument("this processor does not run " + name);
}

const Format& format_named(const std::string& name) {
    for (const Format& f : kFormats) {
        if (name == f.name) return f;
    }
    throw std::invalid_argument("no native kernel reads " + name);
}

namespace {

Stored stored(const SegmentSide& side, int64_t head_dim) {
    const auto& [type, planes, cap] = side;
    Stored s{&format_named(type), head_dim, cap, {}};
    if (planes.size() != static_cast<size_t>(s.format->n_planes)) throw std::invalid_argument("planes of " + type);
    for (size_t i = 0; i < planes.size(); ++i) s.planes[i] = reinterpret_cast<const uint8_t*>(planes[i]);
    return s;
}

}  // namespace

std::vector<Segment> segments_of(const std::vector<SegmentRows>& rows, int64_t head_dim_k, int64_t head_dim_v) {
    if (rows.empty()) throw std::invalid_argument("no rows to attend");
    std::vector<Segment> segments;
    int64_t begin = 0;
    for (const auto& [k, v, start, n_rows, center] : rows) {
        if (n_rows <= 0) throw std::invalid_argument("a segment without rows");
        segments.push_back({stored(k, head_dim_k), stored(v, head_dim_v), begin, begin + n_rows, start - begin,
                            reinterpret_cast<const float*>(center)});
        begin += n_rows;
    }
    return segments;
}

}  // namespace hybridkv

NB_MODULE(_cpu, m) {
    nb::set_leak_warnings(false);  // a step that lives until the interpreter's end is no leak
    std::vector<std::string> formats;
    for (const Format& f : kFormats) formats.emplace_back(f.name);
    m.attr("FORMATS") = nb::cast(formats);
    m.def("isas", &isas);
    m.def("plane_bytes", &plane_bytes);
    m.def("attend", &attend);
    m.def("encode", &encode);
    m.def("all_finite", &is_finite);
    m.def("advise_huge_pages", &advise_huge_pages);
    m.def("watch_map", &watch_map);
    m.def("forget_map", &forget_map);
    m.def("is_damaged", &is_damaged);
    m.def("lock_memory", &lock_memory);
    m.def("populate", &populate, nb::call_guard<nb::gil_scoped_release>());
    m.def("probe", &probe);
    bind_weights(m);
    bind_step(m);
}

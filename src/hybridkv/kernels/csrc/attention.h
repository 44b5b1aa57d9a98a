// The records that cross the border between the binding, the thread pool and the kernels of one ISA.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "formats.h"
#include "linear/weight.h"
#include "step.h"

namespace hybridkv {

// The packed cache of one tensor: per plane [B, Hkv, cap, row_bytes], contiguous.
struct Stored {
    const Format* format;
    int64_t head_dim;
    int64_t cap;
    const uint8_t* planes[kMaxPlanes];
};

// Consecutive rows of one format. Rows count over all segments of a call: row j of begin <= j < end lies at j + shift of
// this segment's planes.
struct Segment {
    Stored k, v;
    int64_t begin, end, shift;
    const float* center;  // [B, Hkv, D], subtracted from the rows of K when they were stored; or null

    int64_t n_rows() const { return end - begin; }
};

struct AttendParams {
    const float* q;  // [B, Hq, T, D]: strides in elements, D contiguous
    int64_t q_stride_b, q_stride_h, q_stride_t;
    std::vector<Segment> segments;  // at least one, none of them empty, each beginning where the one before ends
    int64_t n_batch, n_heads, n_kv_heads, n_tokens;
    float scale;
    float softcap;          // 0: none
    const float* sinks;     // [Hq] or null
    int64_t window;         // 0: none
    const uint8_t* mask;    // bool, j contiguous, or null
    int64_t mask_stride_b, mask_stride_h, mask_stride_t;
    bool causal;
    float* out;             // [B, Hq, T, Dv] contiguous

    int64_t group() const { return n_heads / n_kv_heads; }
    int64_t n_stored() const { return segments.back().end; }
    int64_t head_dim_k() const { return segments[0].k.head_dim; }
    int64_t head_dim_v() const { return segments[0].v.head_dim; }
};

// Query rows [r0, r1) of one KV head (row r is token r / group, head r % group of the group) over stored rows
// [j0, j1), of whatever segments. With `partial` set, the unnormalised result goes there: per row m, l, then Dv accumulators.
struct AttendTask {
    int64_t batch, kv_head, r0, r1, j0, j1;
    float* partial;
};

constexpr int kMaxRows = 64;  // query rows in a task

struct EncodeParams {
    const void* x;  // [B, Hkv, T, D]: strides in elements, D contiguous
    BitLayout x_type;  // f32, f16 or bf16
    int64_t x_stride_b, x_stride_h, x_stride_t;
    const Format* format;
    int64_t head_dim, cap, start;
    int64_t n_kv_heads, n_tokens;
    bool refit;
    uint8_t* planes[kMaxPlanes];
};

// What one instruction set offers.
struct Isa {
    const char* name;
    size_t (*scratch_bytes)(const AttendParams&);
    void (*attend)(const AttendParams&, const AttendTask&, void* scratch);
    // Consecutive single tokens of one cache: how many of them may share the reading of its rows and still get the bits
    // that each gets alone, the scratch for `count` of them, and the same task of all.
    int64_t (*tokens_together)(const AttendParams&);
    size_t (*scratch_together)(const AttendParams&, int64_t count);
    void (*attend_together)(const AttendParams* const* calls, const AttendTask* tasks, int64_t count, void* scratch);
    // rows [r0, r1) of the B * Hkv * T rows of x; scratch for two rows of padded float32
    void (*encode)(const EncodeParams&, int64_t r0, int64_t r1, void* scratch);
    // The ceilings of a benchmark: multiply-adds or bytes done in one call.
    double (*probe_float)(int64_t rounds, float* sink);
    double (*probe_integer)(int64_t rounds, float* sink);
    double (*probe_read)(const float* data, int64_t count, float* sink);
    const StepKernels* step;
    const LinearKernels* linear;
};

extern const LinearKernels kLinearPortable;
#if defined(HYBRIDKV_X86)
extern const LinearKernels kLinearAvx2;
extern const LinearKernels kLinearAvx2Vnni;
extern const LinearKernels kLinearAvx512;
#endif
#if defined(HYBRIDKV_ARM64)
extern const LinearKernels kLinearNeon;
extern const LinearKernels kLinearDotprod;
#endif

extern const Isa kIsaPortable;
#if defined(HYBRIDKV_X86)
extern const Isa kIsaAvx2;
extern const Isa kIsaAvx2Vnni;
extern const Isa kIsaAvx512;
#endif
#if defined(HYBRIDKV_ARM64)
extern const Isa kIsaNeon;
extern const Isa kIsaDotprod;
#endif
#if defined(HYBRIDKV_HAS_AMX)
extern const Isa kIsaAmx;
#endif

}  // namespace hybridkv

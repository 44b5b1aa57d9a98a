// The body of a translation unit of one instruction set: define HYBRIDKV_ISA_RECORD, HYBRIDKV_ISA_NAME and
// HYBRIDKV_ISA_LINEAR (a record of linear/), include a simd_*.h, then this. Everything but the record has internal
// linkage, so that no code of one instruction set can be merged with another's by the linker.
#pragma once

#include "attend.h"
#include "encode.h"
#include "probe.h"
#include "step.h"

namespace hybridkv {
extern const Isa HYBRIDKV_ISA_RECORD;
namespace {
const StepKernels kStep = {
    norm_rows<Simd>, gate_rows<Simd>,   rope_rows<Simd>,     decay_rows<Simd>, weigh_rows<Simd>,  add_rows<Simd>,
    bias_rows<Simd>, rotate_rows<Simd>, conv_channels<Simd>, delta_head<Simd>, mamba2_head<Simd>, mamba1_channels<Simd>};
}
const Isa HYBRIDKV_ISA_RECORD = {HYBRIDKV_ISA_NAME, scratch_bytes, attend,     tokens_together,
                                 scratch_together,    attend_together, encode,
                                 probe_float,         probe_integer, probe_read, &kStep, &HYBRIDKV_ISA_LINEAR};
}  // namespace hybridkv

// The four functions of LinearKernels of one instruction set. Included once per instruction set.
#pragma once

#include "plain.h"

namespace {

const hybridkv::LinearKernels kLinear = {weights::prepared_bytes<weights::PlainOrder>, weights::prepare<weights::PlainOrder>,
                                         weights::Plain::scratch_bytes, weights::Plain::linear};

}  // namespace

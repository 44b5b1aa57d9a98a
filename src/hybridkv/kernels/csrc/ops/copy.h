// A buffer's columns beside another's: two inputs of one product.
#pragma once

#include <cstring>

#include "view.h"

namespace hybridkv {

// dst = x
struct CopyOp {
    View x, dst;  // one group
};

static inline void copy_rows(const CopyOp& op, int64_t r0, int64_t r1) {
    for (int64_t r = r0; r < r1; ++r) {
        std::memcpy(op.dst.at(r, 0), op.x.at(r, 0), static_cast<size_t>(op.x.width) * sizeof(float));
    }
}

}  // namespace hybridkv

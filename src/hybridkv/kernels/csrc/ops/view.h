// Columns of a buffer: what operations of a step read and write.
#pragma once

#include <cstdint>

namespace hybridkv {

// Columns of a buffer, in groups (heads) of `width` contiguous values.
struct View {
    float* data;
    int64_t row_stride, group_stride, groups, width;

    float* at(int64_t row, int64_t group) const { return data + row * row_stride + group * group_stride; }
};

}  // namespace hybridkv

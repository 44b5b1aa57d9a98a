// What the files of the extension module share: each binds its own functions, NB_MODULE is in module.cpp.
#pragma once

#include <nanobind/nanobind.h>

#include <string>
#include <tuple>
#include <vector>

#include "attention.h"

namespace hybridkv {

using Address = uintptr_t;

// Both throw if there is none: an instruction set that this processor runs, a format.
const Isa& isa_named(const std::string& name);
const Format& format_named(const std::string& name);

// Of K or V: type, planes, rows that they have room for.
using SegmentSide = std::tuple<std::string, std::vector<Address>, int64_t>;
// K, V, first row in the planes, number of rows, center or 0
using SegmentRows = std::tuple<SegmentSide, SegmentSide, int64_t, int64_t, Address>;

// Throws if there are no rows, or if the number of planes is not the format's.
std::vector<Segment> segments_of(const std::vector<SegmentRows>& rows, int64_t head_dim_k, int64_t head_dim_v);

void bind_weights(nanobind::module_& m);
void bind_step(nanobind::module_& m);

}  // namespace hybridkv

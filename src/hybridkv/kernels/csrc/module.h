// What the files of the extension module share: each binds its own functions, NB_MODULE is in module.cpp.
#pragma once

#include <nanobind/nanobind.h>

#include <string>
#include <vector>

#include "attention.h"

namespace hybridkv {

using Address = uintptr_t;

// Both throw if there is none: an instruction set that this processor runs, a format.
const Isa& isa_named(const std::string& name);
const Format& format_named(const std::string& name);

// The planes of one tensor; throws if their number is not the format's.
Stored stored(const std::string& type, const std::vector<Address>& planes, int64_t head_dim, int64_t cap);

void bind_linear(nanobind::module_& m);
void bind_step(nanobind::module_& m);

}  // namespace hybridkv

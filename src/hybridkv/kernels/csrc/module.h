// What the files of the extension module share: each binds its own functions, NB_MODULE is in module.cpp.
#pragma once

#include <nanobind/nanobind.h>

#include <string>

#include "attention.h"

namespace hybridkv {

using Address = uintptr_t;

// Both throw if there is none: an instruction set that this processor runs, a format.
const Isa& isa_named(const std::string& name);
const Format& format_named(const std::string& name);

void bind_linear(nanobind::module_& m);
void bind_step(nanobind::module_& m);

}  // namespace hybridkv

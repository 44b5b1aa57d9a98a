// What the files of the extension module share.
#pragma once

#include <nanobind/nanobind.h>

#include <string>

#include "attention.h"

namespace hybridkv {

// Both throw std::invalid_argument for an unknown name.
const Isa& isa_named(const std::string& name);
const Format& format_named(const std::string& name);

void bind_step(nanobind::module_& m);

}  // namespace hybridkv

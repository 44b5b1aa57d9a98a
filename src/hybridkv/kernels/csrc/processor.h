// Which instruction sets this processor and its operating system run. Asked once.
#pragma once

#include <vector>

#include "attention.h"

namespace hybridkv {

// The records of all that run here, the best one first.
const std::vector<const Isa*>& offered();

}  // namespace hybridkv

// Mapped files that may shrink while they are read: the pages that are gone read as zeros, and the map is known as
// damaged, where the system would end the process with a bus error.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hybridkv {

// Watches a map; its number, or -1 if no more can be watched or this system has no such signal.
int watch_map(uintptr_t begin, size_t bytes);

void forget_map(int map);

// Whether pages of a watched map were gone when they were read.
bool is_damaged(int map);

}  // namespace hybridkv

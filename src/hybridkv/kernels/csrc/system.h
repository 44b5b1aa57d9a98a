// What the native code asks of the operating system. `system.cpp` is the only file that includes its headers, so that
// another system is a matter of that file. Where a system has no answer, the functions say so and nothing else changes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hybridkv {

// Asks for large pages under memory that was allocated and not yet touched: fewer misses of the address cache while
// streaming. Advisory: failure is ignored.
void advise_huge_pages(uintptr_t begin, size_t bytes);

// Enters the pages of a map into this process's tables, reading what is not in memory; without, each costs a fault when
// it is first used. The system's error number, 0 if it was done.
int populate(uintptr_t begin, size_t bytes);

// The system's error number, 0 if the range is locked into memory.
int lock_memory(uintptr_t begin, size_t bytes);

// Has pages of mapped files read as zeros if the file no longer holds them, where the system would end the process.
// `end_of` gets the address that was read and returns the end of the map that it lies in, 0 for memory of others; it
// runs in a signal handler. False where the system has no such signal.
bool catch_missing_pages(uintptr_t (*end_of)(uintptr_t at));

// Calls `child` in every forked child.
void on_fork(void (*child)());

// Asks for the tile registers of AMX, which Linux hands out on request.
bool request_tiles();

// Whether this 64-bit ARM processor has dot products.
bool has_dot_products();

}  // namespace hybridkv

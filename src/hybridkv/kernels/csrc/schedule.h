// Cuts an attention call into tasks, runs them on the pool, merges the parts of split rows.
#pragma once

#include "attention.h"

namespace hybridkv {

void run_attention(const Isa& isa, const AttendParams& a, int n_threads);
// Several calls side by side. Each is cut as it is alone, and so gives the same bits. `spans`: how many calls in a row are
// consecutive tokens of one cache; those read its rows together where that leaves the bits as they are.
void run_attention(const Isa& isa, const std::vector<AttendParams>& calls, const std::vector<int64_t>& spans,
                   int n_threads);
void run_encode(const Isa& isa, const EncodeParams& e, int64_t n_rows, int n_threads);

// Bytes of scratch that a call allocates: all threads' tiles and the parts of split rows.
size_t attention_scratch_bytes(const Isa& isa, const AttendParams& a, int n_threads);

}  // namespace hybridkv

// A small thread pool: the caller works along, workers look for the next call for a while and then sleep, a forked child
// starts afresh.
#pragma once

#include <cstdint>
#include <functional>

namespace hybridkv {

// Calls work(task, worker) for every task in 0..n_tasks-1, tasks handed out one at a time; returns when all are
// done. worker is in 0..n_threads-1 and no two tasks run at once with the same one. A second caller at the same
// time runs its tasks alone.
void parallel_for(int64_t n_tasks, int n_threads, const std::function<void(int64_t, int)>& work);

// The same, for tasks that each change memory of their own at every call: a thread begins with the tasks that it had the
// last time, whose memory is near it. More than 64 are handed out as above.
void parallel_for_at_home(int64_t n_tasks, int n_threads, const std::function<void(int64_t, int)>& work);

// From now on calls come step after step: workers stay awake between them, for milliseconds.
void expect_steps();

// Memory of at least `bytes`, 64-byte aligned, kept by the calling thread until it asks for more or ends.
void* thread_scratch(size_t bytes);

// The same, apart from it: for what a caller shares with the threads that work for it.
void* call_memory(size_t bytes);

}  // namespace hybridkv

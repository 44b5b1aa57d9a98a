#include "pool.h"

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#define HYBRIDKV_HAS_FORK 1
#endif

namespace hybridkv {
namespace {

using Work = std::function<void(int64_t, int)>;

class Pool {
public:
    ~Pool() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stop_ = true;
        }
        wake_.notify_all();
        for (std::thread& t : threads_) t.join();
    }

    void run(int64_t n_tasks, int n_threads, const Work& work) {
        std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        if (!turn.owns_lock() || n_threads <= 1 || n_tasks <= 1) {
            for (int64_t i = 0; i < n_tasks; ++i) work(i, 0);
            return;
        }
        const int helpers = static_cast<int>(n_tasks < n_threads ? n_tasks : n_threads) - 1;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            while (static_cast<int>(threads_.size()) < helpers) {
                const int worker = static_cast<int>(threads_.size()) + 1;
                threads_.emplace_back([this, worker] { serve(worker); });
            }
            work_ = &work;
            n_tasks_ = n_tasks;
            next_.store(0, std::memory_order_relaxed);
            wanted_ = helpers;
            ++round_;
        }
        wake_.notify_all();
        drain(work, n_tasks, 0);
        // A worker that has not woken up by now finds nothing wanted and goes on sleeping.
        std::unique_lock<std::mutex> lock(mutex_);
        wanted_ = 0;
        done_.wait(lock, [this] { return running_ == 0; });
        work_ = nullptr;
    }

private:
    void drain(const Work& work, int64_t n_tasks, int worker) {
        for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < n_tasks;) work(i, worker);
    }

    void serve(int worker) {
        uint64_t seen = 0;
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return stop_ || (round_ != seen && worker <= wanted_); });
            if (stop_) return;
            seen = round_;
            ++running_;
            const Work& work = *work_;
            const int64_t n_tasks = n_tasks_;
            lock.unlock();
            drain(work, n_tasks, worker);
            lock.lock();
            if (--running_ == 0) done_.notify_one();
        }
    }

    std::mutex turn_, mutex_;
    std::condition_variable wake_, done_;
    std::vector<std::thread> threads_;
    const Work* work_ = nullptr;
    int64_t n_tasks_ = 0;
    std::atomic<int64_t> next_{0};
    int wanted_ = 0, running_ = 0;
    uint64_t round_ = 0;
    bool stop_ = false;
};

// Never destroyed at exit: the interpreter may still have threads in a call then.
Pool* g_pool = nullptr;
std::mutex* g_pool_mutex = new std::mutex;

Pool& pool() {
    std::lock_guard<std::mutex> lock(*g_pool_mutex);
    if (!g_pool) {
#if defined(HYBRIDKV_HAS_FORK)
        // The threads do not exist in a forked child: leave the old pool, locks and all, and make a new one.
        static const int registered = pthread_atfork(nullptr, nullptr, [] {
            g_pool = nullptr;
            g_pool_mutex = new std::mutex;
        });
        (void)registered;
#endif
        g_pool = new Pool;
    }
    return *g_pool;
}

struct Aligned {
    void* memory = nullptr;
    size_t bytes = 0;
    ~Aligned() { ::operator delete(memory, std::align_val_t{64}); }
};

}  // namespace

void parallel_for(int64_t n_tasks, int n_threads, const Work& work) { pool().run(n_tasks, n_threads, work); }

void* thread_scratch(size_t bytes) {
    thread_local Aligned kept;
    if (kept.bytes < bytes) {
        ::operator delete(kept.memory, std::align_val_t{64});
        kept.memory = nullptr;
        kept.bytes = 0;
        kept.memory = ::operator new(bytes, std::align_val_t{64});
        kept.bytes = bytes;
    }
    return kept.memory;
}

}  // namespace hybridkv

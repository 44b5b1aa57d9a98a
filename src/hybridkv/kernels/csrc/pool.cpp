#include "pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "system.h"

namespace hybridkv {
namespace {

using Work = std::function<void(int64_t, int)>;
using Clock = std::chrono::steady_clock;

// How long a worker looks for the next call before it sleeps. Waking a sleeper takes as long as a short attention
// (30 to 100 us, and on virtual machines up to a millisecond). Between two calls of one decode step, and between two
// steps, with what Python does there, it is not to sleep; a single call from elsewhere, torch's threads beside it, lets
// it go soon.
constexpr auto kLinger = std::chrono::microseconds(100), kLingerAfterSteps = std::chrono::microseconds(3000);
std::atomic<int64_t> g_linger_us{kLinger.count()};

inline void relax() {
#if defined(HYBRIDKV_X86)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

class Pool {
public:
    void run(int64_t n_tasks, int n_threads, const Work& work, bool at_home) {
        std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        if (!turn.owns_lock() || n_threads <= 1 || n_tasks <= 1) {
            for (int64_t i = 0; i < n_tasks; ++i) work(i, 0);
            return;
        }
        const int helpers = static_cast<int>(n_tasks < n_threads ? n_tasks : n_threads) - 1;
        while (static_cast<int>(threads_.size()) < helpers) {
            const int worker = static_cast<int>(threads_.size()) + 1;
            threads_.emplace_back([this, worker] { serve(worker); });
        }
        work_ = &work;
        n_tasks_ = n_tasks;
        wanted_ = helpers;
        at_home_ = at_home && n_tasks <= 64;
        next_.store(0, std::memory_order_relaxed);
        round_.fetch_add(1);  // odd: open
        if (sleeping_.load() > 0) {
            { std::lock_guard<std::mutex> lock(mutex_); }  // nobody is between his last look and his sleep
            wake_.notify_all();
        }
        drain(work, n_tasks, 0);
        // Closed: a worker that comes too late finds nothing and is not waited for.
        round_.fetch_add(1);
        for (int i = 0; running_.load() != 0; ++i) {
            if (i < 4096) {
                relax();
            } else {
                std::this_thread::yield();  // he has lost his core
            }
        }
    }

private:
    void drain(const Work& work, int64_t n_tasks, int worker) {
        if (at_home_) return drain_at_home(work, n_tasks, worker);
        for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < n_tasks;) work(i, worker);
    }

    // Each thread begins with its own share of the tasks, the same in every call, and then helps the others. `next_` has a
    // bit for each task that is taken.
    void drain_at_home(const Work& work, int64_t n_tasks, int worker) {
        const int64_t first = worker * n_tasks / (wanted_ + 1);
        for (int64_t k = 0; k < n_tasks; ++k) {
            const int64_t i = (first + k) % n_tasks, bit = static_cast<int64_t>(uint64_t{1} << i);
            if (next_.load(std::memory_order_relaxed) & bit) continue;
            if (!(next_.fetch_or(bit, std::memory_order_relaxed) & bit)) work(i, worker);
        }
    }

    [[noreturn]] void serve(int worker) {
        for (uint64_t seen = 0;;) {
            const uint64_t round = await(seen);
            // Whoever is counted in `running_` before he sees the round still open holds it open: run() changes
            // nothing that belongs to a round before `running_` is 0.
            running_.fetch_add(1);
            if (round_.load() == round && worker <= wanted_) drain(*work_, n_tasks_, worker);
            running_.fetch_sub(1);
            seen = round;
        }
    }

    // The next open round.
    uint64_t await(uint64_t seen) {
        const auto news = [&] {
            const uint64_t round = round_.load();
            return round % 2 == 1 && round != seen ? round : 0;
        };
        const Clock::time_point end = Clock::now() + std::chrono::microseconds(g_linger_us.load(std::memory_order_relaxed));
        do {
            for (int i = 0; i < 32; ++i) {
                if (const uint64_t round = news()) return round;
                relax();
            }
        } while (Clock::now() < end);
        std::unique_lock<std::mutex> lock(mutex_);
        ++sleeping_;
        uint64_t round = 0;
        wake_.wait(lock, [&] { return (round = news()) != 0; });
        --sleeping_;
        return round;
    }

    std::mutex turn_, mutex_;
    std::condition_variable wake_;
    std::vector<std::thread> threads_;
    const Work* work_ = nullptr;
    int64_t n_tasks_ = 0;
    int wanted_ = 0;
    bool at_home_ = false;
    alignas(64) std::atomic<uint64_t> round_{0};
    alignas(64) std::atomic<int64_t> next_{0};
    alignas(64) std::atomic<int> running_{0};
    std::atomic<int> sleeping_{0};
};

// Never destroyed at exit: the interpreter may still have threads in a call then.
Pool* g_pool = nullptr;
std::mutex* g_pool_mutex = new std::mutex;

Pool& pool() {
    std::lock_guard<std::mutex> lock(*g_pool_mutex);
    if (!g_pool) {
        // The threads do not exist in a forked child: leave the old pool, locks and all, and make a new one.
        static std::once_flag once;
        std::call_once(once, on_fork, [] {
            g_pool = nullptr;
            g_pool_mutex = new std::mutex;
        });
        g_pool = new Pool;
    }
    return *g_pool;
}

struct Aligned {
    void* memory = nullptr;
    size_t bytes = 0;
    ~Aligned() { ::operator delete(memory, std::align_val_t{64}); }

    void* at_least(size_t wanted) {
        if (bytes < wanted) {
            ::operator delete(memory, std::align_val_t{64});
            memory = nullptr;
            bytes = 0;
            memory = ::operator new(wanted, std::align_val_t{64});
            bytes = wanted;
        }
        return memory;
    }
};

}  // namespace

void parallel_for(int64_t n_tasks, int n_threads, const Work& work) { pool().run(n_tasks, n_threads, work, false); }

void parallel_for_at_home(int64_t n_tasks, int n_threads, const Work& work) {
    pool().run(n_tasks, n_threads, work, true);
}

void expect_steps() { g_linger_us.store(kLingerAfterSteps.count(), std::memory_order_relaxed); }

void* thread_scratch(size_t bytes) {
    thread_local Aligned kept;
    return kept.at_least(bytes);
}

void* call_memory(size_t bytes) {
    thread_local Aligned kept;
    return kept.at_least(bytes);
}

}  // namespace hybridkv

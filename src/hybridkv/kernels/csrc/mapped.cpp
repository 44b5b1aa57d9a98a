#include "mapped.h"

#include <atomic>
#include <cerrno>
#include <mutex>

#if defined(__unix__) || defined(__APPLE__)
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>
#define HYBRIDKV_HAS_SIGBUS 1
#endif

namespace hybridkv {

#if defined(HYBRIDKV_HAS_SIGBUS)
namespace {

constexpr int kMaps = 256;

struct Watched {
    std::atomic<uintptr_t> begin{0}, end{0};  // end is 0 while nothing is watched here
    std::atomic<bool> damaged{false};
};

Watched g_maps[kMaps];
struct sigaction g_before;
uintptr_t g_page = 4096;

// Only what a signal handler may call: atomics, mmap and sigaction.
void on_bus_error(int, siginfo_t* info, void*) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(info->si_addr);
    for (Watched& map : g_maps) {
        const uintptr_t end = map.end.load();
        if (at < map.begin.load() || at >= end) continue;
        // All that follows is gone too: one fault for the whole rest.
        const uintptr_t page = at / g_page * g_page;
        void* zeros = mmap(reinterpret_cast<void*>(page), end - page, PROT_READ,
                           MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (zeros == MAP_FAILED) break;
        map.damaged.store(true);
        return;
    }
    sigaction(SIGBUS, &g_before, nullptr);  // somebody else's: the instruction runs again and faults there
}

void install() {
    static std::once_flag once;
    std::call_once(once, [] {
        g_page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
        struct sigaction action = {};
        action.sa_sigaction = on_bus_error;
        action.sa_flags = SA_SIGINFO;
        sigemptyset(&action.sa_mask);
        sigaction(SIGBUS, &action, &g_before);
    });
}

std::mutex g_mutex;

}  // namespace

int watch_map(uintptr_t begin, size_t bytes) {
    install();
    const std::lock_guard<std::mutex> lock(g_mutex);
    for (int i = 0; i < kMaps; ++i) {
        if (g_maps[i].end.load() != 0) continue;
        g_maps[i].damaged.store(false);
        g_maps[i].begin.store(begin);
        g_maps[i].end.store(begin + bytes);
        return i;
    }
    return -1;
}

void forget_map(int map) {
    if (map >= 0 && map < kMaps) g_maps[map].end.store(0);
}

int lock_memory(uintptr_t begin, size_t bytes) {
    return mlock(reinterpret_cast<const void*>(begin), bytes) ? errno : 0;
}

int populate(uintptr_t begin, size_t bytes) {
#if defined(__linux__)
    constexpr int kPopulateRead = 22;  // MADV_POPULATE_READ, Linux 5.14
    constexpr size_t kPart = size_t{64} << 20;  // the rest of the process may change its maps in between
    for (size_t at = 0; at < bytes; at += kPart) {
        const size_t part = bytes - at < kPart ? bytes - at : kPart;
        if (madvise(reinterpret_cast<void*>(begin + at), part, kPopulateRead)) return errno;
    }
    return 0;
#else
    (void)begin, (void)bytes;
    return ENOSYS;
#endif
}

bool is_damaged(int map) { return map >= 0 && map < kMaps && g_maps[map].damaged.load(); }
#else
int watch_map(uintptr_t, size_t) { return -1; }
void forget_map(int) {}
int lock_memory(uintptr_t, size_t) { return ENOSYS; }
int populate(uintptr_t, size_t) { return ENOSYS; }
bool is_damaged(int) { return false; }
#endif

}  // namespace hybridkv

#include "mapped.h"

#include <atomic>
#include <mutex>

#include "system.h"

namespace hybridkv {
namespace {

constexpr int kMaps = 256;

struct Watched {
    std::atomic<uintptr_t> begin{0}, end{0};  // end is 0 while nothing is watched here
    std::atomic<bool> damaged{false};
};

Watched g_maps[kMaps];
std::mutex g_mutex;

// The end of the map whose page at this address is gone, which is damaged from now on. Runs in a signal handler.
uintptr_t damage(uintptr_t at) {
    for (Watched& map : g_maps) {
        const uintptr_t end = map.end.load();
        if (at < map.begin.load() || at >= end) continue;
        map.damaged.store(true);
        return end;
    }
    return 0;
}

}  // namespace

int watch_map(uintptr_t begin, size_t bytes) {
    if (!catch_missing_pages(damage)) return -1;
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

bool is_damaged(int map) { return map >= 0 && map < kMaps && g_maps[map].damaged.load(); }

}  // namespace hybridkv

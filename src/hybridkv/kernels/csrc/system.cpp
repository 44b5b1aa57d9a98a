#include "system.h"

#include <cerrno>
#include <mutex>

#if defined(__unix__) || defined(__APPLE__)
#define HYBRIDKV_POSIX 1
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>
#endif
#if defined(__linux__)
#include <sys/auxv.h>
#include <sys/syscall.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace hybridkv {

void advise_huge_pages(uintptr_t begin, size_t bytes) {
#if defined(__linux__)
    constexpr size_t kHuge = size_t{2} << 20;
    const size_t first = (begin + kHuge - 1) / kHuge * kHuge, last = (begin + bytes) / kHuge * kHuge;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    (void)begin, (void)bytes;
#endif
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

int lock_memory(uintptr_t begin, size_t bytes) {
#if defined(HYBRIDKV_POSIX)
    return mlock(reinterpret_cast<const void*>(begin), bytes) ? errno : 0;
#else
    (void)begin, (void)bytes;
    return ENOSYS;
#endif
}

#if defined(HYBRIDKV_POSIX)
namespace {

uintptr_t (*g_end_of)(uintptr_t);
struct sigaction g_before;
uintptr_t g_page = 4096;

// Only what a signal handler may call: atomics, mmap and sigaction.
void on_bus_error(int, siginfo_t* info, void*) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(info->si_addr);
    if (const uintptr_t end = g_end_of(at)) {
        // All that follows is gone too: one fault for the whole rest.
        const uintptr_t page = at / g_page * g_page;
        void* zeros = mmap(reinterpret_cast<void*>(page), end - page, PROT_READ,
                           MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (zeros != MAP_FAILED) return;
    }
    sigaction(SIGBUS, &g_before, nullptr);  // somebody else's: the instruction runs again and faults there
}

}  // namespace

bool catch_missing_pages(uintptr_t (*end_of)(uintptr_t)) {
    static std::once_flag once;
    std::call_once(once, [end_of] {
        g_end_of = end_of;
        g_page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
        struct sigaction action = {};
        action.sa_sigaction = on_bus_error;
        action.sa_flags = SA_SIGINFO;
        sigemptyset(&action.sa_mask);
        sigaction(SIGBUS, &action, &g_before);
    });
    return true;
}

void on_fork(void (*child)()) { pthread_atfork(nullptr, nullptr, child); }
#else
bool catch_missing_pages(uintptr_t (*)(uintptr_t)) { return false; }
void on_fork(void (*)()) {}
#endif

bool request_tiles() {
#if defined(__linux__) && defined(__x86_64__)
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

bool has_dot_products() {
#if defined(__linux__) && defined(__aarch64__)
    constexpr unsigned long kDotProducts = 1ul << 20;  // HWCAP_ASIMDDP
    return getauxval(AT_HWCAP) & kDotProducts;
#elif defined(__APPLE__) && defined(__aarch64__)
    int found = 0;
    size_t size = sizeof found;
    return sysctlbyname("hw.optional.arm.FEAT_DotProd", &found, &size, nullptr, 0) == 0 && found != 0;
#else
    return false;
#endif
}

}  // namespace hybridkv

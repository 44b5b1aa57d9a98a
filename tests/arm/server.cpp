// Serves the extension's functions to a Python process: one message in, one out, through a pair of pipes.
//
// Arguments hold addresses of that process. Its memory appears here at the same addresses, a page at a time, when it is
// first touched, and what a call has changed in it goes back when the call is done.
#include <fcntl.h>
#include <nanobind/nanobind.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>

void bind_module();

namespace {

using nanobind::Message;

constexpr uintptr_t kPage = 4096;
constexpr int kPages = 1 << 16;  // that one call may touch

struct Page {
    uintptr_t address;
    const char* before;  // what it held
};

Page g_pages[kPages];
int g_count = 0;
int g_memory = -1;  // of the process that calls
std::atomic_flag g_lock = ATOMIC_FLAG_INIT;

bool is_here(uintptr_t page) {
    for (int i = 0; i < g_count; ++i) {
        if (g_pages[i].address == page) return true;
    }
    return false;
}

void* new_page() {
    return mmap(nullptr, kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

// Threads may fault on one page together: it is filled elsewhere and moved to its place when it is whole.
void on_fault(int, siginfo_t* info, void*) {
    const uintptr_t page = reinterpret_cast<uintptr_t>(info->si_addr) / kPage * kPage;
    while (g_lock.test_and_set()) {
    }
    bool fine = is_here(page);
    if (!fine && g_count < kPages) {
        void *before = new_page(), *filled = new_page();
        fine = pread(g_memory, before, kPage, static_cast<off_t>(page)) == static_cast<ssize_t>(kPage);
        if (fine) {
            std::memcpy(filled, before, kPage);
            fine = mremap(filled, kPage, kPage, MREMAP_MAYMOVE | MREMAP_FIXED, reinterpret_cast<void*>(page)) != MAP_FAILED;
            g_pages[g_count++] = {page, static_cast<const char*>(before)};
        }
    }
    g_lock.clear();
    if (!fine) signal(SIGSEGV, SIG_DFL);  // nobody's memory: the access runs again and ends the program
}

void write_back() {
    for (int i = 0; i < g_count; ++i) {
        const char *now = reinterpret_cast<const char*>(g_pages[i].address), *before = g_pages[i].before;
        for (uintptr_t a = 0; a < kPage; ++a) {
            if (now[a] == before[a]) continue;
            uintptr_t b = a;
            while (b < kPage && now[b] != before[b]) ++b;
            if (pwrite(g_memory, now + a, b - a, static_cast<off_t>(g_pages[i].address + a)) < 0) std::abort();
            a = b;
        }
        munmap(reinterpret_cast<void*>(g_pages[i].address), kPage);
        munmap(const_cast<char*>(before), kPage);
    }
    g_count = 0;
}

bool read_all(void* to, size_t count) {
    for (char* p = static_cast<char*>(to); count > 0;) {
        const ssize_t n = read(STDIN_FILENO, p, count);
        if (n <= 0) return false;
        p += n;
        count -= static_cast<size_t>(n);
    }
    return true;
}

void write_all(const void* from, size_t count) {
    for (const char* p = static_cast<const char*>(from); count > 0;) {
        const ssize_t n = write(STDOUT_FILENO, p, count);
        if (n <= 0) std::exit(1);
        p += n;
        count -= static_cast<size_t>(n);
    }
}

// An error is its kind and what it says.
Message error(char kind, const char* what) {
    Message m;
    m.put(kind);
    nanobind::Value<std::string>::write(m, what);
    return m;
}

Message answer(Message& question) {
    try {
        const auto found = nanobind::calls().find(nanobind::Value<std::string>::read(question));
        if (found == nanobind::calls().end()) return error('A', "nothing has this name");
        Message result;
        result.put('=');
        found->second(question, result);
        return result;
    } catch (const std::invalid_argument& e) {
        return error('V', e.what());
    } catch (const std::out_of_range& e) {
        return error('I', e.what());
    } catch (const std::exception& e) {
        return error('R', e.what());
    }
}

}  // namespace

int main(int, char** argv) {
    g_memory = std::atoi(argv[1]);
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGSEGV, &action, nullptr);
    bind_module();
    for (int64_t size; read_all(&size, sizeof size);) {
        Message question;
        question.bytes.resize(static_cast<size_t>(size));
        if (!read_all(&question.bytes[0], question.bytes.size())) return 1;
        const Message result = answer(question);
        write_back();
        size = static_cast<int64_t>(result.bytes.size());
        write_all(&size, sizeof size);
        write_all(result.bytes.data(), result.bytes.size());
    }
    return 0;
}

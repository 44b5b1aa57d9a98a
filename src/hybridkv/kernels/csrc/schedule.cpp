#include "schedule.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "pool.h"

namespace hybridkv {
namespace {

constexpr int64_t kTasksPerThread = 4;  // slack for threads of unequal speed
constexpr int64_t kMinSplit = 256;      // stored rows below which a split costs more than it gives

constexpr int64_t kAlign = 128;         // rows of the largest tile

// How one call is cut into tasks.
struct TaskGrid {
    int64_t all_rows, blocks, splits, split_rows;  // query rows of a KV head, blocks of them, parts of the cache
    int64_t shift;                                 // rows that the first part has beyond split_rows
    int64_t n_tasks, part_floats;

    int64_t begin(int64_t split) const { return split == 0 ? 0 : shift + split * split_rows; }
};

// Rows before the longest segment, but for whole tiles: parts cut it into whole tiles then.
int64_t before_longest(const std::vector<Segment>& segments) {
    const auto longest = std::max_element(segments.begin(), segments.end(), [](const Segment& a, const Segment& b) {
        return a.n_rows() < b.n_rows();
    });
    return longest->begin % kAlign;
}

TaskGrid grid_of(const AttendParams& a, int n_threads) {
    TaskGrid c;
    c.all_rows = a.group() * a.n_tokens;
    c.blocks = (c.all_rows + kMaxRows - 1) / kMaxRows;
    const int64_t whole = a.n_batch * a.n_kv_heads * c.blocks;
    const int64_t wanted = n_threads <= 1 ? 1 : (n_threads * kTasksPerThread + whole - 1) / whole;
    c.shift = before_longest(a.segments);
    const int64_t n_rows = a.n_stored() - c.shift;
    const int64_t most = std::max<int64_t>(1, n_rows / kMinSplit);
    c.splits = whole >= n_threads * kTasksPerThread ? 1 : std::min(wanted, most);
    // Whole tiles, so that only the last split has a short one.
    c.split_rows = std::max<int64_t>(64, ((n_rows + c.splits - 1) / c.splits + 63) / 64 * 64);
    c.splits = std::max<int64_t>(1, (n_rows + c.split_rows - 1) / c.split_rows);
    c.n_tasks = whole * c.splits;
    c.part_floats = std::min<int64_t>(kMaxRows, c.all_rows) * (2 + a.head_dim_v());
    return c;
}

// Range of stored rows that any of the query rows can see.
void clip_to_visible(const AttendParams& a, AttendTask& t) {
    const int64_t first = a.n_stored() - a.n_tokens + t.r0 / a.group();
    const int64_t last = a.n_stored() - a.n_tokens + (t.r1 - 1) / a.group();
    const int64_t lo = a.window ? std::max<int64_t>(0, first - a.window + 1) : 0;
    const int64_t hi = a.causal ? last + 1 : a.n_stored();
    t.j0 = std::max(t.j0, lo);
    t.j1 = std::max(t.j0, std::min(t.j1, hi));
}

// One query row of `splits` parts: m, l and accumulators each.
void merge_row(const AttendParams& a, const float* part, int64_t stride, int64_t splits, int64_t batch, int64_t head,
               int64_t token) {
    const int64_t dims = a.head_dim_v();
    float top = -std::numeric_limits<float>::infinity();
    for (int64_t i = 0; i < splits; ++i) top = std::max(top, part[i * stride]);
    float* out = a.out + ((batch * a.n_heads + head) * a.n_tokens + token) * dims;
    std::fill(out, out + dims, 0.f);
    if (top == -std::numeric_limits<float>::infinity()) return;
    if (a.sinks) top = std::max(top, a.sinks[head]);
    float l = a.sinks ? std::exp(a.sinks[head] - top) : 0.f;
    for (int64_t i = 0; i < splits; ++i) {
        const float* p = part + i * stride;
        if (p[1] == 0.f) continue;
        const float weight = std::exp(p[0] - top);
        l += p[1] * weight;
        for (int64_t e = 0; e < dims; ++e) out[e] += p[2 + e] * weight;
    }
    const float factor = 1.f / l;
    for (int64_t e = 0; e < dims; ++e) out[e] *= factor;
}

// One call among several, with what its parts of the cache gave.
struct Call {
    const AttendParams& a;
    const TaskGrid grid;
    std::unique_ptr<float[]> partials;  // one per split, if there are several

    Call(const AttendParams& params, const TaskGrid& task_grid) : a(params), grid(task_grid) {
        if (grid.splits > 1) partials.reset(new float[static_cast<size_t>(grid.n_tasks * grid.part_floats)]);
    }

    float* partial(int64_t head, int64_t block, int64_t split) const {
        return partials.get() + ((head * grid.blocks + block) * grid.splits + split) * grid.part_floats;
    }

    AttendTask task(int64_t i) const {
        // The last blocks of rows see most of a causal cache: hand them out first.
        const int64_t split = i % grid.splits, block = grid.blocks - 1 - i / grid.splits % grid.blocks;
        const int64_t head = i / (grid.splits * grid.blocks);
        AttendTask t;
        t.batch = head / a.n_kv_heads;
        t.kv_head = head % a.n_kv_heads;
        t.r0 = block * kMaxRows;
        t.r1 = std::min(grid.all_rows, t.r0 + kMaxRows);
        t.j0 = grid.begin(split);
        t.j1 = std::min(a.n_stored(), grid.begin(split + 1));
        clip_to_visible(a, t);
        t.partial = partials ? partial(head, block, split) : nullptr;
        return t;
    }

    void merge() const {
        if (!partials) return;
        for (int64_t head = 0; head < a.n_batch * a.n_kv_heads; ++head) {
            for (int64_t row = 0; row < grid.all_rows; ++row) {
                const int64_t block = row / kMaxRows;
                const float* first = partial(head, block, 0) + row % kMaxRows * (2 + a.head_dim_v());
                merge_row(a, first, grid.part_floats, grid.splits, head / a.n_kv_heads,
                          head % a.n_kv_heads * a.group() + row % a.group(), row / a.group());
            }
        }
    }
};

// Calls whose tasks are done together: one, or consecutive tokens of one cache that are cut alike.
struct Bundle {
    size_t first, count;
    int64_t begin, end;  // tasks
};

bool same_grid(const TaskGrid& a, const TaskGrid& b) {
    return a.splits == b.splits && a.split_rows == b.split_rows && a.shift == b.shift && a.n_tasks == b.n_tasks;
}

std::vector<Bundle> bundles_of(const Isa& isa, const std::vector<Call>& calls, const std::vector<int64_t>& spans) {
    std::vector<Bundle> found;
    int64_t n_tasks = 0;
    size_t first = 0;
    for (const int64_t span : spans) {
        for (const size_t last = first + static_cast<size_t>(span); first < last;) {
            size_t count = 1;
            const size_t most = span > 1 ? static_cast<size_t>(isa.tokens_together(calls[first].a)) : 1;
            const TaskGrid& grid = calls[first].grid;
            while (first + count < last && count < most && same_grid(grid, calls[first + count].grid)) ++count;
            found.push_back({first, count, n_tasks, n_tasks + grid.n_tasks});
            n_tasks = found.back().end;
            first += count;
        }
    }
    return found;
}

}  // namespace

void run_attention(const Isa& isa, const AttendParams& a, int n_threads) {
    run_attention(isa, std::vector<AttendParams>{a}, {1}, n_threads);
}

void run_attention(const Isa& isa, const std::vector<AttendParams>& calls, const std::vector<int64_t>& spans,
                   int n_threads) {
    std::vector<Call> prepared;
    prepared.reserve(calls.size());
    for (const AttendParams& a : calls) prepared.emplace_back(a, grid_of(a, n_threads));
    const std::vector<Bundle> bundles = bundles_of(isa, prepared, spans);
    size_t scratch = 0;
    for (const Bundle& b : bundles) {
        const AttendParams& a = calls[b.first];
        scratch = std::max(scratch, b.count > 1 ? isa.scratch_together(a, static_cast<int64_t>(b.count)) : isa.scratch_bytes(a));
    }
    parallel_for(bundles.back().end, n_threads, [&](int64_t i, int) {
        const Bundle& b = *std::find_if(bundles.begin(), bundles.end(), [&](const Bundle& t) { return i < t.end; });
        void* memory = thread_scratch(scratch);
        if (b.count == 1) return isa.attend(calls[b.first], prepared[b.first].task(i - b.begin), memory);
        std::vector<const AttendParams*> each;
        std::vector<AttendTask> tasks;
        for (size_t p = b.first; p < b.first + b.count; ++p) {
            each.push_back(&calls[p]);
            tasks.push_back(prepared[p].task(i - b.begin));
        }
        isa.attend_together(each.data(), tasks.data(), static_cast<int64_t>(b.count), memory);
    });
    for (const Call& call : prepared) call.merge();
}

void run_encode(const Isa& isa, const EncodeParams& e, int64_t n_rows, int n_threads) {
    constexpr int64_t kRows = 64;
    parallel_for((n_rows + kRows - 1) / kRows, n_threads, [&](int64_t i, int) {
        void* scratch = thread_scratch(static_cast<size_t>(e.head_dim + kBlock) * 2 * sizeof(float));
        isa.encode(e, i * kRows, std::min(n_rows, (i + 1) * kRows), scratch);
    });
}

size_t attention_scratch_bytes(const Isa& isa, const AttendParams& a, int n_threads) {
    const TaskGrid c = grid_of(a, n_threads);
    const size_t parts = c.splits > 1 ? static_cast<size_t>(c.n_tasks * c.part_floats) * sizeof(float) : 0;
    return isa.scratch_bytes(a) * static_cast<size_t>(std::max(1, n_threads)) + parts;
}

}  // namespace hybridkv

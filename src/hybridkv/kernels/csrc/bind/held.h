// Steps of caches that change in nothing but lengths and positions: what they need is given once. hybridkv/kernels/held.py
// checks what it is given, and that it still holds.
#pragma once

#include <cstring>

#include "program.h"

namespace hybridkv {
namespace {

// Table, its half of the rotated dims: of the first token, and behind it those of the tokens that may follow.
using Turns = std::tuple<Address, Address, int64_t>;

// One cache: where its next tokens' rows and states lie, and their angles.
class HeldCache {
public:
    // next: memory beside the states, for several tokens of which some stay, or empty; calls: as they were before the
    // first token
    HeldCache(int64_t n_seqs, const std::vector<Turns>& angles, const std::vector<Address>& states,
              const std::vector<Address>& next, const std::vector<Call>& calls)
        : n_seqs_(n_seqs), angles_(angles), states_(pointers(states)), next_(pointers(next)) {
        for (const Call& call : calls) calls_.push_back(attend_call(call));
    }

private:
    friend class HeldStep;

    bool takes(int64_t n_tokens) const { return n_tokens == 1 || (n_tokens > 1 && next_.size() == states_.size()); }

    void advance(int64_t n_tokens) {
        for (AttendCall& call : calls_) call.segments.back().end += n_tokens;
        for (auto& [cos, sin, n] : angles_) {
            cos += static_cast<Address>(n_tokens * n) * sizeof(float);
            sin += static_cast<Address>(n_tokens * n) * sizeof(float);
        }
    }

    int64_t n_seqs_;
    std::vector<Turns> angles_;
    std::vector<float*> states_, next_;
    std::vector<AttendCall> calls_;
    Span last_{0, 0};  // its rows in the last run of several caches
};

// Runs caches from embedding to logits, in one call each.
class HeldStep {
public:
    HeldStep(Program& layers, Program& head, const WeightRows& embedding, float embed_scale, Address x, Address head_x,
             Address logits, int64_t n_vocab, const std::string& isa, int n_threads)
        : layers_(layers), head_(head), embedding_(matrix(embedding)), embed_scale_(embed_scale),
          x_(reinterpret_cast<float*>(x)), head_x_(reinterpret_cast<float*>(head_x)),
          logits_(reinterpret_cast<const float*>(logits)), n_vocab_(n_vocab),
          run_{isa_named(isa), false, 1, {}, 0, {}, {}, {}, calls_, nullptr, layers.activations_, n_threads},
          head_run_{run_.isa, false, 1, {}, 0, {}, {}, {}, none_, nullptr, head.activations_, n_threads} {}
    HeldStep(const HeldStep&) = delete;
    HeldStep& operator=(const HeldStep&) = delete;

    // Runs a token of each sequence of a cache and writes its logits to `out`; the health of each layer's attention.
    std::vector<int> step(HeldCache& cache, const std::vector<int64_t>& tokens, Address out) {
        if (static_cast<int64_t>(tokens.size()) != cache.n_seqs_) throw std::invalid_argument("tokens of a step");
        {
            nb::gil_scoped_release unlocked;
            begin(false, tokens.size());
            run_.spans = head_run_.spans;
            run_.states = cache.states_;
            run_.angles.clear();
            for (const auto& [cos, sin, n] : cache.angles_) {
                run_.angles.push_back({reinterpret_cast<const float*>(cos), reinterpret_cast<const float*>(sin)});
            }
            calls_ = cache.calls_;
            for (AttendCall& call : calls_) ++call.segments.back().end;
            run(tokens, out);
            cache.advance(1);
        }
        return health();
    }

    // Runs tokens of several caches of one sequence each, every token as if it came alone, and writes their logits to
    // `out`; the health by layer and token. Where several come of a cache, its states go on in memory beside them, and `keep`
    // follows.
    std::vector<int> step_many(const std::vector<HeldCache*>& caches, const std::vector<std::vector<int64_t>>& tokens,
                               Address out) {
        if (caches.size() != tokens.size()) throw std::invalid_argument("tokens of a step");
        {
            std::vector<int64_t> flat;
            for (size_t i = 0; i < caches.size(); ++i) {
                const auto n = static_cast<int64_t>(tokens[i].size());
                if (caches[i]->n_seqs_ != 1 || !caches[i]->takes(n)) throw std::invalid_argument("tokens of a step");
                caches[i]->last_ = {static_cast<int64_t>(flat.size()), n};
                flat.insert(flat.end(), tokens[i].begin(), tokens[i].end());
            }
            nb::gil_scoped_release unlocked;
            begin(true, flat.size());
            run_.spans.clear();
            for (const HeldCache* cache : caches) run_.spans.push_back(cache->last_);
            gather(caches);
            run(flat, out);
            for (HeldCache* cache : caches) {
                if (cache->last_.n_tokens == 1) cache->advance(1);
            }
        }
        return health();
    }

    // Goes on behind the first of a cache's several tokens in the last `step_many`.
    void keep(HeldCache& cache, int64_t n_tokens) {
        const Span last = cache.last_;
        if (n_tokens < 1 || n_tokens > last.n_tokens || last.n_tokens == 1) throw std::out_of_range("tokens of a step");
        nb::gil_scoped_release unlocked;
        cache.advance(n_tokens);
        if (n_tokens == last.n_tokens) {
            std::swap(cache.states_, cache.next_);
            return;
        }
        const StepRun again{run_.isa, true, 1, {{last.row0, n_tokens}}, n_tokens, {}, cache.states_, {}, none_, nullptr,
                            run_.activations, run_.n_threads};
        replay_states(layers_.journal_, again);
    }

private:
    // Sets what any run begins with: rows of the head are tokens of their own.
    void begin(bool separate, size_t n_rows) {
        run_.separate = head_run_.separate = separate;
        run_.n_rows = head_run_.n_rows = static_cast<int64_t>(n_rows);
        run_.before.clear();
        run_.journal = nullptr;
        head_run_.spans.clear();
        for (int64_t row = 0; row < run_.n_rows; ++row) head_run_.spans.push_back({row, 1});
    }

    // Lays states, angles and attentions of separate caches out as a run takes them.
    void gather(const std::vector<HeldCache*>& caches) {
        const HeldCache& first = *caches[0];
        const bool several = run_.n_rows > static_cast<int64_t>(caches.size());
        run_.states.clear();
        for (size_t i = 0; i < first.states_.size(); ++i) {
            for (const HeldCache* cache : caches) {
                run_.states.push_back((cache->last_.n_tokens > 1 ? cache->next_ : cache->states_)[i]);
                if (several) run_.before.push_back(cache->states_[i]);
            }
        }
        if (several) run_.journal = &layers_.journal_;
        turned_.clear();
        std::vector<size_t> begins;
        for (size_t table = 0; table < first.angles_.size(); ++table) {
            for (const bool sines : {false, true}) {
                begins.push_back(turned_.size());
                for (const HeldCache* cache : caches) {
                    const auto& [cos, sin, n] = cache->angles_[table];
                    const auto* from = reinterpret_cast<const float*>(sines ? sin : cos);
                    turned_.insert(turned_.end(), from, from + cache->last_.n_tokens * n);
                }
            }
        }
        run_.angles.clear();
        for (size_t i = 0; i < begins.size(); i += 2) {
            run_.angles.push_back({turned_.data() + begins[i], turned_.data() + begins[i + 1]});
        }
        calls_.clear();
        for (size_t layer = 0; layer < first.calls_.size(); ++layer) {
            for (const HeldCache* cache : caches) {
                for (int64_t i = 1; i <= cache->last_.n_tokens; ++i) {
                    calls_.push_back(cache->calls_[layer]);
                    calls_.back().segments.back().end += i;
                }
            }
        }
    }

    // Runs everything over some tokens and writes their logits to `out`.
    void run(const std::vector<int64_t>& tokens, Address out) {
        embed(tokens);
        for (AttendCall& call : calls_) call.health = Health::finite;
        layers_.run_all(run_);
        std::memcpy(head_x_, x_, tokens.size() * static_cast<size_t>(embedding_.n_in) * sizeof(float));
        head_.run_all(head_run_);
        std::memcpy(reinterpret_cast<float*>(out), logits_, tokens.size() * static_cast<size_t>(n_vocab_) * sizeof(float));
    }

    void embed(const std::vector<int64_t>& tokens) const {
        const int64_t width = embedding_.n_in;
        for (size_t i = 0; i < tokens.size(); ++i) {
            float* row = x_ + static_cast<int64_t>(i) * width;
            embedding_.type->decode(embedding_.data + tokens[i] * embedding_.row_bytes, width, row);
            if (embed_scale_ == 1) continue;
            for (int64_t c = 0; c < width; ++c) row[c] *= embed_scale_;
        }
    }

    std::vector<int> health() const {
        std::vector<int> found;
        for (const AttendCall& call : calls_) found.push_back(static_cast<int>(call.health));
        return found;
    }

    Program& layers_;
    Program& head_;
    Matrix embedding_;
    float embed_scale_;
    float *x_, *head_x_;
    const float* logits_;
    int64_t n_vocab_;
    std::vector<AttendCall> calls_, none_;
    std::vector<float> turned_;
    StepRun run_, head_run_;
};

}  // namespace
}  // namespace hybridkv

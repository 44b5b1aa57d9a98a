// The two products of a tile on processors with AMX: what plain.h does, eight query rows at a time, in tiles of int8
// for codes (amx_codes.h) and of bfloat16 for values (amx_values.h). The sixteen columns or rows of a tile are the two
// terms of eight query rows: a number is split in two int8 terms, 128 * high + low, or in two bfloat16 terms.
#pragma once

#include "amx_codes.h"
#include "amx_values.h"
#include "few_rows.h"

namespace {

struct Products : Task {
    static constexpr float q_units = 16319.f;  // 127 * 128 + 63: the largest number in two terms
    static constexpr float p_units = 32767.f;
    static constexpr float d_units = 127 * 128;  // so is a probability times a scale

    const bool k_few = !k_int && FewRows::takes(seg.k, rows, j1 - j0), v_few = !v_int && FewRows::takes(seg.v, rows, j1 - j0);

    using Task::Task;

    int groups() const { return (rows + Amx::group - 1) / Amx::group; }
    int in_group(int r) const { return rows - r < Amx::group ? rows - r : Amx::group; }

    // Tiles slow the vectors beside them down: none where none are used.
    bool tiles() const { return !k_few || !v_few; }

    void start() {
        if (!tiles()) return;
        Amx::configure();
        const int64_t bytes = k_int ? AmxCodes::query_bytes(dk) : AmxValues::query_bytes(dk);
        std::memset(s.q, 0, static_cast<size_t>(groups() * bytes));
    }
    void end() {
        if (tiles()) Amx::release();
    }

    void stage_query_codes(int r, const int32_t* codes) {
        AmxCodes::put_query(reinterpret_cast<int8_t*>(s.q) + r / Amx::group * AmxCodes::query_bytes(dk), dk,
                            r % Amx::group, rows <= 4 ? 4 : 8, codes);
    }

    void stage_query_values(int r, const float* q) {
        if (k_few) return static_cast<void>(std::memcpy(s.q + r * dk, q, static_cast<size_t>(dk) * sizeof(float)));
        AmxValues::put_query(reinterpret_cast<uint16_t*>(s.q) + r / Amx::group * AmxValues::query_bytes(dk) / 2, dk,
                             r % Amx::group, q);
    }

    HYBRIDKV_PHASE void scores(int64_t j, int n) {
        const int64_t pairs = (dk / kBlock + 1) / 2;
        Prefetch ahead = ahead_of_v(j, n, kTile / 16 * (k_int ? pairs : 4));
        const int64_t row = seg.shift + j;
        if (k_few) return FewRows::all_scores(*this, row, n, ahead);
        if (!k_int) return score_values(row, n, ahead);
        stage_scales(seg.k, head, row, n, s.flat, s.k_d, s.k_m);
        if (seg.k.format->has_min()) return score_codes<true>(row, n, ahead);
        score_codes<false>(row, n, ahead);
    }

    template <bool HasMin>
    void score_codes(int64_t row, int n, Prefetch& ahead) {
        if (rows <= 4) return AmxCodes::scores<HasMin, 4>(*this, row, n, ahead);
        AmxCodes::scores<HasMin, 8>(*this, row, n, ahead);
    }

    void score_values(int64_t row, int n, Prefetch& ahead) {
        uint16_t* staged = reinterpret_cast<uint16_t*>(s.k);
        for (int first = 0; first < n; first += 16) {
            const int terms = AmxValues::stage_k(seg.k, head, row + first, n - first, s.v, staged, ahead);
            for (int r = 0; r < rows; r += Amx::group) {
                const int64_t query = r / Amx::group * AmxValues::query_bytes(dk) / 2;
                AmxValues::scores(reinterpret_cast<const uint16_t*>(s.q) + query, staged, terms, dk / kBlock, in_group(r), s.scores + r * kTile + first);
            }
        }
    }

    // Operands are written one product ahead, and sums are read one product later: a tile does not load what is still
    // on its way to memory, and neither does a vector.
    template <class Kind>
    HYBRIDKV_PHASE void weigh(int64_t j, int n) {
        Prefetch ahead = ahead_of_k(j, dv / kBlock * Kind::steps);
        Kind kind(*this, seg.shift + j, n);
        typename Kind::Product products[3];
        typename Kind::Operands operands;
        const int n_groups = groups(), items = static_cast<int>(dv / kBlock) * n_groups;
        const auto prepare = [&](int item) {
            if (item >= items) return;
            const int b = item / n_groups, g = item % n_groups, r = g * Amx::group;
            kind.prepare(b, r, in_group(r), item, operands, products[item % 3], ahead);
        };
        prepare(0);
        for (int item = 0; item < items; ++item) {
            Amx::written();
            kind.multiply(item, operands, item / n_groups);
            prepare(item + 1);
            Amx::store_pair(products[item % 3].sums);
            if (item > 0) kind.finish(products[(item - 1) % 3]);
        }
        kind.finish(products[(items - 1) % 3]);
    }

    void values(int64_t j, int n) {
        if (v_few) {
            Prefetch ahead = ahead_of_k(j, dv / kBlock);
            return FewRows::all_weigh(*this, seg.shift + j, n, ahead);
        }
        return v_int ? weigh<AmxCodes::Weigh>(j, n) : weigh<AmxValues::Weigh>(j, n);
    }
};

}  // namespace

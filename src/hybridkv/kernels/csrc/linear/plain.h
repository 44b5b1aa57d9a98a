// Products in plain loops, for processors without kernels of their own: a unit of one output row is brought to
// integers once and meets all rows of activations. Compilers turn the loops into whatever vectors there are.
#pragma once

#include "activations.h"

namespace {
namespace weights {

using hybridkv::Matrix;

struct PlainOrder {
    static constexpr int unit_bytes = kUnitBytes;

    static void put(const int32_t* c, uint8_t* to) {
        int16_t* out = reinterpret_cast<int16_t*>(to);
        for (int i = 0; i < kUnit; ++i) out[i] = static_cast<int16_t>(c[i]);
    }
};

// Eight partial sums; each kernel adds them in this order.
inline float sum_of(const float* acc) {
    return ((acc[0] + acc[4]) + (acc[2] + acc[6])) + ((acc[1] + acc[5]) + (acc[3] + acc[7]));
}

// 32 products: |weight| <= 4096, |activation| <= 16383, so that the sum fits.
inline int32_t dot_32(const int16_t* w, const int16_t* x) {
    int32_t sum = 0;
    for (int i = 0; i < kGroup; ++i) sum += static_cast<int32_t>(w[i]) * x[i];
    return sum;
}

// The scales and minima of a unit per group of 32, whatever the type; codes have integer scales multiplied in.
template <class T>
inline void fold_scales(Unit& u, float* scale, float* half_min) {
    if constexpr (T::scales == Scales::ints) {
        for (int g = 0; g < 16; ++g) {
            for (int i = 16 * g; i < 16 * (g + 1); ++i) u.code[i] = static_cast<int16_t>(u.code[i] * u.scale[g]);
        }
        for (int g = 0; g < kGroups; ++g) scale[g] = u.d;
        for (int g = 0; g < 16; ++g) half_min[g] = T::has_min ? -(u.dmin * static_cast<float>(u.min[g])) : 0.f;
    } else {
        for (int g = 0; g < kGroups; ++g) scale[g] = u.group_scale[g];
        for (int g = 0; g < 16; ++g) half_min[g] = T::has_min ? u.group_min[g / 2] : 0.f;
    }
}

template <class T, class Put>
HYBRIDKV_PHASE void plain_ints(const Matrix& w, const uint8_t* x, const int32_t* x_rows, int64_t n_rows, int64_t row0,
                               int64_t row1, float* acc, Put&& put) {
    const int64_t units = units_of(w.n_in), stride = order_stride<PlainOrder>(w.n_in);
    Unit unit;
    float scale[kGroups], half_min[16];
    for (int64_t r = row0; r < row1; ++r) {
        const uint8_t* row = w.data + r * w.row_bytes;
        std::memset(acc, 0, static_cast<size_t>(n_rows) * kGroups * 4);
        for (int64_t u = 0; u < units; ++u) {
            bring_unit<T>(row, w.n_in, u, unit);
            fold_scales<T>(unit, scale, half_min);
            for (int64_t q = 0; q < n_rows; ++q) {
                const uint8_t* from = x + (x_rows ? x_rows[q] : q) * stride;
                const int16_t* codes = reinterpret_cast<const int16_t*>(from) + u * kUnit;
                const Meta& meta = reinterpret_cast<const Meta*>(from + units * kUnitBytes)[u];
                float* a = acc + q * kGroups;
                for (int g = 0; g < kGroups; ++g) {
                    const int32_t sum = dot_32(unit.code + g * kGroup, codes + g * kGroup);
                    a[g] += static_cast<float>(sum) * (scale[g] * meta.scale);
                }
                if constexpr (T::has_min) {
                    for (int g = 0; g < 16; ++g) a[g / 2] += half_min[g] * meta.half_sums[g];
                }
            }
        }
        for (int64_t q = 0; q < n_rows; ++q) put(q, r, sum_of(acc + q * kGroups));
    }
}

template <class T, class Put>
HYBRIDKV_PHASE void plain_floats(const Matrix& w, const uint8_t* x, const int32_t* x_rows, int64_t n_rows, int64_t row0,
                                 int64_t row1, float* acc, Put&& put) {
    const int64_t stride = floats_stride(w.n_in);
    for (int64_t r = row0; r < row1; ++r) {
        const uint8_t* row = w.data + r * w.row_bytes;
        std::memset(acc, 0, static_cast<size_t>(n_rows) * kGroups * 4);
        for (int64_t k = 0; k < w.n_in; k += kUnit) {
            float values[kUnit] = {};
            const int64_t width = w.n_in - k < kUnit ? w.n_in - k : kUnit;
            for (int64_t i = 0; i < width; ++i) values[i] = T::at(row + (k + i) * T::bytes);
            for (int64_t q = 0; q < n_rows; ++q) {
                const float* from = reinterpret_cast<const float*>(x + (x_rows ? x_rows[q] : q) * stride) + k;
                float* a = acc + q * kGroups;
                for (int i = 0; i < kUnit; i += kGroups) {
                    for (int lane = 0; lane < kGroups; ++lane) a[lane] += values[i + lane] * from[i + lane];
                }
            }
        }
        for (int64_t q = 0; q < n_rows; ++q) put(q, r, sum_of(acc + q * kGroups));
    }
}

struct Plain {
    static constexpr auto prepared_bytes = weights::prepared_bytes<PlainOrder>;
    static constexpr auto prepare = weights::prepare<PlainOrder>;

    static size_t scratch_bytes(const hybridkv::WeightType&, Operand, int64_t n_rows) {
        return static_cast<size_t>(n_rows) * kGroups * 4;
    }

    static Operand operand(const hybridkv::WeightType& type, int64_t, hybridkv::Activations) {
        return type.floats ? Operand::floats : Operand::ints;
    }

    static void linear(const Matrix& w, Operand, const void* prepared, const int32_t* x_rows, int64_t n_rows, int64_t row0,
                       int64_t row1, float* y, int64_t y_stride, bool add, void* scratch) {
        const uint8_t* x = static_cast<const uint8_t*>(prepared);
        const auto put = [&](int64_t q, int64_t r, float sum) {
            float& out = y[q * y_stride + r];
            out = add ? out + sum : sum;
        };
        float* acc = static_cast<float*>(scratch);
        switch (static_cast<TypeId>(w.type->id)) {
#define HYBRIDKV_CASE(T, name) \
    case TypeId::T: return run<T>(w, x, x_rows, n_rows, row0, row1, acc, put);
            HYBRIDKV_WEIGHTS(HYBRIDKV_CASE)
#undef HYBRIDKV_CASE
        }
    }

private:
    template <class T, class Put>
    static void run(const Matrix& w, const uint8_t* x, const int32_t* x_rows, int64_t n_rows, int64_t row0,
                    int64_t row1, float* acc, Put&& put) {
        if constexpr (T::scales == Scales::none) plain_floats<T>(w, x, x_rows, n_rows, row0, row1, acc, put);
        else plain_ints<T>(w, x, x_rows, n_rows, row0, row1, acc, put);
    }
};

}  // namespace weights
}  // namespace

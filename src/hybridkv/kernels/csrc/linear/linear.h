// The body of a translation unit of one instruction set: define HYBRIDKV_LINEAR_RECORD, include a simd_*.h, then this.
#pragma once

#if defined(__AVX512VNNI__)
#include "bring_avx512.h"
#elif defined(__AVX2__)
#include "bring_avx2.h"
#elif defined(HYBRIDKV_NEON)
#include "bring_neon.h"
#endif

#include "plain.h"

#if defined(__AVX2__) || defined(HYBRIDKV_NEON)
#include "floats.h"
#if defined(HYBRIDKV_NEON)
#include "rows_neon.h"
#elif !defined(__AVX512VNNI__)
#include "one_row.h"
#define HYBRIDKV_ONE_ROW 1
#endif

namespace {
namespace weights {

constexpr int kFewRows = 4;  // as many as share a row in registers

#if defined(HYBRIDKV_NEON)
using ManyInts = ManyTerms;
template <class T, int NQ>
constexpr auto few_ints = stream_rows<T, NQ>;
#else
using ManyInts = Many;
template <class T, int NQ>
constexpr auto few_ints = few_rows<T, NQ>;
#endif

#if !defined(HYBRIDKV_ONE_ROW)
template <class T>
constexpr bool kOneRow = false;
#endif

template <class T>
void linear_ints(const Matrix& w, Operand operand, const uint8_t* x, const int32_t* x_rows, int64_t n_rows,
                 int64_t row0, int64_t row1, const Output& out, void* scratch) {
#if defined(HYBRIDKV_ONE_ROW)
    if constexpr (kOneRow<T>) {
        if (operand == Operand::bytes) {
            const int64_t stride = order_stride<ByteOrder>(w.n_in);
            return one_row<T>(w, x + (x_rows ? *x_rows : 0) * stride, row0, row1, out);
        }
    }
#endif
    (void)operand;
    if (n_rows > kFewRows) return ManyInts::linear<T>(w, x, x_rows, n_rows, row0, row1, out, scratch);
    const int64_t stride = order_stride<Order>(w.n_in), units = units_of(w.n_in);
    Many::for_rows<kFewRows>(n_rows, [&](auto group, int64_t q) {
        constexpr int n = decltype(group)::count;
        few_ints<T, n>(w, Taken<n>(x, stride, x_rows, q, units), q, row0, row1, out);
    });
}

struct Vectors {
    // One row of few inputs a byte is all that is streamed: there the form that costs less work to meet pays.
    static Operand operand(const hybridkv::WeightType& type, int64_t n_rows) {
        switch (static_cast<TypeId>(type.id)) {
#define HYBRIDKV_CASE(T, name) \
    case TypeId::T: return kOneRow<T> && n_rows == 1 ? Operand::bytes : Operand::ints;
            HYBRIDKV_GROUP_WEIGHTS(HYBRIDKV_CASE)
            HYBRIDKV_SCALED_WEIGHTS(HYBRIDKV_CASE)
            HYBRIDKV_GRID_WEIGHTS(HYBRIDKV_CASE)
#undef HYBRIDKV_CASE
            default: return Operand::floats;
        }
    }

    static size_t scratch_bytes(const hybridkv::WeightType& type, int64_t, int64_t n_rows) {
        if (type.floats) return sizeof(Floats::Scratch);
        if (n_rows <= kFewRows) return 0;
        switch (static_cast<TypeId>(type.id)) {
#define HYBRIDKV_CASE(T, name) \
    case TypeId::T: return sizeof(ManyInts::Scratch<T>);
            HYBRIDKV_GROUP_WEIGHTS(HYBRIDKV_CASE)
            HYBRIDKV_SCALED_WEIGHTS(HYBRIDKV_CASE)
            HYBRIDKV_GRID_WEIGHTS(HYBRIDKV_CASE)
#undef HYBRIDKV_CASE
            default: return 0;
        }
    }

    static void linear(const Matrix& w, Operand operand, const void* prepared, const int32_t* x_rows, int64_t n_rows,
                       int64_t row0, int64_t row1, float* y, int64_t y_stride, bool add, void* scratch) {
        const uint8_t* x = static_cast<const uint8_t*>(prepared);
        const Output out{y, y_stride, add};
        switch (static_cast<TypeId>(w.type->id)) {
#define HYBRIDKV_CASE(T, name) \
    case TypeId::T: return linear_ints<T>(w, operand, x, x_rows, n_rows, row0, row1, out, scratch);
            HYBRIDKV_GROUP_WEIGHTS(HYBRIDKV_CASE)
            HYBRIDKV_SCALED_WEIGHTS(HYBRIDKV_CASE)
            HYBRIDKV_GRID_WEIGHTS(HYBRIDKV_CASE)
#undef HYBRIDKV_CASE
#define HYBRIDKV_CASE(T, name) \
    case TypeId::T: return Floats::linear<T>(w, x, x_rows, n_rows, row0, row1, out, scratch);
            HYBRIDKV_FLOAT_WEIGHTS(HYBRIDKV_CASE)
#undef HYBRIDKV_CASE
        }
    }
};

using Products = Vectors;

}  // namespace weights
}  // namespace
#else
namespace {
namespace weights {
using Order = PlainOrder;
using Products = Plain;
}  // namespace weights
}  // namespace
#endif

namespace hybridkv {
extern const LinearKernels HYBRIDKV_LINEAR_RECORD;
const LinearKernels HYBRIDKV_LINEAR_RECORD = {weights::Products::operand, weights::prepared_bytes<weights::Order>,
                                              weights::prepare<weights::Order>,
                                              weights::Products::scratch_bytes, weights::Products::linear};
}  // namespace hybridkv

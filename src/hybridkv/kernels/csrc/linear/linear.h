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

#if defined(__AVX512VNNI__)
namespace hybridkv {
extern const LinearKernels kLinearAvx2;  // its products with activations of 8 bits are these processors' too
}
#endif

#if defined(__AVX2__) || defined(HYBRIDKV_NEON)
#include "floats.h"
#if defined(HYBRIDKV_NEON)
#include "rows_neon.h"
#elif !defined(__AVX512VNNI__)
#include "int8_rows.h"
#include "one_row.h"
#include "pair_rows.h"
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
template <class T>
constexpr int kSummed = 0;
template <class T>
constexpr bool kPaired = false;
#else
template <class T>
constexpr bool kPaired = T::scales == Scales::floats;
#endif

#if defined(HYBRIDKV_ONE_ROW)
template <class T>
void linear_int8(const Matrix& w, const uint8_t* x, const int32_t* x_rows, int64_t n_rows, int64_t row0, int64_t row1,
                 const Output& out, void* scratch) {
    if (n_rows > kFewRows) return ManyInt8::linear<T>(w, x, x_rows, n_rows, row0, row1, out, scratch);
    const int64_t stride = int8_stride(w.n_in), units = units_of(w.n_in);
    Many::for_rows<kFewRows>(n_rows, [&](auto group, int64_t q) {
        constexpr int n = decltype(group)::count;
        int8_few<T, n>(w, Int8Taken<n>(x, stride, x_rows, q, units), q, row0, row1, out);
    });
}
#endif

#if defined(HYBRIDKV_ONE_ROW)
template <class T>
void linear_pairs(const Matrix& w, const uint8_t* x, const int32_t* x_rows, int64_t n_rows, int64_t row0, int64_t row1,
                  const Output& out, void* scratch) {
    if (n_rows > kFewRows && !ManyPairs::few(n_rows, w.n_in)) {
        return ManyPairs::linear<T>(w, x, x_rows, n_rows, row0, row1, out, scratch);
    }
    const int64_t stride = order_stride<PairOrder>(w.n_in), units = units_of(w.n_in);
    Many::last<kTogether>(n_rows, [&](auto group, int64_t q) {
        constexpr int n = decltype(group)::count;
        few_pair_rows<T, n>(w, Taken<n>(x, stride, x_rows, q, units), q, row0, row1, out);
    }, 0);
}
#endif

template <class T>
void linear_words(const Matrix& w, const uint8_t* x, const int32_t* x_rows, int64_t n_rows, int64_t row0, int64_t row1,
                  const Output& out, void* scratch) {
    if (n_rows > kFewRows) return ManyInts::linear<T>(w, x, x_rows, n_rows, row0, row1, out, scratch);
    const int64_t stride = order_stride<Order>(w.n_in), units = units_of(w.n_in);
    Many::for_rows<kFewRows>(n_rows, [&](auto group, int64_t q) {
        constexpr int n = decltype(group)::count;
        few_ints<T, n>(w, Taken<n>(x, stride, x_rows, q, units), q, row0, row1, out);
    });
}

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
    if constexpr (kSummed<T> > 0) {
        if (operand == Operand::int8) return linear_int8<T>(w, x, x_rows, n_rows, row0, row1, out, scratch);
    }
    if constexpr (kPaired<T>) return linear_pairs<T>(w, x, x_rows, n_rows, row0, row1, out, scratch);
#endif
    (void)operand;
    if constexpr (!kPaired<T>) linear_words<T>(w, x, x_rows, n_rows, row0, row1, out, scratch);
}

template <class T>
size_t many_scratch(bool int8) {
#if defined(HYBRIDKV_ONE_ROW)
    if constexpr (kSummed<T> > 0) {
        if (int8) return sizeof(ManyInt8::Scratch<T>);
    }
    if constexpr (kPaired<T>) return sizeof(ManyPairs::Scratch<T>);
    else
#endif
    (void)int8;
    return sizeof(ManyInts::Scratch<T>);
}

struct Vectors {
    // One row of few inputs a byte is all that is streamed: there the form that costs less work to meet pays.
    static Operand operand(const hybridkv::WeightType& type, int64_t n_rows, hybridkv::Activations wished) {
        const bool int8 = wished == hybridkv::Activations::int8;
#if defined(__AVX512VNNI__)
        if (int8 && hybridkv::kLinearAvx2.operand(type, n_rows, wished) == Operand::int8) return Operand::int8;
#endif
        switch (static_cast<TypeId>(type.id)) {
#define HYBRIDKV_CASE(T, name) \
    case TypeId::T: return int8 && kSummed<T> > 0 ? Operand::int8 : kOneRow<T> && n_rows == 1 ? Operand::bytes : kPaired<T> ? Operand::pairs : Operand::ints;
            HYBRIDKV_GROUP_WEIGHTS(HYBRIDKV_CASE)
            HYBRIDKV_SCALED_WEIGHTS(HYBRIDKV_CASE)
            HYBRIDKV_GRID_WEIGHTS(HYBRIDKV_CASE)
#undef HYBRIDKV_CASE
            default: return Operand::floats;
        }
    }

    static size_t prepared_bytes(Operand operand, int64_t n_in, int64_t n_rows) {
#if defined(__AVX512VNNI__)
        if (operand == Operand::int8) return hybridkv::kLinearAvx2.prepared_bytes(operand, n_in, n_rows);
#elif defined(HYBRIDKV_ONE_ROW)
        if (operand == Operand::int8) return static_cast<size_t>(n_rows * int8_stride(n_in));
        if (operand == Operand::pairs) operand = Operand::ints;  // as many, in another order
#endif
        return weights::prepared_bytes<Order>(operand, n_in, n_rows);
    }

    static void prepare(Operand operand, const float* x, int64_t x_stride, int64_t n_in, int64_t r0, int64_t r1,
                        void* prepared) {
#if defined(__AVX512VNNI__)
        if (operand == Operand::int8) return hybridkv::kLinearAvx2.prepare(operand, x, x_stride, n_in, r0, r1, prepared);
#elif defined(HYBRIDKV_ONE_ROW)
        if (operand == Operand::int8) return prepare_int8(x, x_stride, n_in, r0, r1, static_cast<uint8_t*>(prepared));
        if (operand == Operand::pairs) return weights::prepare<PairOrder>(Operand::ints, x, x_stride, n_in, r0, r1, prepared);
#endif
        weights::prepare<Order>(operand, x, x_stride, n_in, r0, r1, prepared);
    }

    static size_t scratch_bytes(const hybridkv::WeightType& type, Operand operand, int64_t n_rows) {
        if (type.floats) return sizeof(Floats::Scratch);
        if (n_rows <= kFewRows) return 0;
        const bool int8 = operand == Operand::int8;
#if defined(__AVX512VNNI__)
        if (int8) return hybridkv::kLinearAvx2.scratch_bytes(type, operand, n_rows);
#endif
        switch (static_cast<TypeId>(type.id)) {
#define HYBRIDKV_CASE(T, name) \
    case TypeId::T: return many_scratch<T>(int8);
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
#if defined(__AVX512VNNI__)
        if (operand == Operand::int8) {
            return hybridkv::kLinearAvx2.linear(w, operand, prepared, x_rows, n_rows, row0, row1, y, y_stride, add, scratch);
        }
#endif
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
const LinearKernels HYBRIDKV_LINEAR_RECORD = {weights::Products::operand, weights::Products::prepared_bytes,
                                              weights::Products::prepare, weights::Products::scratch_bytes,
                                              weights::Products::linear};
}  // namespace hybridkv

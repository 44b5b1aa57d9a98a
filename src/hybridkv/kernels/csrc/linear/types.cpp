// The table of weight types: decoding, and the search for scales that are no numbers.
#include "types.h"

#include <cstring>
#include <stdexcept>
#include <string>

namespace hybridkv {
namespace {

using namespace weights;

template <class T>
void decode(const uint8_t* row, int64_t n, float* out) {
    if constexpr (T::scales == Scales::none) {
        for (int64_t i = 0; i < n; ++i) out[i] = T::at(row + i * T::bytes);
    } else {
        Unit u;
        for (int64_t at = 0; at < n; at += kUnit, out += kUnit) {
            bring_unit<T>(row, n, at / kUnit, u);
            const int64_t width = n - at < kUnit ? n - at : kUnit;
            for (int64_t i = 0; i < width; ++i) {
                if constexpr (T::scales == Scales::ints) {
                    out[i] = u.d * static_cast<float>(u.scale[i / 16]) * static_cast<float>(u.code[i]);
                    if constexpr (T::has_min) out[i] -= u.dmin * static_cast<float>(u.min[i / 16]);
                } else {
                    out[i] = u.group_scale[i / kGroup] * static_cast<float>(u.code[i]);
                    if constexpr (T::has_min) out[i] += u.group_min[i / kGroup];
                }
            }
        }
    }
}

template <class T>
int64_t find_bad(const uint8_t* row, int64_t n_blocks) {
    for (int64_t b = 0; b < n_blocks; ++b, row += T::bytes) {
        if (!T::fine(row)) return b;
    }
    return -1;
}

template <class T>
constexpr WeightType row_of(const char* name, TypeId id) {
    return {name, T::block, T::bytes, T::scales == Scales::none, decode<T>, find_bad<T>, static_cast<int>(id)};
}

const WeightType kTypes[] = {
#define HYBRIDKV_ROW(T, name) row_of<T>(name, TypeId::T),
    HYBRIDKV_WEIGHTS(HYBRIDKV_ROW)
#undef HYBRIDKV_ROW
};

struct GridTable {
    const char* types[2];
    uint8_t* bytes;
    size_t size;
    bool ready;
};

GridTable kTables[] = {
    {{"iq2_xxs", ""}, reinterpret_cast<uint8_t*>(grids.iq2_xxs), sizeof grids.iq2_xxs, false},
    {{"iq2_xs", ""}, reinterpret_cast<uint8_t*>(grids.iq2_xs), sizeof grids.iq2_xs, false},
    {{"iq2_s", ""}, reinterpret_cast<uint8_t*>(grids.iq2_s), sizeof grids.iq2_s, false},
    {{"iq3_xxs", ""}, reinterpret_cast<uint8_t*>(grids.iq3_xxs), sizeof grids.iq3_xxs, false},
    {{"iq3_s", ""}, reinterpret_cast<uint8_t*>(grids.iq3_s), sizeof grids.iq3_s, false},
    {{"iq1_s", "iq1_m"}, reinterpret_cast<uint8_t*>(grids.iq1), sizeof grids.iq1, false},
};

GridTable* table_of(const char* type) {
    for (GridTable& table : kTables) {
        for (const char* name : table.types) {
            if (std::strcmp(name, type) == 0) return &table;
        }
    }
    return nullptr;
}

}  // namespace

Grids grids;

void set_grid(const char* type, const void* bytes, size_t size) {
    GridTable* table = table_of(type);
    if (table == nullptr || table->size != size) throw std::invalid_argument(std::string("the grid of ") + type);
    std::memcpy(table->bytes, bytes, size);
    table->ready = true;
}

const WeightType& weight_type(const char* name) {
    for (const WeightType& type : kTypes) {
        if (std::strcmp(type.name, name) != 0) continue;
        const GridTable* table = table_of(name);
        if (table && !table->ready) throw std::invalid_argument(std::string("no grid was set for ") + name);
        return type;
    }
    throw std::invalid_argument(std::string("no native kernel reads weights of type ") + name);
}

}  // namespace hybridkv

// Weights as they lie in a GGUF file, and products with them: y = W x. Knows no SIMD.
//
// A matrix is n_out rows of ggml blocks, read where they are; no alignment is asked for. Activations are brought once
// into one of five forms (an operand), whatever the types of the weights that they meet: integers of 15 bits with a
// scale per 256 inputs, the same in another order, or cut into two bytes, integers of 8 bits with a scale per 32, or floats. Sums of
// integers are exact and units of 256 inputs are added in order, floats are summed along fixed lanes: a row's result has
// the same bits whatever the number of rows beside it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hybridkv {

// What quantized weights meet where there is a choice.
enum class Activations : uint8_t { int16, int8 };

enum class Operand : uint8_t { ints, pairs, bytes, floats, int8 };
constexpr int kOperands = 5;

struct WeightType {
    const char* name;  // ggml's spelling, as in formats/weights.py
    int block, bytes;  // values in a block, bytes of a block
    bool floats;       // no codes: meets activations as floats
    // `n` values (whole blocks) from `row` on, with the bits of gguf-py's dequantize
    void (*decode)(const uint8_t* row, int64_t n, float* out);
    // First block of `n_blocks` whose scale or minimum is NaN or infinite; -1 if there is none
    int64_t (*find_bad)(const uint8_t* row, int64_t n_blocks);
    int id;  // position in the table

    int64_t row_bytes(int64_t n_in) const { return n_in / block * bytes; }
};

// Throws std::invalid_argument if there is no such type, or if it needs a grid that was not set.
const WeightType& weight_type(const char* name);

// The values that the codes of a type index, as grids.h lays them out. Throws if the type has none of this size.
void set_grid(const char* type, const void* bytes, size_t size);

struct Matrix {
    const WeightType* type;
    int64_t n_out, n_in, row_bytes;
    const uint8_t* data;
};

// What one instruction set does with matrices.
struct LinearKernels {
    // What a type meets in products of at most `n_rows` rows each; a type that has no product with what is wished for
    // meets int16.
    Operand (*operand)(const WeightType& type, int64_t n_rows, Activations wished);
    // Bytes of `n_rows` rows of activations, 64-byte aligned. Rows lie `prepared_bytes(operand, n_in, 1)` apart.
    size_t (*prepared_bytes)(Operand operand, int64_t n_in, int64_t n_rows);
    // Rows [r0, r1) of x, which lie x_stride floats apart.
    void (*prepare)(Operand operand, const float* x, int64_t x_stride, int64_t n_in, int64_t r0, int64_t r1,
                    void* prepared);
    // Bytes of memory, 64-byte aligned, that a thread needs for a product with `n_rows` rows.
    size_t (*scratch_bytes)(const WeightType& type, Operand operand, int64_t n_rows);
    // With activations in the form `operand`: y[i][row0 .. row1) = W[row0 .. row1) x[x_rows[i]] for i in 0..n_rows-1,
    // added to what is there if `add`. Without x_rows, i is the prepared row. Rows of y lie y_stride floats apart; y is
    // that of output row 0.
    void (*linear)(const Matrix& w, Operand operand, const void* prepared, const int32_t* x_rows, int64_t n_rows, int64_t row0,
                   int64_t row1, float* y, int64_t y_stride, bool add, void* scratch);
};

// Cuts a matrix's output rows into tasks: calls task(row0, row1). `bytes_left` are those of all matrices of a call that
// are not handed out yet: long streams come first, for each start costs, and then ever shorter ones, so that threads end
// together.
template <class Task>
inline void cut_rows(const Matrix& w, int64_t& bytes_left, int n_threads, const Task& task) {
    constexpr int64_t kLeastBytes = 64 << 10, kRowTile = 24;  // many_rows.h brings so many rows at once
    for (int64_t row0 = 0, row1; row0 < w.n_out; row0 = row1) {
        const int64_t share = bytes_left / (n_threads * 3), bytes = share > kLeastBytes ? share : kLeastBytes;
        int64_t rows = bytes / (w.row_bytes > 0 ? w.row_bytes : 1) + 1;
        rows = rows > kRowTile ? (rows + kRowTile - 1) / kRowTile * kRowTile : (rows + 3) / 4 * 4;
        row1 = row0 + rows < w.n_out ? row0 + rows : w.n_out;
        task(row0, row1);
        bytes_left -= (row1 - row0) * w.row_bytes;
    }
}

}  // namespace hybridkv

// The KV formats as the native kernels see them: one row per format, the C++ twin of hybridkv/formats/table.py
// (tests/kernels/test_cpu_native.py compares the two). Knows no SIMD and no attention.
#pragma once

#include <cstdint>

namespace hybridkv {

constexpr int kBlock = 32;      // lanes in a block, and the granularity to which rows are padded in scratch
constexpr int kMaxPlanes = 4;
constexpr int kStarts = 5;      // fits that a refit from several starts tries

// How a code of a block lies in the bytes of its planes.
enum class BitLayout : uint8_t { f32, f16, bf16, bytes, nibbles, nibbles_bits, nibbles_pairs, pairs, pairs_bits };

enum class Rule : uint8_t { cast, abs_max, signed_max, min_max };
enum class Rounding : uint8_t { away, even, up, nearest };

// Plane indices are positions in ggml's field order; -1 where a format has no such plane.
struct Format {
    const char* name;
    BitLayout layout;
    Rule rule;
    Rounding rounding;
    int8_t zero;                       // code of the value 0
    int8_t plane_d, plane_m, plane_s;  // scale, minimum, sum
    int8_t plane_high, plane_codes;    // upper bits of the codes; codes (or plain values)
    int8_t n_planes;
    uint8_t plane_bytes[kMaxPlanes];   // per block; per value for f32, f16, bf16
    const int8_t* codebook;            // value of each code in units of the scale, or null; 16 bytes
    const int16_t* starts;             // what a refit scales the largest magnitude to, kStarts of them, or null
    bool row_scale;                    // one block per row: d is a float32, and the codes are not padded

    constexpr bool quantized() const { return rule != Rule::cast; }
    constexpr bool has_min() const { return plane_m >= 0; }
};

constexpr int8_t kIq4nl[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

// For rotated rows: docs/decisions/own-formats.md.
constexpr int8_t kHq4nl[16] = {-127, -98, -77, -60, -45, -31, -18, -6, 6, 18, 31, 45, 60, 77, 98, 127};
constexpr int8_t kHq3nl[16] = {-127, -77, -42, -14, 14, 42, 77, 127};
constexpr int8_t kHq2nl[16] = {-127, -37, 37, 127};
constexpr int16_t kHq4Starts[kStarts] = {121, 125, 130, 135, 140};
constexpr int16_t kHq3Starts[kStarts] = {121, 132, 143, 154, 165};
constexpr int16_t kHq2Starts[kStarts] = {152, 176, 200, 224, 248};

// clang-format off
constexpr Format kFormats[] = {
    //  name     layout                    rule              rounding          zero  d   m   s  high codes n  bytes          codebook starts      row
    {"f32",    BitLayout::f32,           Rule::cast,       Rounding::even,     0, -1, -1, -1, -1, 0, 1, {4},            nullptr, nullptr,    false},
    {"f16",    BitLayout::f16,           Rule::cast,       Rounding::even,     0, -1, -1, -1, -1, 0, 1, {2},            nullptr, nullptr,    false},
    {"bf16",   BitLayout::bf16,          Rule::cast,       Rounding::even,     0, -1, -1, -1, -1, 0, 1, {2},            nullptr, nullptr,    false},
    {"q8_0",   BitLayout::bytes,         Rule::abs_max,    Rounding::away,     0,  0, -1, -1, -1, 1, 2, {2, 32},        nullptr, nullptr,    false},
    {"q8_1",   BitLayout::bytes,         Rule::abs_max,    Rounding::away,     0,  0, -1,  1, -1, 2, 3, {2, 2, 32},     nullptr, nullptr,    false},
    {"q8_KV",  BitLayout::bytes,         Rule::abs_max,    Rounding::even,     0,  0, -1,  1, -1, 2, 3, {4, 4, 1},      nullptr, nullptr,    true},
    {"q6_0",   BitLayout::nibbles_pairs, Rule::signed_max, Rounding::up,      32,  0, -1, -1,  1, 2, 3, {2, 8, 16},     nullptr, nullptr,    false},
    {"q5_0",   BitLayout::nibbles_bits,  Rule::signed_max, Rounding::up,      16,  0, -1, -1,  1, 2, 3, {2, 4, 16},     nullptr, nullptr,    false},
    {"q5_1",   BitLayout::nibbles_bits,  Rule::min_max,    Rounding::up,       0,  0,  1, -1,  2, 3, 4, {2, 2, 4, 16},  nullptr, nullptr,    false},
    {"q4_0",   BitLayout::nibbles,       Rule::signed_max, Rounding::up,       8,  0, -1, -1, -1, 1, 2, {2, 16},        nullptr, nullptr,    false},
    {"q4_1",   BitLayout::nibbles,       Rule::min_max,    Rounding::up,       0,  0,  1, -1, -1, 2, 3, {2, 2, 16},     nullptr, nullptr,    false},
    {"iq4_nl", BitLayout::nibbles,       Rule::signed_max, Rounding::nearest,  8,  0, -1, -1, -1, 1, 2, {2, 16},        kIq4nl,  nullptr,    false},
    {"hq4_nl", BitLayout::nibbles,       Rule::abs_max,    Rounding::nearest,  0,  0, -1, -1, -1, 1, 2, {2, 16},        kHq4nl,  kHq4Starts, false},
    {"hq3_nl", BitLayout::pairs_bits,    Rule::abs_max,    Rounding::nearest,  0,  0, -1, -1,  1, 2, 3, {2, 4, 8},      kHq3nl,  kHq3Starts, false},
    {"hq2_nl", BitLayout::pairs,         Rule::abs_max,    Rounding::nearest,  0,  0, -1, -1, -1, 1, 2, {2, 8},         kHq2nl,  kHq2Starts, false},
};
// clang-format on
constexpr int kNumFormats = static_cast<int>(sizeof(kFormats) / sizeof(kFormats[0]));

// Blocks in a row; a row of q8_KV counts as one, plain values as one each.
constexpr int64_t n_blocks(const Format& f, int64_t head_dim) {
    if (f.row_scale) return 1;
    return f.quantized() ? (head_dim + kBlock - 1) / kBlock : head_dim;
}

constexpr int64_t plane_row_bytes(const Format& f, int plane, int64_t head_dim) {
    if (f.row_scale && plane == f.plane_codes) return head_dim;
    return n_blocks(f, head_dim) * f.plane_bytes[plane];
}

}  // namespace hybridkv

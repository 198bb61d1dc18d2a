// Small matrix products for panels of vectors: W x (weights broadcast, columns in lanes), and a bᵀ summed over lanes.
//
// A panel is [rows][stride] floats whose row holds `count` vectors. The register tile fills the register file of the
// instruction set; weights are read where they are, row-major, because packing them would not be faster.
#pragma once

#include "vector.h"

namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int TILE_ROWS = 8, TILE_VECTORS = 3, OUTER_ROWS = 4, OUTER_COLUMNS = 6;
#else
constexpr int TILE_ROWS = 4, TILE_VECTORS = 2, OUTER_ROWS = 2, OUTER_COLUMNS = 4;
#endif

// Rows to allocate for a panel that `outer` reads: it reads whole register tiles.
inline int64_t panel_rows(int64_t rows) { return rows + larger(OUTER_ROWS, OUTER_COLUMNS) - 1; }

enum Start { ZERO = 0, BIAS = 1, ADD = 2, BIAS_AND_ADD = 3 };
enum Finish { PLAIN, RELU };

struct Product {
    const float *weight;  // [rows][weight_stride]
    int64_t weight_stride;
    const float *bias;  // [rows], read with BIAS
    int64_t rows, depth;
    Start start;
    Finish finish;
    int64_t added = 0;  // what ADD adds lies this many floats behind the output
    bool far = false;   // the output lies in memory rather than in the core's cache: fetched while the sums are made
};

template <int ROWS, int VECTORS>
__attribute__((noinline)) void product_tile(const Product &p, int64_t row, const float *in, int64_t in_stride,
                                            float *out, int64_t out_stride) {
    Vector sum[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++)
            sum[r][v] = p.start & BIAS ? broadcast(p.bias[row + r]) : Vector{};
    for (int r = 0; p.far && r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++) {
            const float *to = out + (row + r) * out_stride + v * LANES;
            __builtin_prefetch(to, 1);
            if (p.start & ADD) __builtin_prefetch(to + p.added);
        }
    const float *weight = p.weight + row * p.weight_stride;
    for (int64_t d = 0; d < p.depth; d++) {
        Vector x[VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) x[v] = load(in + d * in_stride + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            Vector w = broadcast(weight[r * p.weight_stride + d]);
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) sum[r][v] += w * x[v];
        }
    }
    // Added last, when what was fetched has come.
    if (p.start & ADD)
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) sum[r][v] += load(out + p.added + (row + r) * out_stride + v * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++)
            store(out + (row + r) * out_stride + v * LANES, p.finish == RELU ? rectified(sum[r][v]) : sum[r][v]);
}

template <int VECTORS>
void product_columns(const Product &p, const float *in, int64_t in_stride, float *out, int64_t out_stride) {
    int64_t row = 0;
    for (; row + TILE_ROWS <= p.rows; row += TILE_ROWS)
        product_tile<TILE_ROWS, VECTORS>(p, row, in, in_stride, out, out_stride);
    if (TILE_ROWS > 4 && p.rows - row >= 4) {
        product_tile<4, VECTORS>(p, row, in, in_stride, out, out_stride);
        row += 4;
    }
    if (p.rows - row >= 2) {
        product_tile<2, VECTORS>(p, row, in, in_stride, out, out_stride);
        row += 2;
    }
    if (p.rows > row) product_tile<1, VECTORS>(p, row, in, in_stride, out, out_stride);
}

// out [rows][count vectors] = weight · in [depth][count vectors], started and finished as `p` says.
inline void product(const Product &p, const float *in, int64_t in_stride, float *out, int64_t out_stride,
                    int64_t count) {
    int64_t v = 0;
    // A lone last vector would leave most of the register tile empty: three and one are better as two and two.
    for (; count - v >= TILE_VECTORS && (TILE_VECTORS < 3 || count - v != 4); v += TILE_VECTORS)
        product_columns<TILE_VECTORS>(p, in + v * LANES, in_stride, out + v * LANES, out_stride);
    for (; count - v >= 2; v += 2)
        product_columns<2>(p, in + v * LANES, in_stride, out + v * LANES, out_stride);
    if (v < count) product_columns<1>(p, in + v * LANES, in_stride, out + v * LANES, out_stride);
}

// Lane sums of a register tile, row by row.
inline void outer_tile(const float *a, int64_t a_stride, const float *b, int64_t b_stride, int64_t count, float *sums) {
    constexpr int SIZE = OUTER_ROWS * OUTER_COLUMNS;
    Vector sum[(SIZE + LANES - 1) / LANES * LANES] = {};
    for (int64_t v = 0; v < count; v++) {
        Vector y[OUTER_COLUMNS];
#pragma GCC unroll 8
        for (int c = 0; c < OUTER_COLUMNS; c++) y[c] = load(b + c * b_stride + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < OUTER_ROWS; r++) {
            Vector x = load(a + r * a_stride + v * LANES);
#pragma GCC unroll 8
            for (int c = 0; c < OUTER_COLUMNS; c++) sum[r * OUTER_COLUMNS + c] += x * y[c];
        }
    }
    for (int first = 0; first < SIZE; first += LANES) store(sums + first, lane_sums(sum + first));
}

// out [rows][out_stride] += Σ over vectors and lanes of a [rows] b [columns]ᵀ; `upper` leaves out what lies below the
// diagonal's tiles. Both panels have the rows to read that `panel_rows` tells.
template <typename Number>
void outer(const float *a, int64_t a_stride, int64_t rows, const float *b, int64_t b_stride, int64_t columns,
           int64_t count, Number *out, int64_t out_stride, bool upper) {
    float part[OUTER_ROWS * OUTER_COLUMNS + LANES];
    for (int64_t c = 0; c < columns; c += OUTER_COLUMNS)
        for (int64_t r = 0; r < rows && (!upper || r < c + OUTER_COLUMNS); r += OUTER_ROWS) {
            outer_tile(a + r * a_stride, a_stride, b + c * b_stride, b_stride, count, part);
            for (int i = 0; i < OUTER_ROWS && r + i < rows; i++)
                for (int j = 0; j < OUTER_COLUMNS && c + j < columns; j++)
                    out[(r + i) * out_stride + c + j] += part[i * OUTER_COLUMNS + j];
        }
}

}  // namespace

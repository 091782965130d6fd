/* The inner loop of every product in the prefill ops, and of attention: R rows times two vectors, held in registers. */
#ifndef REPKV_MICROKERNEL_H
#define REPKV_MICROKERNEL_H

#include <stddef.h>

#include "simd.h"

/* 2 * ROWS accumulators, 2 operands and a broadcast fill the vector registers: 32 of AVX-512 and NEON, 16 of others. A vector
 * wider than the CPU's would lie in memory. */
#if defined(__AVX512F__)
enum { ROWS = 12 };
typedef f32x16 tile;
#elif defined(__AVX2__)
enum { ROWS = 6 };
typedef f32x8 tile;
#else
#if defined(__aarch64__)
enum { ROWS = 12 };
#else
enum { ROWS = 6 };
#endif
typedef float tile __attribute__((vector_size(16), aligned(4)));
#endif
typedef tile stored_tile __attribute__((may_alias));
enum { TILE_LANES = (int)(sizeof(tile) / sizeof(float)) };

/* What is read next from 32 rows of an arena: step k of a product asks for the line at rows[k % 32] + offset + k / 32 * step.
 * Asked for in a burst, lines wait for each other, and the processor for them. */
struct ahead {
    const char *const *rows;
    size_t offset, step;
};

/* c[r][0..31] (+)= sum_k a[r * row_stride + k * k_stride] * b[k * b_stride + 0..31], for n_rows rows of c with stride
 * c_stride. */
static inline __attribute__((always_inline)) void product_rows(const int n_rows, float *c, size_t c_stride, const float *a,
                                                               size_t row_stride, size_t k_stride, const float *b,
                                                               const size_t b_stride, int n_k, const int accumulate,
                                                               const struct ahead *ahead) {
    for (int lane = 0; lane < 32; lane += 2 * TILE_LANES) {
        const float *x = a, *y = b + lane;
        tile acc[ROWS > 8 ? ROWS : 8][2];
#pragma GCC unroll 12
        for (int r = 0; r < n_rows; r++) {
            const stored_tile *from = (const stored_tile *)(c + (size_t)r * c_stride + lane);
            acc[r][0] = acc[r][1] = (tile){0};
            if (accumulate) {
                acc[r][0] = from[0];
                acc[r][1] = from[1];
            }
        }
        for (int k = 0; k < n_k; k++) {
            if (ahead && lane == 0) __builtin_prefetch(ahead->rows[k % 32] + ahead->offset + (size_t)(k / 32) * ahead->step);
            const tile b0 = ((const stored_tile *)y)[0], b1 = ((const stored_tile *)y)[1];
#pragma GCC unroll 12
            for (int r = 0; r < n_rows; r++) {
                const float v = x[(size_t)r * row_stride];
                acc[r][0] += v * b0;
                acc[r][1] += v * b1;
            }
            x += k_stride;
            y += b_stride;
        }
#pragma GCC unroll 12
        for (int r = 0; r < n_rows; r++) {
            stored_tile *to = (stored_tile *)(c + (size_t)r * c_stride + lane);
            to[0] = acc[r][0];
            to[1] = acc[r][1];
        }
    }
}

/* As product_rows with a b_stride of 32, for any number of rows, in register tiles. */
static inline void product(int n_rows, float *c, size_t c_stride, const float *a, size_t row_stride, size_t k_stride,
                           const float *b, int n_k, const int accumulate) {
    int r = 0;
    for (; r + ROWS <= n_rows; r += ROWS) {
        product_rows(ROWS, c + (size_t)r * c_stride, c_stride, a + (size_t)r * row_stride, row_stride, k_stride, b, 32, n_k, accumulate, NULL);
    }
    for (; ROWS > 8 && r + 8 <= n_rows; r += 8) {
        product_rows(8, c + (size_t)r * c_stride, c_stride, a + (size_t)r * row_stride, row_stride, k_stride, b, 32, n_k, accumulate, NULL);
    }
    for (; r + 4 <= n_rows; r += 4) {
        product_rows(4, c + (size_t)r * c_stride, c_stride, a + (size_t)r * row_stride, row_stride, k_stride, b, 32, n_k, accumulate, NULL);
    }
    for (; r < n_rows; r++) {
        product_rows(1, c + (size_t)r * c_stride, c_stride, a + (size_t)r * row_stride, row_stride, k_stride, b, 32, n_k, accumulate, NULL);
    }
}

/* As product_rows with a k_stride of 1, for the few query heads of a key head. */
static inline void product_few(int n_rows, float *c, size_t c_stride, const float *a, size_t row_stride, const float *b,
                               size_t b_stride, int n_k, const int accumulate, const struct ahead *ahead) {
    enum { MOST = ROWS < 8 ? ROWS : 8 };
#define CASE(n)                                                                                 \
    case n:                                                                                     \
        product_rows(n, c, c_stride, a, row_stride, 1, b, b_stride, n_k, accumulate, ahead);    \
        break;
    for (int passes = (n_rows + MOST - 1) / MOST, n; passes > 0; passes--, n_rows -= n) {
        n = n_rows / passes; /* passes of about the same height: they take the time of the multiply-adds alone */
        switch (n) {
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
        }
        c += (size_t)n * c_stride;
        a += (size_t)n * row_stride;
    }
#undef CASE
}

#endif

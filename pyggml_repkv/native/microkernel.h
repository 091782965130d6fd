/* The inner loop of every product in the prefill ops: R rows times two vectors of tokens, held in registers. */
#ifndef REPKV_MICROKERNEL_H
#define REPKV_MICROKERNEL_H

#include "simd.h"

enum { ROWS = 12 /* 24 accumulators, 2 operands and a broadcast fill the 32 vector registers of AVX-512 */ };

/* c[r][0..31] (+)= sum_k a[r * row_stride + k * k_stride] * b[k][0..31], for n_rows rows of c with stride c_stride. */
static inline __attribute__((always_inline)) void product_rows(const int n_rows, float *c, size_t c_stride, const float *a,
                                                               size_t row_stride, size_t k_stride, const float *b, int n_k,
                                                               const int accumulate) {
    f32x16 acc[ROWS][2];
#pragma GCC unroll 12
    for (int r = 0; r < n_rows; r++) {
        acc[r][0] = accumulate ? load16(c + (size_t)r * c_stride) : splat16(0.0f);
        acc[r][1] = accumulate ? load16(c + (size_t)r * c_stride + 16) : splat16(0.0f);
    }
    for (int k = 0; k < n_k; k++) {
        const f32x16 b0 = load16(b), b1 = load16(b + 16);
#pragma GCC unroll 12
        for (int r = 0; r < n_rows; r++) {
            const f32x16 v = splat16(a[(size_t)r * row_stride]);
            acc[r][0] += v * b0;
            acc[r][1] += v * b1;
        }
        a += k_stride;
        b += 32;
    }
#pragma GCC unroll 12
    for (int r = 0; r < n_rows; r++) {
        store16(c + (size_t)r * c_stride, acc[r][0]);
        store16(c + (size_t)r * c_stride + 16, acc[r][1]);
    }
}

/* Any number of rows, in register tiles. */
static inline void product(int n_rows, float *c, size_t c_stride, const float *a, size_t row_stride, size_t k_stride,
                           const float *b, int n_k, const int accumulate) {
    int r = 0;
    for (; r + ROWS <= n_rows; r += ROWS) {
        product_rows(ROWS, c + (size_t)r * c_stride, c_stride, a + (size_t)r * row_stride, row_stride, k_stride, b, n_k, accumulate);
    }
    for (; r + 8 <= n_rows; r += 8) {
        product_rows(8, c + (size_t)r * c_stride, c_stride, a + (size_t)r * row_stride, row_stride, k_stride, b, n_k, accumulate);
    }
    for (; r + 4 <= n_rows; r += 4) {
        product_rows(4, c + (size_t)r * c_stride, c_stride, a + (size_t)r * row_stride, row_stride, k_stride, b, n_k, accumulate);
    }
    for (; r < n_rows; r++) {
        product_rows(1, c + (size_t)r * c_stride, c_stride, a + (size_t)r * row_stride, row_stride, k_stride, b, n_k, accumulate);
    }
}

#endif

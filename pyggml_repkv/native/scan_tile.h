/* Products of queries in 8 bits with the codes of a tile (codes.h): 16 tokens side by side, and up to SCAN_ROWS queries. */
#ifndef REPKV_SCAN_TILE_H
#define REPKV_SCAN_TILE_H

#include "codes.h"
#include "convert.h"
#include "scan_ops.h"

/* Query rows of one key head. The score of a row and token is scale * step * (sum of products - middle), in powers of two. */
struct rows {
    int n;
    int8_t *q; /* [dim / 4][SCAN_ROWS][4]; rows after the last are zero */
    float scale[SCAN_ROWS], middle[SCAN_ROWS];
    /* What a scan has found: `sum` is the sum of 2^(score - reference) over its tokens. */
    float reference[SCAN_ROWS], sum[SCAN_ROWS];
};

/* Sets steps [16] of a tile; an infinite one is the largest of F16, so that scores are finite, or NaN where a step is. */
static inline f32x16 steps_of(const char *tile, int dim, int bits) {
    const void *from = tile + (size_t)dim * (size_t)bits / 8 * CODE_LANES;
    float steps[CODE_LANES];
    to_f32(GGML_TYPE_F16, from, steps, CODE_LANES);
    const f32x16 step = load16(steps), most = splat16(65504.0f);
    return select16(above16(step, most), most, step);
}

static inline f32x16 score16(const struct rows *r, int row, f32x16 step, f32x16 sum) {
    return (sum - r->middle[row]) * (step * r->scale[row]);
}

#if defined(__AVX512F__) && defined(__AVX512VNNI__)
/* scores[row * stride ...] of n rows and the 16 tokens of a tile. */
static inline __attribute__((always_inline)) void score_rows(const int n, const int bits, const struct rows *r, float *scores,
                                                             size_t stride, const char *tile, int dim) {
    const __m512i mask = _mm512_set1_epi8((char)((1 << bits) - 1));
    const int per_word = 8 / bits, n_words = dim / (4 * per_word);
    const char *q = (const char *)r->q;
    __m512i sum[SCAN_ROWS];
#pragma GCC unroll 16
    for (int row = 0; row < n; row++) sum[row] = _mm512_setzero_si512();
    for (int word = 0; word < n_words; word++) {
        const __m512i codes = _mm512_loadu_si512(tile + word * 4 * CODE_LANES);
#pragma GCC unroll 8
        for (int k = 0; k < per_word; k++, q += 4 * SCAN_ROWS) {
            const __m512i code = _mm512_and_si512(_mm512_srli_epi32(codes, (unsigned)(k * bits)), mask);
#pragma GCC unroll 16
            for (int row = 0; row < n; row++) {
                int32_t four;
                memcpy(&four, q + 4 * row, sizeof four);
                sum[row] = _mm512_dpbusd_epi32(sum[row], code, _mm512_set1_epi32(four));
            }
        }
    }
    const f32x16 step = steps_of(tile, dim, bits);
#pragma GCC unroll 16
    for (int row = 0; row < n; row++) {
        store16(scores + (size_t)row * stride, score16(r, row, step, (f32x16)_mm512_cvtepi32_ps(sum[row])));
    }
}
#elif defined(__AVX2__)
/* The same, 8 tokens and 4 rows at a time. */
static inline __attribute__((always_inline)) void score_rows(const int n, const int bits, const struct rows *r, float *scores,
                                                             size_t stride, const char *tile, int dim) {
    const __m256i mask = _mm256_set1_epi8((char)((1 << bits) - 1));
    const int per_word = 8 / bits, n_words = dim / (4 * per_word);
    /* So many words of codes times 127 fit the 16 bits that products of pairs are added up in. */
    const int at_once = bits == 4 ? 4 : bits == 2 ? 8 : 16;
    const f32x16 step = steps_of(tile, dim, bits);
    for (int first = 0; first < n; first += 4) {
        int32_t sums[4][CODE_LANES];
        for (int half = 0; half < 2; half++) {
            const char *q = (const char *)r->q + 4 * first;
            __m256i sum[4];
#pragma GCC unroll 4
            for (int row = 0; row < 4; row++) sum[row] = _mm256_setzero_si256();
            for (int word0 = 0; word0 < n_words; word0 += at_once) {
                __m256i pairs[4];
#pragma GCC unroll 4
                for (int row = 0; row < 4; row++) pairs[row] = _mm256_setzero_si256();
                for (int word = word0; word < word0 + at_once && word < n_words; word++) {
                    const __m256i codes = _mm256_loadu_si256((const __m256i *)(tile + (2 * word + half) * 2 * CODE_LANES));
#pragma GCC unroll 8
                    for (int k = 0; k < per_word; k++, q += 4 * SCAN_ROWS) {
                        const __m256i code = _mm256_and_si256(_mm256_srli_epi32(codes, k * bits), mask);
#pragma GCC unroll 4
                        for (int row = 0; row < 4; row++) {
                            int32_t four;
                            memcpy(&four, q + 4 * row, sizeof four);
#if defined(__AVXVNNI__)
                            sum[row] = _mm256_dpbusd_avx_epi32(sum[row], code, _mm256_set1_epi32(four));
#else
                            pairs[row] = _mm256_add_epi16(pairs[row], _mm256_maddubs_epi16(code, _mm256_set1_epi32(four)));
#endif
                        }
                    }
                }
#pragma GCC unroll 4
                for (int row = 0; row < 4; row++) {
                    sum[row] = _mm256_add_epi32(sum[row], _mm256_madd_epi16(pairs[row], _mm256_set1_epi16(1)));
                }
            }
#pragma GCC unroll 4
            for (int row = 0; row < 4; row++) _mm256_storeu_si256((__m256i *)(sums[row] + 8 * half), sum[row]);
        }
        for (int row = 0; row < 4; row++) {
            i32x16 sum;
            memcpy(&sum, sums[row], sizeof sum);
            store16(scores + (size_t)(first + row) * stride, score16(r, first + row, step, __builtin_convertvector(sum, f32x16)));
        }
    }
}
#else
static inline void score_rows(const int n, const int bits, const struct rows *r, float *scores, size_t stride, const char *tile,
                              int dim) {
    const int mask = (1 << bits) - 1, per_word = 32 / bits;
    const f32x16 step = steps_of(tile, dim, bits);
    for (int row = 0; row < n; row++) {
        i32x16 sum = {0};
        for (int i = 0; i < dim; i++) {
            const int in_word = i % per_word, shift = in_word / 4 * bits, q = r->q[(i / 4 * SCAN_ROWS + row) * 4 + i % 4];
            const unsigned char *byte = (const unsigned char *)tile + (size_t)(i / per_word) * CODE_LANES * 4 + in_word % 4;
            for (int lane = 0; lane < CODE_LANES; lane++) sum[lane] += q * (byte[4 * lane] >> shift & mask);
        }
        store16(scores + (size_t)row * stride, score16(r, row, step, __builtin_convertvector(sum, f32x16)));
    }
}
#endif

/* Scores of all rows, and of up to SCAN_ROWS that nobody reads, for n_tiles tiles: scores[row * stride + token]. */
static inline __attribute__((always_inline)) void score_tiles_of(const int bits, const struct rows *r, float *scores,
                                                                 size_t stride, const char *tile, size_t tile_bytes, int n_tiles,
                                                                 int dim) {
    for (int i = 0; i < n_tiles; i++, tile += tile_bytes, scores += CODE_LANES) {
        if (r->n <= 4) {
            score_rows(4, bits, r, scores, stride, tile, dim);
        } else if (r->n <= 8) {
            score_rows(8, bits, r, scores, stride, tile, dim);
        } else {
            score_rows(SCAN_ROWS, bits, r, scores, stride, tile, dim);
        }
    }
}

static inline void score_tiles(int bits, const struct rows *r, float *scores, size_t stride, const char *tile, size_t tile_bytes,
                               int n_tiles, int dim) {
    switch (bits) {
    case 4: score_tiles_of(4, r, scores, stride, tile, tile_bytes, n_tiles, dim); break;
    case 2: score_tiles_of(2, r, scores, stride, tile, tile_bytes, n_tiles, dim); break;
    default: score_tiles_of(1, r, scores, stride, tile, tile_bytes, n_tiles, dim); break;
    }
}

#endif

/* Products of queries in 8 bits with the codes of a tile (codes.h): 16 tokens side by side, and up to SCAN_ROWS queries. */
#ifndef REPKV_SCAN_TILE_H
#define REPKV_SCAN_TILE_H

#include "codes.h"
#include "convert.h"
#include "scan_ops.h"

enum {
    STRIP = 256, /* tokens whose scores are made before their units are weighed */
    AHEAD = 8,   /* tiles from the one that is read to the one that memory is asked for */
};

/* Query rows of one key head. A score is step * (sum of products - middle); times the scale of its row it is in powers of two. */
struct rows {
    int n;
    int8_t *q; /* [dim / 4][SCAN_ROWS][4]; rows after the last are zero */
    float scale[SCAN_ROWS], middle[SCAN_ROWS];
    /* What a scan has found: the lanes of `sum` together are the sum of 2^(scale * (score - reference)) over its tokens. A
     * score above the limit raises the reference. */
    float reference[SCAN_ROWS], limit[SCAN_ROWS], sum[SCAN_ROWS][16];
};

/* Steps of a tile. An infinite one is the largest of F16, so that scores are finite, or NaN where a step is. */
static inline f32x16 steps_of(const char *tile, int dim, int bits) {
    const void *from = tile + (size_t)dim * (size_t)bits / 8 * CODE_LANES;
    const f32x16 most = splat16(65504.0f);
#if defined(__AVX512F__)
    return min16(most, (f32x16)_mm512_cvtph_ps(_mm256_loadu_si256(from)));
#else
    float steps[CODE_LANES];
    to_f32(GGML_TYPE_F16, from, steps, CODE_LANES);
    return min16(most, load16(steps));
#endif
}

/* Sets scores of the 16 tokens of a tile for row `row`. */
static inline void put_scores(float *scores, const struct rows *r, int row, f32x16 step, f32x16 sum) {
    store16(scores + row * STRIP, (sum - r->middle[row]) * step);
}

#if defined(__AVX512F__) && defined(__AVX512VNNI__)
/* _mm512_dpbusd_epi32, which GCC surrounds with copies of its sums. */
static inline __attribute__((always_inline)) void add_products(__m512i *sum, __m512i code, __m512i q) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(*sum) : "v"(code), "v"(q));
}

/* scores[row * STRIP + token] for rows [first, first + n) and the tokens of m tiles. */
static inline __attribute__((always_inline)) void score_block(const int bits, const int n, const int m, const struct rows *r,
                                                              int first, float *scores, const char *tile, size_t tile_bytes,
                                                              int dim) {
    const __m512i mask = _mm512_set1_epi8((char)((1 << bits) - 1));
    const int per_word = 8 / bits, n_words = dim / (4 * per_word);
    const int8_t *q = r->q + 4 * first;
    __m512i sum[8][4];
#pragma GCC unroll 8
    for (int row = 0; row < n; row++) {
#pragma GCC unroll 4
        for (int i = 0; i < m; i++) sum[row][i] = _mm512_setzero_si512();
    }
    for (int word = 0; word < n_words; word++) {
        __m512i codes[4], code[4];
#pragma GCC unroll 4
        for (int i = 0; i < m; i++) codes[i] = _mm512_loadu_si512(tile + (size_t)i * tile_bytes + word * 4 * CODE_LANES);
#pragma GCC unroll 8
        for (int k = 0; k < per_word; k++, q += 4 * SCAN_ROWS) {
#pragma GCC unroll 4
            for (int i = 0; i < m; i++) code[i] = _mm512_and_si512(_mm512_srli_epi32(codes[i], (unsigned)(k * bits)), mask);
#pragma GCC unroll 8
            for (int row = 0; row < n; row++) {
                int32_t four;
                memcpy(&four, q + 4 * row, sizeof four);
#pragma GCC unroll 4
                for (int i = 0; i < m; i++) add_products(&sum[row][i], code[i], _mm512_set1_epi32(four));
            }
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < m; i++) {
        const f32x16 step = steps_of(tile + (size_t)i * tile_bytes, dim, bits);
#pragma GCC unroll 8
        for (int row = 0; row < n; row++) {
            put_scores(scores + i * CODE_LANES, r, first + row, step, (f32x16)_mm512_cvtepi32_ps(sum[row][i]));
        }
    }
}
#elif defined(__AVX2__)
/* The same, 8 tokens and 4 rows at a time. */
static inline __attribute__((always_inline)) void score_half(const int bits, const struct rows *r, int first,
                                                             int32_t *sums, const char *tile, int dim) {
    const __m256i mask = _mm256_set1_epi8((char)((1 << bits) - 1));
    const int per_word = 8 / bits, n_words = dim / (4 * per_word);
    /* So many words of codes times 127 fit the 16 bits that products of pairs are added up in. */
    const int at_once = bits == 4 ? 4 : bits == 2 ? 8 : 16;
    const int8_t *q = r->q + 4 * first;
    __m256i sum[4];
#pragma GCC unroll 4
    for (int row = 0; row < 4; row++) sum[row] = _mm256_setzero_si256();
    for (int word0 = 0; word0 < n_words; word0 += at_once) {
        __m256i pairs[4];
#pragma GCC unroll 4
        for (int row = 0; row < 4; row++) pairs[row] = _mm256_setzero_si256();
        for (int word = word0; word < word0 + at_once && word < n_words; word++) {
            const __m256i codes = _mm256_loadu_si256((const __m256i *)(tile + word * 4 * CODE_LANES));
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
    for (int row = 0; row < 4; row++) _mm256_storeu_si256((__m256i *)(sums + row * CODE_LANES), sum[row]);
}

static inline __attribute__((always_inline)) void score_block(const int bits, const int n, const int m, const struct rows *r,
                                                              int first, float *scores, const char *tile, size_t tile_bytes,
                                                              int dim) {
    for (int i = 0; i < m; i++, tile += tile_bytes, scores += CODE_LANES) {
        const f32x16 step = steps_of(tile, dim, bits);
        for (int row0 = first; row0 < first + n; row0 += 4) {
            int32_t sums[4][CODE_LANES];
            for (int half = 0; half < 2; half++) {
                score_half(bits, r, row0, sums[0] + 8 * half, tile + half * 2 * CODE_LANES, dim);
            }
            for (int row = 0; row < 4; row++) {
                i32x16 sum;
                memcpy(&sum, sums[row], sizeof sum);
                put_scores(scores, r, row0 + row, step, __builtin_convertvector(sum, f32x16));
            }
        }
    }
}
#else
static inline __attribute__((always_inline)) void score_block(const int bits, const int n, const int m, const struct rows *r,
                                                              int first, float *scores, const char *tile, size_t tile_bytes,
                                                              int dim) {
    const int mask = (1 << bits) - 1, per_word = 32 / bits;
    for (int i = 0; i < m; i++, tile += tile_bytes, scores += CODE_LANES) {
        const f32x16 step = steps_of(tile, dim, bits);
        for (int row = first; row < first + n; row++) {
            int32_t sums[CODE_LANES] = {0};
            for (int j = 0; j < dim; j++) {
                const int in_word = j % per_word, shift = in_word / 4 * bits, q = r->q[(j / 4 * SCAN_ROWS + row) * 4 + j % 4];
                const unsigned char *byte = (const unsigned char *)tile + (size_t)(j / per_word) * CODE_LANES * 4 + in_word % 4;
                for (int lane = 0; lane < CODE_LANES; lane++) sums[lane] += q * (byte[4 * lane] >> shift & mask);
            }
            i32x16 sum;
            memcpy(&sum, sums, sizeof sum);
            put_scores(scores, r, row, step, __builtin_convertvector(sum, f32x16));
        }
    }
}
#endif

static inline void prefetch(const char *tile, int n_bytes) {
    for (int i = 0; i < n_bytes; i += 64) __builtin_prefetch(tile + i);
}

/* Functions of their own, so that each has all registers: score_BITS_N for n rows, 16 / n tiles at a time. */
#define SCORE(bits, n)                                                                                                        \
    static __attribute__((noinline)) void score_##bits##_##n(const struct rows *r, int first, float *scores, const char *tile, \
                                                             size_t tile_bytes, int n_tiles, int dim) {                       \
        const int m = 16 / n;                                                                                                 \
        int i = 0;                                                                                                            \
        for (; i + m <= n_tiles; i += m, tile += m * tile_bytes, scores += m * CODE_LANES) {                                  \
            for (int k = 0; k < m; k++) prefetch(tile + (size_t)(AHEAD + k) * tile_bytes, dim * bits * 2);                    \
            score_block(bits, n, m, r, first, scores, tile, tile_bytes, dim);                                                 \
        }                                                                                                                     \
        for (; i < n_tiles; i++, tile += tile_bytes, scores += CODE_LANES) {                                                  \
            score_block(bits, n, 1, r, first, scores, tile, tile_bytes, dim);                                                 \
        }                                                                                                                     \
    }
SCORE(4, 4)
SCORE(4, 8)
SCORE(2, 4)
SCORE(2, 8)
SCORE(1, 4)
SCORE(1, 8)
#undef SCORE

/* Sets scores[row * STRIP + token] for all rows, and up to 7 more that nobody reads, and the tokens of n_tiles tiles. */
static inline void score_tiles(int bits, const struct rows *r, float *scores, const char *tile, size_t tile_bytes, int n_tiles,
                               int dim) {
    for (int first = 0; first < r->n; first += 8) {
        if (r->n - first <= 4) {
            (bits == 4 ? score_4_4 : bits == 2 ? score_2_4 : score_1_4)(r, first, scores, tile, tile_bytes, n_tiles, dim);
        } else {
            (bits == 4 ? score_4_8 : bits == 2 ? score_2_8 : score_1_8)(r, first, scores, tile, tile_bytes, n_tiles, dim);
        }
    }
}

#endif

/* Steps on one token that the decode ops share: rotation, and attention as running sums of each query head. */
#ifndef REPKV_ONE_TOKEN_H
#define REPKV_ONE_TOKEN_H

#include "keys.h"

enum { TILE = 32 /* cells to convert at once, with the keys and values of all heads: rows are read in order */ };

/* Rotates pairs (i, i + rope_dim / 2), the "neox" layout; qk_norm converts other layouts to it. */
static inline void rope(float *y, const float *x, const float *cosine, const float *sine, int rope_dim, int head_dim) {
    const int half = rope_dim / 2;
    for (int i = 0; i < half; i++) {
        const float a = x[i], b = x[i + half];
        y[i] = a * cosine[i] - b * sine[i];
        y[i + half] = a * sine[i] + b * cosine[i];
    }
    for (int i = rope_dim; i < head_dim; i++) y[i] = x[i];
}

/* Folds n_cells keys and values [n_cells, stride] into the running (maximum, sum, values) of one query head. */
static inline void fold(float *partial, float *scores, const float *q, const float *keys, const float *values, int n_cells,
                 size_t stride, int d, float scale) {
    float tile_max = -INFINITY;
    int whole = 0;
    for (; whole + 16 <= n_cells; whole += 16) dots16_f32(scores + whole, q, keys + (size_t)whole * stride, stride, d);
    for (int c = whole; c < n_cells; c++) scores[c] = dot_f32(q, keys + (size_t)c * stride, d);
    for (int c = n_cells; c < TILE; c++) scores[c] = -INFINITY;
    scale_f32(scores, scale, TILE);
    for (int c = 0; c < n_cells; c++) {
        if (scores[c] > tile_max) tile_max = scores[c];
    }
    if (tile_max > partial[0]) {
        const float shrink = expf(partial[0] - tile_max);
        partial[0] = tile_max;
        partial[1] *= shrink;
        scale_f32(partial + 2, shrink, d);
    }
    const f32x16 max = splat16(partial[0]);
    for (int c = 0; c < TILE; c += 16) store16(scores + c, exp16(load16(scores + c) - max));
    for (int c = 0; c < n_cells; c++) partial[1] += scores[c];
    weighted_rows_f32(partial + 2, scores, values, n_cells, stride, d);
}

/* One thread's share of attention for all heads, over any number of runs of rows. */
struct attention {
    const struct repkv_op_params *p;
    float *q, *keys, *values, *scores, *partials; /* q: room for the rotated queries */
};

static inline size_t attention_scratch(int n_head, int n_head_kv, int head_dim) {
    const size_t d = (size_t)head_dim, tile = TILE * (size_t)n_head_kv * d;
    return repkv_piece((size_t)n_head * d) + 2 * repkv_piece(tile) + repkv_piece(TILE);
}

static inline struct attention attention_begin(const struct repkv_op_params *p, struct ggml_tensor *dst, int ith) {
    const int d = p->head_dim, tile = TILE * p->n_head_kv * d;
    struct repkv_scratch s = repkv_thread_scratch(p, ith, attention_scratch(p->n_head, p->n_head_kv, d));
    struct attention a = {.p = p};
    a.q = repkv_take(&s, (size_t)(p->n_head * d));
    a.keys = repkv_take(&s, (size_t)tile);
    a.values = repkv_take(&s, (size_t)tile);
    a.scores = repkv_take(&s, TILE);
    a.partials = (float *)dst->data + (size_t)ith * (size_t)p->n_head * (size_t)(2 + d);
    for (int h = 0; h < p->n_head; h++) {
        float *partial = a.partials + (size_t)h * (size_t)(2 + d);
        partial[0] = -INFINITY;
        memset(partial + 1, 0, (size_t)(1 + d) * sizeof(float));
    }
    return a;
}

/* Attends rows [first, first + n_cells) of the arenas, at most TILE of them, with rotated queries q. shift: as keys_f32. */
static inline void attend_rows(const struct attention *a, const float *q, const struct ggml_tensor *k_arena,
                               const struct ggml_tensor *v_arena, int64_t shift, int64_t first, int n_cells) {
    const int d = a->p->head_dim, group = a->p->n_head / a->p->n_head_kv, width = a->p->n_head_kv * d;
    keys_f32(a->p, a->keys, (size_t)width, k_arena, first, n_cells, 0, a->p->n_head_kv, shift);
    to_f32(v_arena->type, row(v_arena, first), a->values, n_cells * width);
    for (int h = 0; h < a->p->n_head; h++) {
        const int kv = h / group * d;
        fold(a->partials + (size_t)h * (size_t)(2 + d), a->scores, q + h * d, a->keys + kv, a->values + kv, n_cells,
             (size_t)width, d, a->p->scale);
    }
}

static inline void attend_range(const struct attention *a, const float *q, const struct ggml_tensor *k_arena,
                                const struct ggml_tensor *v_arena, int64_t shift, int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c += TILE) {
        attend_rows(a, q, k_arena, v_arena, shift, c, end - c < TILE ? (int)(end - c) : TILE);
    }
}

/* Attends rows [begin, end) with the query heads of one key head only. */
static inline void attend_range_of_head(const struct attention *a, const float *q, const struct ggml_tensor *k_arena,
                                        const struct ggml_tensor *v_arena, int64_t shift, int64_t begin, int64_t end,
                                        int kv) {
    const int d = a->p->head_dim, group = a->p->n_head / a->p->n_head_kv;
    const size_t v_offset = v_arena->nb[1] / (size_t)a->p->n_head_kv * (size_t)kv;
    for (int64_t first = begin; first < end; first += TILE) {
        const int n_cells = end - first < TILE ? (int)(end - first) : TILE;
        keys_f32(a->p, a->keys, (size_t)d, k_arena, first, n_cells, kv, 1, shift);
        for (int c = 0; c < n_cells; c++) {
            to_f32(v_arena->type, row(v_arena, first + c) + v_offset, a->values + c * d, d);
        }
        for (int h = kv * group; h < (kv + 1) * group; h++) {
            fold(a->partials + (size_t)h * (size_t)(2 + d), a->scores, q + h * d, a->keys, a->values, n_cells, (size_t)d, d,
                 a->p->scale);
        }
    }
}

/* Attends the new token. Writes it to its row and reads it back, so that it is attended with the cache's precision. */
static inline void attend_new(const struct attention *a, const float *q, const struct ggml_tensor *k_arena,
                              const struct ggml_tensor *v_arena, int64_t shift, int64_t cell, const float *qkv,
                              const float *cosine, const float *sine) {
    const struct repkv_op_params *p = a->p;
    const int d = p->head_dim, width = p->n_head_kv * d;
    float *key = a->values;
    for (int kv = 0; kv < p->n_head_kv; kv++) {
        const float *x = stored_key(p, key, qkv + (p->n_head + kv) * d, kv);
        rope(a->keys + kv * d, x, cosine, sine, p->rope_dim, d);
    }
    from_f32(k_arena->type, a->keys, row(k_arena, cell), width);
    from_f32(v_arena->type, qkv + p->n_head * d + width, row(v_arena, cell), width);
    attend_rows(a, q, k_arena, v_arena, shift, cell, 1);
}

#endif

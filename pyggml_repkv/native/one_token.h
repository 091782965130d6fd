/* Steps on one token that the decode ops share: rotation, and attention as running sums of each query head. */
#ifndef REPKV_ONE_TOKEN_H
#define REPKV_ONE_TOKEN_H

#include "keys.h"
#include "microkernel.h"

enum { TILE = 32 /* cells attended at once: the lanes of the microkernel */ };

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

/* Consecutive rows of the arenas. shift: as keys_f32; turn: after the table of its first key in struct repkv_order, or NULL. */
struct piece {
    int64_t first, shift;
    const float *turn;
    int n;
};

/* Where rows are, and who attends them: key heads [kv, kv_end), with queries [n_head][head_dim], rotated and scaled. */
struct attended {
    const struct ggml_tensor *k_arena, *v_arena;
    const float *q;
    int kv, kv_end;
};

/* Up to TILE rows from any places. */
struct cells {
    struct attended in;
    int n, n_pieces;
    struct piece pieces[TILE];
    const char *k_rows[TILE], *v_rows[TILE];
};

/* One thread's share of attention for all heads. Rows are attended in tiles, by all query heads of a key head together; a tile
 * takes rows of any runs, so sums depend on the order of the rows alone, not on where they lie. */
struct attention {
    const struct repkv_op_params *p;
    float *partials;      /* the thread's result */
    float *older, *near;  /* [n_head][head_dim]: room for queries */
    float *rows;          /* [TILE][head_dim]: keys as they are read */
    float *keys, *scores; /* [head_dim][TILE], [group][TILE] */
    float *values, *out;  /* [TILE][padded], [n_head][padded] */
    float *max, *sum;     /* [n_head], [n_head][16] */
    struct attended in;         /* of the next rows */
    const float *turn;          /* after the table of the next row's key; NULL: none is turned */
    int64_t begin, end, offset; /* the thread's share of all rows, and how many rows came so far */
    struct cells tiles[2];      /* one that rows are added to; the other is read to the caches meanwhile */
    int filling;
};

/* Returns how many values a row of values takes: whole steps of the microkernel. */
static inline size_t padded(int head_dim) {
    return ((size_t)head_dim + 31) / 32 * 32;
}

static inline size_t attention_scratch(int n_head, int n_head_kv, int head_dim) {
    const size_t d = (size_t)head_dim, heads = (size_t)n_head, group = (size_t)(n_head / n_head_kv);
    return 2 * repkv_piece(heads * d) + 2 * repkv_piece(TILE * d) + repkv_piece(TILE * group) + repkv_piece(TILE * padded(head_dim)) +
           repkv_piece(heads * padded(head_dim)) + repkv_piece(heads) + repkv_piece(heads * 16);
}

static inline void attention_begin(struct attention *a, const struct repkv_op_params *p, struct ggml_tensor *dst, int ith) {
    const size_t d = (size_t)p->head_dim, heads = (size_t)p->n_head, width = padded(p->head_dim);
    struct repkv_scratch s = repkv_thread_scratch(p, ith, attention_scratch(p->n_head, p->n_head_kv, p->head_dim));
    a->p = p;
    a->partials = (float *)dst->data + (size_t)ith * heads * (2 + d);
    a->older = repkv_take(&s, heads * d);
    a->near = repkv_take(&s, heads * d);
    a->rows = repkv_take(&s, TILE * d);
    a->keys = repkv_take(&s, TILE * d);
    a->scores = repkv_take(&s, TILE * (heads / (size_t)p->n_head_kv));
    a->values = repkv_take(&s, TILE * width);
    a->out = repkv_take(&s, heads * width);
    a->max = repkv_take(&s, heads);
    a->sum = repkv_take(&s, heads * 16);
    a->turn = NULL;
    a->tiles[0].n = a->tiles[0].n_pieces = a->tiles[1].n = a->tiles[1].n_pieces = a->filling = 0;
    for (int i = 0; i < 2 * TILE; i++) a->tiles[i / TILE].k_rows[i % TILE] = a->tiles[i / TILE].v_rows[i % TILE] = dst->data;
    for (size_t h = 0; h < heads; h++) a->max[h] = -INFINITY;
    memset(a->out, 0, heads * width * sizeof(float));
    memset(a->sum, 0, heads * 16 * sizeof(float));
}

/* Rotates and scales a token's queries. */
static inline void rotate_queries(const struct repkv_op_params *p, float *q, const float *qkv, const float *table) {
    const int d = p->head_dim;
    for (int h = 0; h < p->n_head; h++) rope(q + h * d, qkv + h * d, table, table + p->rope_dim / 2, p->rope_dim, d);
    scale_f32(q, p->scale, p->n_head * d);
}

/* From now on threads share n_rows rows. */
static inline void attention_share(struct attention *a, int64_t n_rows, int ith, int nth) {
    a->offset = 0;
    share(n_rows, ith, nth, &a->begin, &a->end);
}

/* Makes weights of TILE scores of a head, of which n are of cells, and makes the head's sums relative to the new maximum. */
static inline void soften(struct attention *a, float *scores, int n, int h) {
    for (int c = n; c < TILE; c++) scores[c] = -INFINITY;
    const f32x16 x = load16(scores), y = load16(scores + 16);
    const float most = largest16(max16(x, y));
    if (most > a->max[h]) {
        const float shrink = expf(a->max[h] - most);
        a->max[h] = most;
        scale_f32(a->sum + h * 16, shrink, 16);
        scale_f32(a->out + (size_t)h * padded(a->p->head_dim), shrink, (int)padded(a->p->head_dim));
    }
    const f32x16 max = splat16(a->max[h]), u = exp16(x - max), v = exp16(y - max);
    store16(scores, u);
    store16(scores + 16, v);
    store16(a->sum + h * 16, load16(a->sum + h * 16) + u + v);
}

/* Returns the bytes of one key head in a row. */
static inline size_t head_bytes(const struct repkv_op_params *p, const struct ggml_tensor *arena) {
    return arena->nb[1] / (size_t)p->n_head_kv;
}

/* d: the head size, a constant where it is a common one. next: is read to the caches meanwhile. */
static inline __attribute__((always_inline)) void attend_tile_of_head(struct attention *a, const struct cells *tile,
                                                                      const struct cells *next, int kv, const int d) {
    const struct repkv_op_params *p = a->p;
    const struct attended *in = &tile->in;
    const int group = p->n_head / p->n_head_kv;
    const size_t width = padded(d), v_offset = head_bytes(p, in->v_arena) * (size_t)kv;
    int n = 0;
    for (const struct piece *at = tile->pieces; at < tile->pieces + tile->n_pieces; n += at++->n) {
        keys_f32(p, a->rows + n * d, (size_t)d, in->k_arena, at->first, at->n, kv, 1, at->shift);
        for (int r = 0; r < at->n && at->turn; r++) turn_f32(a->rows + (n + r) * d, at->turn - (r + 1) * p->rope_dim, p->rope_dim);
    }
    for (int c = 0; c < n; c++) to_f32(in->v_arena->type, tile->v_rows[c] + v_offset, a->values + (size_t)c * width, d);
    transpose32_f32(a->keys, a->rows, (size_t)d);

    const size_t next_kv = (size_t)(next->in.kv + kv - in->kv);
    size_t bytes = head_bytes(p, next->in.k_arena);
    struct ahead ahead = {next->k_rows, bytes * next_kv, bytes * 32 / (size_t)d};
    product_few(group, a->scores, TILE, in->q + kv * group * d, (size_t)d, a->keys, TILE, d, 0, &ahead);
    for (int g = 0; g < group; g++) soften(a, a->scores + g * TILE, n, kv * group + g);
    bytes = head_bytes(p, next->in.v_arena);
    ahead = (struct ahead){next->v_rows, bytes * next_kv, 0};
    for (size_t i = 0; i < width; i += 32, ahead.offset += bytes * 32 / (size_t)d) {
        product_few(group, a->out + (size_t)(kv * group) * width + i, width, a->scores, TILE, a->values + i, width, n, 1, &ahead);
    }
}

/* Attends the tile that has waited, and fills it next. */
static inline void attend_waiting(struct attention *a) {
    const struct cells *filled = a->tiles + a->filling;
    a->filling ^= 1;
    struct cells *tile = a->tiles + a->filling;
    if (tile->n == 0) return;
    const struct cells *next = filled->n > 0 ? filled : tile;
    for (int kv = tile->in.kv; kv < tile->in.kv_end; kv++) {
        switch (a->p->head_dim) {
            case 64: attend_tile_of_head(a, tile, next, kv, 64); break;
            case 128: attend_tile_of_head(a, tile, next, kv, 128); break;
            default: attend_tile_of_head(a, tile, next, kv, a->p->head_dim);
        }
    }
    tile->n = tile->n_pieces = 0;
}

/* The next rows, in new tiles, are of these arenas, for key heads [kv, kv_end) with these queries. */
static inline void attend_in(struct attention *a, const float *q, const struct ggml_tensor *k_arena,
                             const struct ggml_tensor *v_arena, int kv, int kv_end) {
    if (a->tiles[a->filling].n > 0) attend_waiting(a);
    a->in = (struct attended){k_arena, v_arena, q, kv, kv_end};
}

/* Attends what of rows [begin, end) is in the thread's share; attention_end attends the last of them. shift: as keys_f32. */
static inline void attend_rows(struct attention *a, int64_t begin, int64_t end, int64_t shift) {
    const int64_t start = a->offset, width = a->p->rope_dim;
    a->offset += end - begin;
    const int64_t last = a->end - start < end - begin ? begin + a->end - start : end;
    for (int64_t first = a->begin > start ? begin + a->begin - start : begin; first < last;) {
        struct cells *tile = a->tiles + a->filling;
        if (tile->n == 0) tile->in = a->in;
        const int n = last - first < TILE - tile->n ? (int)(last - first) : TILE - tile->n;
        const float *turn = a->turn ? a->turn - (first - begin) * width : NULL;
        tile->pieces[tile->n_pieces++] = (struct piece){first, shift, turn, n};
        for (int r = 0; r < n; r++, first++, tile->n++) {
            tile->k_rows[tile->n] = row(a->in.k_arena, first);
            tile->v_rows[tile->n] = row(a->in.v_arena, first);
        }
        if (tile->n == TILE) attend_waiting(a);
    }
    if (a->turn) a->turn -= (end - begin) * width;
}

static inline void attention_end(struct attention *a) {
    attend_waiting(a);
    attend_waiting(a);
    const int d = a->p->head_dim;
    float *partial = a->partials;
    for (int h = 0; h < a->p->n_head; h++, partial += 2 + d) {
        partial[0] = a->max[h];
        partial[1] = sum16(load16(a->sum + h * 16));
        memcpy(partial + 2, a->out + (size_t)h * padded(d), (size_t)d * sizeof(float));
    }
}

/* Writes the new token's key, rotated, and its value to a cell: they are attended with the cache's precision. */
static inline void store_new(const struct attention *a, const struct ggml_tensor *k_arena, const struct ggml_tensor *v_arena,
                             int64_t cell, const float *qkv, const float *table) {
    const struct repkv_op_params *p = a->p;
    const int d = p->head_dim;
    const size_t k_bytes = head_bytes(p, k_arena), v_bytes = head_bytes(p, v_arena);
    for (int kv = 0; kv < p->n_head_kv; kv++) {
        const float *x = stored_key(p, a->keys, qkv + (p->n_head + kv) * d, kv);
        rope(a->rows, x, table, table + p->rope_dim / 2, p->rope_dim, d);
        from_f32(k_arena->type, a->rows, row(k_arena, cell) + k_bytes * (size_t)kv, d);
        from_f32(v_arena->type, qkv + (p->n_head + p->n_head_kv + kv) * d, row(v_arena, cell) + v_bytes * (size_t)kv, d);
    }
}

#endif

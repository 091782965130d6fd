/* Steps on one panel that the packed ops share: rotation, writing to an arena, and the running softmax. */
#ifndef REPKV_PACKED_H
#define REPKV_PACKED_H

#include "keys.h"
#include "microkernel.h"

/* The start of a running maximum: below any score, and finite, so that a masked score less it is -inf, not NaN. */
#define LEAST (-1e30f)

enum {
    PANEL = 32,       /* tokens side by side */
    ATTEND_TILE = 64, /* cells attended at once */
};

/* Returns what is stored of a head's keys, a panel x [head_dim][PANEL], before RoPE: x, or in `buffer` x less the bias. */
static inline const float *stored_panel(const struct repkv_op_params *p, float *buffer, const float *x, int kv) {
    const float *bias = key_bias(p, kv);
    if (!bias) return x;
    for (int i = 0; i < p->head_dim; i++) {
        for (int t = 0; t < PANEL; t += 16) store16(buffer + i * PANEL + t, load16(x + i * PANEL + t) - bias[i]);
    }
    return buffer;
}

/* Rotates one head of a panel, features [head_dim][PANEL]; rope is [rope_dim][PANEL], cosines then sines. */
static inline void rope_panel(float *y, const float *x, const float *rope, float scale, int rope_dim, int head_dim) {
    const int half = rope_dim / 2;
    for (int i = 0; i < half; i++) {
        for (int t = 0; t < PANEL; t += 16) {
            const f32x16 a = load16(x + i * PANEL + t), b = load16(x + (i + half) * PANEL + t);
            const f32x16 c = load16(rope + i * PANEL + t), s = load16(rope + (i + half) * PANEL + t);
            store16(y + i * PANEL + t, (a * c - b * s) * scale);
            store16(y + (i + half) * PANEL + t, (a * s + b * c) * scale);
        }
    }
    for (int i = rope_dim * PANEL; i < head_dim * PANEL; i += 16) store16(y + i, load16(x + i) * scale);
}

/* As rope_panel by one table [rope_dim] for all tokens. */
static inline void turn_panel(float *y, const float *x, const float *table, float scale, int rope_dim, int head_dim) {
    const int half = rope_dim / 2;
    for (int i = 0; i < half; i++) {
        const float c = table[i] * scale, s = table[i + half] * scale;
        for (int t = 0; t < PANEL; t += 16) {
            const f32x16 a = load16(x + i * PANEL + t), b = load16(x + (i + half) * PANEL + t);
            store16(y + i * PANEL + t, a * c - b * s);
            store16(y + (i + half) * PANEL + t, a * s + b * c);
        }
    }
    for (int i = rope_dim * PANEL; i < head_dim * PANEL; i += 16) store16(y + i, load16(x + i) * scale);
}

/* Writes the tokens of one head's panel [d][PANEL] to their cells of an arena, up to its last row. */
static inline void scatter_panel(const struct ggml_tensor *arena, const float *x, int64_t first_cell, int n_tokens, int head,
                          size_t head_bytes, int d, float *buffer) {
    for (int t = 0; t < n_tokens && first_cell + t < arena->ne[1]; t++) {
        for (int i = 0; i < d; i++) buffer[i] = x[i * PANEL + t];
        from_f32(arena->type, buffer, row(arena, first_cell + t) + (size_t)head * head_bytes, d);
    }
}

/* Adds one tile of cells to the running softmax of one head and panel: out [d][PANEL], max and sum [PANEL]. */
static inline void attend_tile(float *out, float *max, float *sum, float *scores, const float *q, const float *keys,
                        const float *values, int n_cells, int d, int64_t first_cell, int64_t last_visible_of_lane_0) {
    product(n_cells, scores, PANEL, keys, (size_t)d, 1, q, d, 0);
    const int masked = first_cell + n_cells - 1 > last_visible_of_lane_0;
    for (int half = 0; half < PANEL; half += 16) {
        if (masked) {
            for (int c = 0; c < n_cells; c++) {
                /* lane t sees the cells up to last_visible_of_lane_0 + t */
                const int64_t hidden = first_cell + c - last_visible_of_lane_0 - half;
                for (int t = 0; t < 16 && t < hidden; t++) scores[c * PANEL + half + t] = -INFINITY;
            }
        }
        const f32x16 old_max = load16(max + half);
        f32x16 new_max = old_max;
        for (int c = 0; c < n_cells; c++) new_max = max16(new_max, load16(scores + c * PANEL + half));
        f32x16 tile_sum = splat16(0.0f);
        for (int c = 0; c < n_cells; c++) {
            const f32x16 weight = exp16(load16(scores + c * PANEL + half) - new_max);
            store16(scores + c * PANEL + half, weight);
            tile_sum += weight;
        }
        const f32x16 shrink = exp16(old_max - new_max);
        store16(sum + half, load16(sum + half) * shrink + tile_sum);
        store16(max + half, new_max);
        for (int i = 0; i < d; i++) store16(out + i * PANEL + half, load16(out + i * PANEL + half) * shrink);
    }
    product(d, out, PANEL, values, 1, (size_t)d, scores, n_cells, 1);
}

/* Attention of one panel of queries with one key/value head, over any number of runs of cells. */
struct panel_attention {
    const struct repkv_op_params *p;
    int kv;
    size_t first; /* of the panel's heads in packed queries and outputs */
    float *out, *keys, *values, *scores, *max, *sum;
    float *turned;     /* [group][head_dim][PANEL]: room for queries */
    const float *turn; /* after the table of the next key that is gathered, in struct repkv_order; NULL: none is turned */
    int n_cells;       /* gathered and not attended yet */
};

static inline size_t panel_attention_scratch(int group, int head_dim) {
    return 2 * repkv_piece(ATTEND_TILE * (size_t)head_dim) + repkv_piece(ATTEND_TILE * PANEL) +
           2 * repkv_piece((size_t)group * PANEL) + repkv_piece((size_t)(group * head_dim) * PANEL);
}

static inline struct panel_attention panel_attention_begin(const struct repkv_op_params *p, struct ggml_tensor *dst,
                                                           int64_t panel, int kv, int ith) {
    const int d = p->head_dim, group = p->n_head / p->n_head_kv;
    struct panel_attention a = {.p = p, .kv = kv};
    a.first = (size_t)((panel * p->n_head + kv * group) * d) * PANEL;
    a.out = (float *)dst->data + a.first;
    struct repkv_scratch s = repkv_thread_scratch(p, ith, panel_attention_scratch(group, d));
    a.keys = repkv_take(&s, (size_t)(ATTEND_TILE * d));
    a.values = repkv_take(&s, (size_t)(ATTEND_TILE * d));
    a.scores = repkv_take(&s, ATTEND_TILE * PANEL);
    a.max = repkv_take(&s, (size_t)(group * PANEL));
    a.sum = repkv_take(&s, (size_t)(group * PANEL));
    a.turned = repkv_take(&s, (size_t)(group * d * PANEL));
    memset(a.out, 0, (size_t)(group * d * PANEL) * sizeof(float));
    for (int i = 0; i < group * PANEL; i++) {
        a.max[i] = LEAST;
        a.sum[i] = 0.0f;
    }
    return a;
}

/* Returns the panel's queries of the key head. */
static inline const float *panel_queries(const struct panel_attention *a, const struct ggml_tensor *queries) {
    return (const float *)queries->data + a->first;
}

static inline void attend_gathered(struct panel_attention *a, const float *q, int64_t first, int64_t visible_of_lane_0) {
    const int d = a->p->head_dim, group = a->p->n_head / a->p->n_head_kv;
    for (int g = 0; g < group && a->n_cells > 0; g++) {
        const size_t head = (size_t)(g * d * PANEL);
        attend_tile(a->out + head, a->max + g * PANEL, a->sum + g * PANEL, a->scores, q + head, a->keys, a->values, a->n_cells,
                    d, first, visible_of_lane_0);
    }
    a->n_cells = 0;
}

/* Converts rows [first, first + n) to keys and values after those that are gathered. shift: as keys_f32. */
static inline void gather_rows(struct panel_attention *a, const struct ggml_tensor *k_arena, const struct ggml_tensor *v_arena,
                               int64_t shift, int64_t first, int n) {
    const int d = a->p->head_dim;
    const size_t v_offset = v_arena->nb[1] / (size_t)a->p->n_head_kv * (size_t)a->kv;
    float *keys = a->keys + a->n_cells * d;
    keys_f32(a->p, keys, (size_t)d, k_arena, first, n, a->kv, 1, shift);
    for (int c = 0; c < n && a->turn; c++) turn_f32(keys + c * d, a->turn -= a->p->rope_dim, a->p->rope_dim);
    for (int c = 0; c < n; c++) to_f32(v_arena->type, row(v_arena, first + c) + v_offset, a->values + (a->n_cells + c) * d, d);
    a->n_cells += n;
}

/* Gathers cells that every lane sees and attends whole tiles of them, so that short runs share a tile. Call attend_gathered
 * after the last run. */
static inline void gather_cells(struct panel_attention *a, const float *q, const struct ggml_tensor *k_arena,
                                const struct ggml_tensor *v_arena, int64_t shift,
                                int64_t first, int64_t end) {
    while (first < end) {
        const int room = ATTEND_TILE - a->n_cells, n = end - first < room ? (int)(end - first) : room;
        gather_rows(a, k_arena, v_arena, shift, first, n);
        if (a->n_cells == ATTEND_TILE) attend_gathered(a, q, 0, INT32_MAX);
        first += n;
    }
}

/* Attends cells [first, end) of the arenas with packed, scaled queries. Lane t sees cells up to visible_of_lane_0 + t. */
static inline void attend_cells(struct panel_attention *a, const float *q, const struct ggml_tensor *k_arena,
                                const struct ggml_tensor *v_arena, int64_t shift,
                                int64_t first, int64_t end, int64_t visible_of_lane_0) {
    for (int64_t c0 = first; c0 < end; c0 += ATTEND_TILE) {
        gather_rows(a, k_arena, v_arena, shift, c0, end - c0 < ATTEND_TILE ? (int)(end - c0) : ATTEND_TILE);
        attend_gathered(a, q, c0, visible_of_lane_0);
    }
}

static inline void panel_attention_end(struct panel_attention *a) {
    const int d = a->p->head_dim, group = a->p->n_head / a->p->n_head_kv;
    for (int g = 0; g < group; g++) {
        for (int t = 0; t < PANEL; t += 16) {
            const f32x16 scale = 1.0f / load16(a->sum + g * PANEL + t);
            for (int i = 0; i < d; i++) {
                float *y = a->out + (size_t)(g * d + i) * PANEL + t;
                store16(y, load16(y) * scale);
            }
        }
    }
}

#endif

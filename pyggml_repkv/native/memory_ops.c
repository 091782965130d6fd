#include "memory_ops.h"

#include "compute.h"
#include "one_token.h"
#include "packed.h"
#include "regions.h"

void repkv_store_far(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
    const struct repkv_op_params *p = userdata;
    const struct repkv_store_far_sources *src = SOURCES(dst, store_far);
    const struct ggml_tensor *qkv = src->qkv, *k_store = src->k_store, *v_store = src->v_store;
    const float *table = src->rope->data;
    const struct repkv_regions *regions = regions_of(src->regions);
    const int d = p->head_dim;
    const size_t k_head_bytes = k_store->nb[1] / (size_t)p->n_head_kv, v_head_bytes = v_store->nb[1] / (size_t)p->n_head_kv;
    struct repkv_scratch s = repkv_thread_scratch(p, ith, repkv_piece((size_t)d) + repkv_piece((size_t)d * PANEL));
    float *buffer = repkv_take(&s, (size_t)d), *keys = repkv_take(&s, (size_t)d * PANEL);
    int64_t begin, end;
    share(dst->ne[2], ith, nth, &begin, &end);
    for (int64_t panel = begin; panel < end; panel++) {
        const float *x = (const float *)qkv->data + panel * qkv->ne[1] * PANEL;
        float *y = (float *)dst->data + panel * p->n_head * d * PANEL;
        const int64_t first_row = regions->first - regions->store_base + panel * PANEL;
        const int n_tokens = regions->n_tokens - panel * PANEL < PANEL ? (int)(regions->n_tokens - panel * PANEL) : PANEL;
        for (int h = 0; h < p->n_head_kv; h++) {
            const float *key = stored_panel(p, keys, x + (p->n_head + h) * d * PANEL, h);
            scatter_panel(k_store, key, first_row, n_tokens, h, k_head_bytes, d, buffer);
            scatter_panel(v_store, x + (p->n_head + p->n_head_kv + h) * d * PANEL, first_row, n_tokens, h, v_head_bytes, d, buffer);
        }
        for (int h = 0; h < p->n_head; h++, x += d * PANEL, y += d * PANEL) {
            turn_panel(y, x, table, p->scale, p->rope_dim, d);
        }
    }
}

/* Returns the runs of rows that a key head attends, of a group of queries: [0] how many, then the place of each. */
static const int32_t *runs_of(const struct ggml_tensor *runs, int64_t group, int n_head_kv, int kv) {
    return (const int32_t *)runs->data + (runs->ne[1] > 1 ? (group * n_head_kv + kv) * runs->ne[0] : 0);
}

static const struct place *places_of(const int32_t *runs) {
    return (const struct place *)(runs + 1);
}

/* The position of a row of the store less its number, as keys_f32 takes it. */
static int64_t store_shift(const struct repkv_regions *regions, int64_t position_less_row) {
    return regions->far ? UNROTATED : position_less_row;
}

/* Returns how many rows of the store a key head attends with these runs. */
static int64_t rows_of(const struct repkv_regions *regions, const int32_t *runs) {
    int64_t n = regions->sink_end + regions->local - regions->remainder;
    for (int i = 0; i < runs[0]; i++) n += places_of(runs)[i].n_tokens;
    return n;
}

void repkv_attend_memory(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
    const struct repkv_op_params *p = userdata;
    const struct repkv_attend_memory_sources *src = SOURCES(dst, attend_memory);
    const struct ggml_tensor *q_local = src->q_local, *k_local = src->k_local, *v_local = src->v_local;
    const struct ggml_tensor *q_far = src->q_far, *k_store = src->k_store, *v_store = src->v_store;
    const struct repkv_regions *regions = regions_of(src->regions);
    const int64_t base = regions->local_base, store_base = regions->store_base;
    for (int64_t unit = ith; unit < dst->ne[2] * p->n_head_kv; unit += nth) {
        if (repkv_abort_requested(p->compute)) return;
        const int64_t panel = unit / p->n_head_kv;
        const int kv = (int)(unit % p->n_head_kv);
        const int32_t *runs = runs_of(src->runs, p->group > 0 ? panel * PANEL / p->group : 0, p->n_head_kv, kv);
        struct panel_attention a = panel_attention_begin(p, dst, panel, kv, ith);
        const float *q = panel_queries(&a, q_far);
        if (p->order) {
            for (int g = 0; g < p->n_head / p->n_head_kv; g++) {
                const int head = g * p->head_dim * PANEL;
                turn_panel(a.turned + head, panel_queries(&a, q_local) + head, p->order->query, 1.0f, p->rope_dim, p->head_dim);
            }
            q = a.turned;
            a.turn = p->order->keys + rows_of(regions, runs) * p->rope_dim;
        }
        gather_cells(&a, q, k_store, v_store, store_shift(regions, 0), 0, regions->sink_end);
        for (int i = 0; i < runs[0]; i++) {
            const struct place at = places_of(runs)[i];
            gather_cells(&a, q, k_store, v_store, store_shift(regions, at.position - at.row), at.row, at.row + at.n_tokens);
        }
        gather_cells(&a, q, k_store, v_store, store_shift(regions, store_base), regions->remainder - store_base,
                     regions->local - store_base);
        attend_gathered(&a, q, 0, INT32_MAX);
        a.turn = NULL;
        const int64_t done = (panel + 1) * PANEL < regions->n_tokens ? (panel + 1) * PANEL : regions->n_tokens;
        const int64_t first = regions->first - base;
        attend_cells(&a, panel_queries(&a, q_local), k_local, v_local, base, regions->local - base, first + done, first + panel * PANEL);
        panel_attention_end(&a);
    }
}

static void attend_runs(struct attention *a, const struct repkv_regions *regions, const int32_t *runs) {
    for (int i = 0; i < runs[0]; i++) {
        const struct place at = places_of(runs)[i];
        attend_rows(a, at.row, at.row + at.n_tokens, store_shift(regions, at.position - at.row));
    }
}

/* Writes the new token to its row of the store: the same key as in `local`, or with far positions the key before RoPE. */
static void store_evictable(const struct attention *a, const struct repkv_attend_memory_one_sources *src, int64_t local_row,
                            int64_t store_row, int far) {
    const struct repkv_op_params *p = a->p;
    const struct ggml_tensor *k_local = src->k_local, *k_store = src->k_store, *v_store = src->v_store;
    const int d = p->head_dim, n_kv = p->n_head_kv;
    for (int kv = 0; kv < n_kv; kv++) {
        const float *key = a->rows, *x = (const float *)src->qkv->data + (p->n_head + kv) * d;
        if (far) {
            key = stored_key(p, a->rows, x, kv);
        } else {
            to_f32(k_local->type, row(k_local, local_row) + head_bytes(p, k_local) * (size_t)kv, a->rows, d);
        }
        from_f32(k_store->type, key, row(k_store, store_row) + head_bytes(p, k_store) * (size_t)kv, d);
        from_f32(v_store->type, x + n_kv * d, row(v_store, store_row) + head_bytes(p, v_store) * (size_t)kv, d);
    }
}

void repkv_attend_memory_one(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
    const struct repkv_op_params *p = userdata;
    const struct repkv_attend_memory_one_sources *src = SOURCES(dst, attend_memory_one);
    const float *qkv = src->qkv->data, *near = src->rope->data, *far = near + p->rope_dim;
    const struct repkv_regions *regions = regions_of(src->regions);
    const int64_t base = regions->local_base, store_base = regions->store_base;
    const struct ggml_tensor *runs = src->runs;
    const int n_together = runs->ne[1] > 1 ? 1 : p->n_head_kv; /* key heads that attend the same rows */
    int64_t n_far = 0;

    struct attention a;
    attention_begin(&a, p, dst, ith);
    if (ith == nth - 1) {
        const int64_t new_row = regions->first - base, store_row = regions->first - store_base;
        store_new(&a, src->k_local, src->v_local, new_row, qkv, near);
        if (store_row < src->k_store->ne[1]) store_evictable(&a, src, new_row, store_row, regions->far);
    }
    rotate_queries(p, a.near, qkv, near);
    rotate_queries(p, a.older, qkv, p->order ? near : far);
    for (int h = 0; h < p->n_head && p->order; h++) turn_f32(a.older + h * p->head_dim, p->order->query, p->rope_dim);
    for (int kv = 0; kv < p->n_head_kv; kv += n_together) n_far += rows_of(regions, runs_of(runs, 0, p->n_head_kv, kv));
    attention_share(&a, n_far, ith, nth);
    for (int kv = 0; kv < p->n_head_kv; kv += n_together) {
        const int32_t *attended = runs_of(runs, 0, p->n_head_kv, kv);
        attend_in(&a, a.older, src->k_store, src->v_store, kv, kv + n_together);
        if (p->order) a.turn = p->order->keys + rows_of(regions, attended) * p->rope_dim;
        attend_rows(&a, 0, regions->sink_end, store_shift(regions, 0));
        attend_runs(&a, regions, attended);
        attend_rows(&a, regions->remainder - store_base, regions->local - store_base, store_shift(regions, store_base));
    }
    a.turn = NULL;
    attention_share(&a, regions->first + 1 - regions->local, ith, nth);
    attend_in(&a, a.near, src->k_local, src->v_local, 0, p->n_head_kv);
    attend_rows(&a, regions->local - base, regions->first + 1 - base, base);
    attention_end(&a);
}

void repkv_rotate_rows(char *rows, int type, size_t row_bytes, int64_t n_rows, int n_heads, int head_dim, const float *table,
                       int rope_dim, float *scratch) {
    float *to = scratch + n_heads * head_dim;
    for (int64_t r = 0; r < n_rows; r++, rows += row_bytes, table += rope_dim) {
        to_f32((enum ggml_type)type, rows, scratch, n_heads * head_dim);
        for (int h = 0; h < n_heads; h++) {
            rope(to + h * head_dim, scratch + h * head_dim, table, table + rope_dim / 2, rope_dim, head_dim);
        }
        from_f32((enum ggml_type)type, to, rows, n_heads * head_dim);
    }
}

#include "prefill_ops.h"

#include "compute.h"

enum {
    BLOCK_ROWS = 48,  /* weight rows converted at once: with BLOCK_K columns they stay in a 1 MiB second-level cache */
    BLOCK_K = 2048,   /* a multiple of every quantisation block */
    SHIFT_ROWS = 16,  /* keys shifted at once */
};

/* Holds rows of a weight as F32, and matmul_gate_up's second product. */
static size_t matmul_scratch(void) {
    return repkv_piece(BLOCK_ROWS * BLOCK_K) + repkv_piece(BLOCK_ROWS * PANEL);
}

/* Holds a token's head, and a panel's head before and after rotation. */
static size_t store_scratch(int head_dim) {
    return repkv_piece((size_t)head_dim) + 2 * repkv_piece((size_t)head_dim * PANEL);
}

/* Holds keys of all heads. */
static size_t shift_scratch(size_t width) {
    return repkv_piece(SHIFT_ROWS * width);
}

size_t repkv_prefill_scratch(int group, int n_head_kv, int head_dim) {
    const size_t matmul = matmul_scratch(), attend = panel_attention_scratch(group, head_dim), store = store_scratch(head_dim);
    const size_t shift = shift_scratch((size_t)(n_head_kv * head_dim)), most = matmul > attend ? matmul : attend;
    const size_t most_keys = store > shift ? store : shift;
    return most > most_keys ? most : most_keys;
}

void repkv_pack(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
    (void)userdata;
    const struct repkv_pack_sources *src = SOURCES(dst, pack);
    const struct ggml_tensor *x = src->x;
    const int64_t n = x->ne[0], n_tokens = x->ne[1];
    int64_t begin, end;
    share(dst->ne[2], ith, nth, &begin, &end);
    for (int64_t panel = begin; panel < end; panel++) {
        float *y = (float *)dst->data + panel * n * PANEL;
        for (int64_t t = 0; t < PANEL; t++) {
            const int64_t token = panel * PANEL + t;
            const float *from = token < n_tokens ? (const float *)x->data + token * n : NULL;
            for (int64_t i = 0; i < n; i++) y[i * PANEL + t] = from ? from[i] : 0.0f;
        }
    }
}

void repkv_norm_packed(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
    const struct repkv_op_params *p = userdata;
    const struct repkv_norm_packed_sources *src = SOURCES(dst, norm_packed);
    const int64_t n = dst->ne[1];
    const float *weight = src->norm->data;
    int64_t begin, end;
    share(dst->ne[2], ith, nth, &begin, &end);
    for (int64_t panel = begin; panel < end; panel++) {
        const float *x = (const float *)src->x->data + panel * n * PANEL;
        float *y = (float *)dst->data + panel * n * PANEL;
        for (int half = 0; half < PANEL; half += 16) {
            f32x16 sum[4] = {splat16(0.0f), splat16(0.0f), splat16(0.0f), splat16(0.0f)};
            for (int64_t i = 0; i < n; i++) {
                const f32x16 v = load16(x + i * PANEL + half);
                sum[i & 3] += v * v;
            }
            const f32x16 mean = ((sum[0] + sum[1]) + (sum[2] + sum[3])) / (float)n + p->eps;
            f32x16 scale;
            for (int t = 0; t < 16; t++) scale[t] = 1.0f / sqrtf(mean[t]);
            for (int64_t i = 0; i < n; i++) {
                store16(y + i * PANEL + half, load16(x + i * PANEL + half) * scale * splat16(weight[i]));
            }
        }
    }
}

/* Converts rows [r0, r0 + n_rows) and columns [k0, k0 + n_k) of a weight to F32 [n_rows, n_k]. */
static void convert_block(float *to, const struct ggml_tensor *w, int64_t r0, int n_rows, int64_t k0, int n_k) {
    const size_t offset = (size_t)k0 / (size_t)repkv_ggml.get_type_traits(w->type)->blck_size * repkv_ggml.get_type_traits(w->type)->type_size;
    for (int r = 0; r < n_rows; r++) to_f32(w->type, row(w, r0 + r) + offset, to + (size_t)r * (size_t)n_k, n_k);
}

/* y[panel][first + r] = weight rows [begin, end) @ x, for all panels; y has n_out features. */
static void multiply(const struct repkv_op_params *p, struct ggml_tensor *dst, const struct ggml_tensor *x,
                     const struct ggml_tensor *w, int64_t begin, int64_t end, int64_t first, float *block) {
    const int64_t n_in = x->ne[1], n_out = dst->ne[1], n_panels = dst->ne[2];
    for (int64_t r0 = begin; r0 < end; r0 += BLOCK_ROWS) {
        const int n_rows = end - r0 < BLOCK_ROWS ? (int)(end - r0) : BLOCK_ROWS;
        for (int64_t k0 = 0; k0 < n_in; k0 += BLOCK_K) {
            const int n_k = n_in - k0 < BLOCK_K ? (int)(n_in - k0) : BLOCK_K;
            convert_block(block, w, r0, n_rows, k0, n_k);
            if (repkv_abort_requested(p->compute)) return;
            for (int64_t panel = 0; panel < n_panels; panel++) {
                float *y = (float *)dst->data + (panel * n_out + first + r0) * PANEL;
                const float *b = (const float *)x->data + (panel * n_in + k0) * PANEL;
                if (k0 == 0) {
                    product(n_rows, y, PANEL, block, (size_t)n_k, 1, b, n_k, 0);
                } else {
                    product(n_rows, y, PANEL, block, (size_t)n_k, 1, b, n_k, 1);
                }
            }
        }
    }
}

/* Sets [begin, end) to the rows of a thread, in whole register tiles. */
static void share_rows(int64_t n_rows, int ith, int nth, int64_t *begin, int64_t *end) {
    share((n_rows + ROWS - 1) / ROWS, ith, nth, begin, end);
    *begin *= ROWS;
    *end = *end * ROWS < n_rows ? *end * ROWS : n_rows;
}

void repkv_matmul(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
    const struct repkv_op_params *p = userdata;
    const struct repkv_matmul_sources *src = SOURCES(dst, matmul);
    struct repkv_scratch s = repkv_thread_scratch(p, ith, matmul_scratch());
    float *block = repkv_take(&s, BLOCK_ROWS * BLOCK_K);
    int64_t first = 0;
    for (int m = 0; m < p->n_matrices; m++) {
        const struct ggml_tensor *w = src->matrices[m];
        int64_t begin, end;
        share_rows(w->ne[1], ith, nth, &begin, &end);
        multiply(p, dst, src->x, w, begin, end, first, block);
        if (p->n_biases) {
            const float *bias = src->matrices[p->n_matrices + m]->data;
            for (int64_t panel = 0; panel < dst->ne[2]; panel++) {
                float *y = (float *)dst->data + (panel * dst->ne[1] + first) * PANEL;
                for (int64_t r = begin; r < end; r++) {
                    for (int t = 0; t < PANEL; t++) y[r * PANEL + t] += bias[r];
                }
            }
        }
        first += w->ne[1];
    }
}

void repkv_matmul_add(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
    const struct repkv_op_params *p = userdata;
    const struct repkv_matmul_add_sources *src = SOURCES(dst, matmul_add);
    int64_t begin, end;
    share_rows(dst->ne[1], ith, nth, &begin, &end);
    struct repkv_scratch s = repkv_thread_scratch(p, ith, matmul_scratch());
    multiply(p, dst, src->x, src->weight, begin, end, 0, repkv_take(&s, BLOCK_ROWS * BLOCK_K));
    for (int64_t panel = 0; panel < dst->ne[2]; panel++) {
        const int64_t offset = panel * dst->ne[1] * PANEL;
        float *y = (float *)dst->data + offset;
        const float *residual = (const float *)src->residual->data + offset;
        for (int64_t i = begin * PANEL; i < end * PANEL; i += 16) store16(y + i, load16(y + i) + load16(residual + i));
    }
}

void repkv_matmul_gate_up(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
    const struct repkv_op_params *p = userdata;
    const struct repkv_matmul_gate_up_sources *src = SOURCES(dst, matmul_gate_up);
    const struct ggml_tensor *x = src->x, *gate = src->gate, *up = src->up;
    const int64_t n_in = x->ne[1], n_out = dst->ne[1];
    struct repkv_scratch s = repkv_thread_scratch(p, ith, matmul_scratch());
    float *block = repkv_take(&s, BLOCK_ROWS * BLOCK_K), *product_of_up = repkv_take(&s, BLOCK_ROWS * PANEL);
    int64_t begin, end;
    share_rows(n_out, ith, nth, &begin, &end);
    multiply(p, dst, x, gate, begin, end, 0, block);
    /* A sum of `up` must be complete before it meets the gate, so blocks have whole rows, as many as fit. */
    const int64_t rows_per_block = n_in <= BLOCK_K ? BLOCK_ROWS : (int64_t)BLOCK_ROWS * BLOCK_K / n_in;
    const int64_t step = rows_per_block < 1 ? 1 : rows_per_block;
    for (int64_t r0 = begin; r0 < end; r0 += step) {
        const int n_rows = end - r0 < step ? (int)(end - r0) : (int)step;
        if (repkv_abort_requested(p->compute)) return;
        convert_block(block, up, r0, n_rows, 0, (int)n_in);
        for (int64_t panel = 0; panel < dst->ne[2]; panel++) {
            const float *b = (const float *)x->data + panel * n_in * PANEL;
            product(n_rows, product_of_up, PANEL, block, (size_t)n_in, 1, b, (int)n_in, 0);
            float *y = (float *)dst->data + (panel * n_out + r0) * PANEL;
            for (int i = 0; i < n_rows * PANEL; i += 16) {
                const f32x16 g = load16(y + i);
                store16(y + i, g / (1.0f + exp16(-g)) * load16(product_of_up + i));
            }
        }
    }
}

void repkv_store_kv(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
    const struct repkv_op_params *p = userdata;
    const struct repkv_store_kv_sources *src = SOURCES(dst, store_kv);
    const struct ggml_tensor *qkv = src->qkv, *k_arena = src->k_arena, *v_arena = src->v_arena;
    const int32_t *cells = src->cells->data;
    const int d = p->head_dim, n_features = (p->n_head + 2 * p->n_head_kv) * d;
    const size_t k_head_bytes = k_arena->nb[1] / (size_t)p->n_head_kv, v_head_bytes = v_arena->nb[1] / (size_t)p->n_head_kv;
    struct repkv_scratch s = repkv_thread_scratch(p, ith, store_scratch(d));
    float *buffer = repkv_take(&s, (size_t)d), *rotated = repkv_take(&s, (size_t)d * PANEL);
    float *keys = repkv_take(&s, (size_t)d * PANEL);
    int64_t begin, end;
    share(dst->ne[2], ith, nth, &begin, &end);
    for (int64_t panel = begin; panel < end; panel++) {
        const float *x = (const float *)qkv->data + panel * n_features * PANEL;
        const float *rope = (const float *)src->rope->data + panel * p->rope_dim * PANEL;
        float *y = (float *)dst->data + panel * p->n_head * d * PANEL;
        const int64_t cell = cells[0] + panel * PANEL;
        const int n_tokens = cells[1] - panel * PANEL < PANEL ? (int)(cells[1] - panel * PANEL) : PANEL;
        for (int h = 0; h < p->n_head; h++) rope_panel(y + h * d * PANEL, x + h * d * PANEL, rope, p->scale, p->rope_dim, d);
        for (int h = 0; h < p->n_head_kv; h++) {
            rope_panel(rotated, stored_panel(p, keys, x + (p->n_head + h) * d * PANEL, h), rope, 1.0f, p->rope_dim, d);
            scatter_panel(k_arena, rotated, cell, n_tokens, h, k_head_bytes, d, buffer);
            scatter_panel(v_arena, x + (p->n_head + p->n_head_kv + h) * d * PANEL, cell, n_tokens, h, v_head_bytes, d, buffer);
        }
    }
}

void repkv_attend_chunk(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
    const struct repkv_op_params *p = userdata;
    const struct repkv_attend_chunk_sources *src = SOURCES(dst, attend_chunk);
    const int32_t *cells = src->cells->data;
    /* A unit is a panel and a key/value head; taking every nth spreads the long panels over the threads. */
    for (int64_t unit = ith; unit < dst->ne[2] * p->n_head_kv; unit += nth) {
        if (repkv_abort_requested(p->compute)) return;
        const int64_t panel = unit / p->n_head_kv;
        struct panel_attention a = panel_attention_begin(p, dst, panel, (int)(unit % p->n_head_kv), ith);
        const int64_t n_tokens = cells[1] < (panel + 1) * PANEL ? cells[1] : (panel + 1) * PANEL;
        attend_cells(&a, panel_queries(&a, src->q), src->k_arena, src->v_arena, 0, 0, cells[0] + n_tokens, cells[0] + panel * PANEL);
        panel_attention_end(&a);
    }
}

void repkv_shift_keys(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
    const struct repkv_op_params *p = userdata;
    const struct repkv_shift_keys_sources *src = SOURCES(dst, shift_keys);
    const int width = p->n_head_kv * p->head_dim;
    const int64_t first = src->rows ? *(const int64_t *)src->rows->data : 0;
    struct repkv_scratch s = repkv_thread_scratch(p, ith, shift_scratch((size_t)width));
    float *buffer = repkv_take(&s, (size_t)(SHIFT_ROWS * width));
    int64_t begin, end;
    share(dst->ne[1], ith, nth, &begin, &end);
    for (int64_t r = begin; r < end; r += SHIFT_ROWS) {
        const int n = end - r < SHIFT_ROWS ? (int)(end - r) : SHIFT_ROWS;
        to_f32(src->keys->type, row(src->keys, r), buffer, n * width);
        add_centre(p, buffer, n, (size_t)width, first + r, 0, p->n_head_kv, p->sign);
        from_f32(dst->type, buffer, row(dst, r), n * width);
    }
}

#include "decode_ops.h"

#include "convert.h"
#include "simd.h"

enum { TILE = 32 /* cells whose keys and values, of all heads, are converted at once: rows are read in the order they lie */ };

/* A quantised row never takes more bytes than the F32 row, but for block headers on very short rows. */
static size_t row_bytes(size_t n) {
    return ((n * sizeof(float) + 511) / 256) * 256;
}

size_t repkv_decode_scratch(int n_embd, int n_ff, int n_head, int n_head_kv, int head_dim) {
    size_t widest = (size_t)(n_ff > n_embd ? n_ff : n_embd);
    const size_t n_embd_q = (size_t)n_head * (size_t)head_dim, n_embd_kv = (size_t)n_head_kv * (size_t)head_dim;
    if (n_embd_q > widest) widest = n_embd_q;
    /* x after norm, x quantised; attend: queries of all heads, tiles of keys and values, scores */
    const size_t linear = 2 * row_bytes(widest);
    const size_t attend = row_bytes(n_embd_q) + 2 * row_bytes(TILE * n_embd_kv) + row_bytes(TILE);
    return linear > attend ? linear : attend;
}

static void rms_norm(float *y, const float *x, const float *weight, int n, float eps) {
    double sum = 0.0;
    int i = 0;
    for (; i + 16 <= n; i += 16) {
        const f32x16 v = load16(x + i);
        sum += (double)sum16(v * v);
    }
    for (; i < n; i++) sum += (double)x[i] * (double)x[i];
    const float scale = 1.0f / sqrtf((float)(sum / n) + eps);
    for (i = 0; i < n; i++) y[i] = x[i] * scale * weight[i];
}

void repkv_norm_linear(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
    const struct repkv_op_params *p = userdata;
    const int n = (int)dst->src[0]->ne[0];
    float *x = (float *)repkv_thread_scratch(p, ith);
    char *quantized = (char *)x + row_bytes((size_t)n);
    rms_norm(x, dst->src[0]->data, dst->src[1]->data, n, p->eps);

    int64_t begin, end, first = 0;
    share(dst->ne[0], ith, nth, &begin, &end);
    int last_type = -1;
    const void *input = NULL;
    for (int m = 0; m < p->n_matrices; m++) {
        const struct ggml_tensor *w = dst->src[2 + m];
        const float *bias = p->n_biases ? dst->src[2 + p->n_matrices + m]->data : NULL;
        float *y = (float *)dst->data + first;
        const int64_t r0 = begin > first ? begin - first : 0;
        const int64_t r1 = end - first < w->ne[1] ? end - first : w->ne[1];
        if (r0 < r1) {
            if (last_type != (int)w->type) input = quantize_row(w->type, x, quantized, n);
            last_type = (int)w->type;
            const ggml_vec_dot_t vec_dot = repkv_ggml.get_type_traits_cpu(w->type)->vec_dot;
            for (int64_t r = r0; r < r1; r++) {
                vec_dot(n, y + r, 0, row(w, r), 0, input, 0, 1);
                if (bias) y[r] += bias[r];
            }
        }
        first += w->ne[1];
    }
}

void repkv_linear_add(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
    const struct repkv_op_params *p = userdata;
    const struct ggml_tensor *w = dst->src[1];
    const float *residual = dst->src[2]->data;
    const int n = (int)w->ne[0];
    const void *input = quantize_row(w->type, dst->src[0]->data, repkv_thread_scratch(p, ith), n);
    const ggml_vec_dot_t vec_dot = repkv_ggml.get_type_traits_cpu(w->type)->vec_dot;
    float *y = dst->data;
    int64_t begin, end;
    share(w->ne[1], ith, nth, &begin, &end);
    for (int64_t r = begin; r < end; r++) {
        vec_dot(n, y + r, 0, row(w, r), 0, input, 0, 1);
        y[r] += residual[r];
    }
}

void repkv_gate_up(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
    const struct repkv_op_params *p = userdata;
    const struct ggml_tensor *gate = dst->src[2], *up = dst->src[3];
    const int n = (int)gate->ne[0];
    float *x = (float *)repkv_thread_scratch(p, ith);
    char *quantized = (char *)x + row_bytes((size_t)n);
    rms_norm(x, dst->src[0]->data, dst->src[1]->data, n, p->eps);
    float *y = dst->data;
    int64_t begin, end;
    share(gate->ne[1], ith, nth, &begin, &end);

    const void *input = quantize_row(gate->type, x, quantized, n);
    ggml_vec_dot_t vec_dot = repkv_ggml.get_type_traits_cpu(gate->type)->vec_dot;
    for (int64_t r = begin; r < end; r++) vec_dot(n, y + r, 0, row(gate, r), 0, input, 0, 1);

    if (up->type != gate->type) input = quantize_row(up->type, x, quantized, n);
    vec_dot = repkv_ggml.get_type_traits_cpu(up->type)->vec_dot;
    for (int64_t r0 = begin; r0 < end; r0 += 16) {
        const int64_t n_rows = end - r0 < 16 ? end - r0 : 16;
        float g[16] = {0}, u[16] = {0};
        memcpy(g, y + r0, (size_t)n_rows * sizeof(float));
        for (int64_t r = 0; r < n_rows; r++) vec_dot(n, u + r, 0, row(up, r0 + r), 0, input, 0, 1);
        const f32x16 gv = load16(g);
        store16(g, gv / (1.0f + exp16(-gv)) * load16(u));
        memcpy(y + r0, g, (size_t)n_rows * sizeof(float));
    }
}

/* Rotates pairs (i, i + rope_dim / 2), the "neox" layout that Qwen2 uses. */
static void rope(float *y, const float *x, const float *cosine, const float *sine, int rope_dim, int head_dim) {
    const int half = rope_dim / 2;
    for (int i = 0; i < half; i++) {
        const float a = x[i], b = x[i + half];
        y[i] = a * cosine[i] - b * sine[i];
        y[i + half] = a * sine[i] + b * cosine[i];
    }
    for (int i = rope_dim; i < head_dim; i++) y[i] = x[i];
}

/* Folds n_cells keys and values [n_cells, stride] into the running (maximum, sum, values) of one query head. */
static void fold(float *partial, float *scores, const float *q, const float *keys, const float *values, int n_cells,
                 size_t stride, int d, float scale) {
    float tile_max = -INFINITY;
    for (int c = 0; c < n_cells; c++) {
        scores[c] = dot_f32(q, keys + (size_t)c * stride, d) * scale;
        if (scores[c] > tile_max) tile_max = scores[c];
    }
    for (int c = n_cells; c < TILE; c++) scores[c] = -INFINITY;
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

/* One thread's share of attention for all heads. */
struct attention {
    const struct repkv_op_params *p;
    const struct ggml_tensor *k_arena, *v_arena;
    float *q, *keys, *values, *scores, *partials;
};

static void attend_cells(const struct attention *a, int64_t first, int n_cells) {
    const int d = a->p->head_dim, group = a->p->n_head / a->p->n_head_kv, width = a->p->n_head_kv * d;
    to_f32(a->k_arena->type, row(a->k_arena, first), a->keys, n_cells * width);
    to_f32(a->v_arena->type, row(a->v_arena, first), a->values, n_cells * width);
    for (int h = 0; h < a->p->n_head; h++) {
        const int kv = h / group * d;
        fold(a->partials + (size_t)h * (size_t)(2 + d), a->scores, a->q + h * d, a->keys + kv, a->values + kv, n_cells,
             (size_t)width, d, a->p->scale);
    }
}

void repkv_attend(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
    const struct repkv_op_params *p = userdata;
    const float *qkv = dst->src[0]->data;
    const float *cosine = dst->src[3]->data, *sine = cosine + p->rope_dim / 2;
    const int32_t *cells = dst->src[4]->data;
    const int d = p->head_dim, width = p->n_head_kv * d;

    struct attention a = {.p = p, .k_arena = dst->src[1], .v_arena = dst->src[2]};
    a.q = (float *)repkv_thread_scratch(p, ith);
    a.keys = a.q + row_bytes((size_t)(p->n_head * d)) / sizeof(float);
    a.values = a.keys + row_bytes((size_t)(TILE * width)) / sizeof(float);
    a.scores = a.values + row_bytes((size_t)(TILE * width)) / sizeof(float);
    a.partials = (float *)dst->data + (size_t)ith * (size_t)p->n_head * (size_t)(2 + d);
    for (int h = 0; h < p->n_head; h++) {
        rope(a.q + h * d, qkv + h * d, cosine, sine, p->rope_dim, d);
        float *partial = a.partials + (size_t)h * (size_t)(2 + d);
        partial[0] = -INFINITY;
        memset(partial + 1, 0, (size_t)(1 + d) * sizeof(float));
    }

    int64_t begin, end;
    share(cells[1], ith, nth, &begin, &end);
    for (int64_t c = begin; c < end; c += TILE) attend_cells(&a, c, end - c < TILE ? (int)(end - c) : TILE);
    if (ith != nth - 1) return;

    /* The new token: stored first and read back, so that it is attended with the cache's precision. */
    for (int kv = 0; kv < p->n_head_kv; kv++) {
        rope(a.keys + kv * d, qkv + (p->n_head + kv) * d, cosine, sine, p->rope_dim, d);
    }
    from_f32(a.k_arena->type, a.keys, row(a.k_arena, cells[0]), width);
    from_f32(a.v_arena->type, qkv + p->n_head * d + width, row(a.v_arena, cells[0]), width);
    attend_cells(&a, cells[0], 1);
}

/* The threads' partial sums of one head become its output [d]. */
static void merge_head(float *y, const float *partials, int nth, int n_head, int h, int d) {
    const size_t stride = (size_t)n_head * (size_t)(2 + d);
    const float *first = partials + (size_t)h * (size_t)(2 + d);
    float max = -INFINITY, sum = 0.0f;
    for (int t = 0; t < nth; t++) {
        if (first[t * stride] > max) max = first[t * stride];
    }
    memset(y, 0, (size_t)d * sizeof(float));
    for (int t = 0; t < nth; t++) {
        const float *partial = first + t * stride;
        if (partial[1] == 0.0f) continue;
        const float weight = expf(partial[0] - max);
        sum += weight * partial[1];
        axpy_f32(y, partial + 2, weight, d);
    }
    scale_f32(y, 1.0f / sum, d);
}

void repkv_attn_out(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
    const struct repkv_op_params *p = userdata;
    const struct ggml_tensor *w = dst->src[1];
    const float *residual = dst->src[2]->data;
    const int n = (int)w->ne[0];
    float *x = (float *)repkv_thread_scratch(p, ith);
    for (int h = 0; h < p->n_head; h++) {
        merge_head(x + h * p->head_dim, dst->src[0]->data, nth, p->n_head, h, p->head_dim);
    }
    const void *input = quantize_row(w->type, x, (char *)x + row_bytes((size_t)n), n);
    const ggml_vec_dot_t vec_dot = repkv_ggml.get_type_traits_cpu(w->type)->vec_dot;
    float *y = dst->data;
    int64_t begin, end;
    share(w->ne[1], ith, nth, &begin, &end);
    for (int64_t r = begin; r < end; r++) {
        vec_dot(n, y + r, 0, row(w, r), 0, input, 0, 1);
        y[r] += residual[r];
    }
}

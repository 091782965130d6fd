#include "decode_ops.h"

#include "one_token.h"

/* A quantised row never takes more bytes than the F32 row, except for block headers on very short rows. */
static size_t quantized_size(size_t n) {
    return n + 128;
}

/* Holds a row, and the same row quantised. */
static size_t linear_scratch(size_t n) {
    return repkv_piece(n) + repkv_piece(quantized_size(n));
}

size_t repkv_decode_scratch(int n_embd, int n_ff, int n_head, int n_head_kv, int head_dim) {
    size_t widest = (size_t)(n_ff > n_embd ? n_ff : n_embd);
    const size_t n_embd_q = (size_t)n_head * (size_t)head_dim;
    if (n_embd_q > widest) widest = n_embd_q;
    const size_t linear = linear_scratch(widest), attend = attention_scratch(n_head, n_head_kv, head_dim);
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
    const struct repkv_norm_linear_sources *src = SOURCES(dst, norm_linear);
    const int n = (int)src->x->ne[0];
    struct repkv_scratch s = repkv_thread_scratch(p, ith, linear_scratch((size_t)n));
    float *x = repkv_take(&s, (size_t)n), *quantized = repkv_take(&s, quantized_size((size_t)n));
    rms_norm(x, src->x->data, src->norm->data, n, p->eps);

    int64_t begin, end, first = 0;
    share(dst->ne[0], ith, nth, &begin, &end);
    int last_type = -1;
    const void *input = NULL;
    for (int m = 0; m < p->n_matrices; m++) {
        const struct ggml_tensor *w = src->matrices[m];
        const float *bias = p->n_biases ? src->matrices[p->n_matrices + m]->data : NULL;
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
    const struct repkv_linear_add_sources *src = SOURCES(dst, linear_add);
    const struct ggml_tensor *w = src->weight;
    const float *residual = src->residual->data;
    const int n = (int)w->ne[0];
    struct repkv_scratch s = repkv_thread_scratch(p, ith, repkv_piece(quantized_size((size_t)n)));
    const void *input = quantize_row(w->type, src->x->data, repkv_take(&s, quantized_size((size_t)n)), n);
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
    const struct repkv_gate_up_sources *src = SOURCES(dst, gate_up);
    const struct ggml_tensor *gate = src->gate, *up = src->up;
    const int n = (int)gate->ne[0];
    struct repkv_scratch s = repkv_thread_scratch(p, ith, linear_scratch((size_t)n));
    float *x = repkv_take(&s, (size_t)n), *quantized = repkv_take(&s, quantized_size((size_t)n));
    rms_norm(x, src->x->data, src->norm->data, n, p->eps);
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

void repkv_attend(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
    const struct repkv_op_params *p = userdata;
    const struct repkv_attend_sources *src = SOURCES(dst, attend);
    const float *qkv = src->qkv->data, *table = src->rope->data;
    const int32_t *cells = src->cells->data;
    struct attention a;
    attention_begin(&a, p, dst, ith);
    rotate_queries(p, a.near, qkv, table);
    attention_share(&a, cells[1] + 1, ith, nth);
    attend_in(&a, a.near, src->k_arena, src->v_arena, 0, p->n_head_kv);
    if (ith == nth - 1) store_new(&a, src->k_arena, src->v_arena, cells[0], qkv, table);
    attend_rows(&a, 0, cells[1], 0);
    attend_rows(&a, cells[0], cells[0] + 1, 0);
    attention_end(&a);
}

/* Merges the threads' partial sums of one head to its output y [d]. */
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
    const struct repkv_attn_out_sources *src = SOURCES(dst, attn_out);
    const struct ggml_tensor *w = src->weight;
    const float *residual = src->residual->data;
    const int n = (int)w->ne[0];
    struct repkv_scratch s = repkv_thread_scratch(p, ith, linear_scratch((size_t)n));
    float *x = repkv_take(&s, (size_t)n), *quantized = repkv_take(&s, quantized_size((size_t)n));
    for (int h = 0; h < p->n_head; h++) {
        merge_head(x + h * p->head_dim, src->partials->data, nth, p->n_head, h, p->head_dim);
    }
    const void *input = quantize_row(w->type, x, quantized, n);
    const ggml_vec_dot_t vec_dot = repkv_ggml.get_type_traits_cpu(w->type)->vec_dot;
    float *y = dst->data;
    int64_t begin, end;
    share(w->ne[1], ith, nth, &begin, &end);
    for (int64_t r = begin; r < end; r++) {
        vec_dot(n, y + r, 0, row(w, r), 0, input, 0, 1);
        y[r] += residual[r];
    }
}

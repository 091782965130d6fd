#include "memory_ops.h"

#include "compute.h"
#include "one_token.h"
#include "packed.h"

static const int32_t *regions_of(const struct ggml_tensor *t) {
    return t->data;
}

void repkv_store_far(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
    const struct repkv_op_params *p = userdata;
    const struct ggml_tensor *qkv = dst->src[0], *k_store = dst->src[1], *v_store = dst->src[2];
    const float *table = dst->src[3]->data;
    const int32_t *regions = regions_of(dst->src[4]);
    const int d = p->head_dim, half = p->rope_dim / 2;
    const size_t k_head_bytes = k_store->nb[1] / (size_t)p->n_head_kv, v_head_bytes = v_store->nb[1] / (size_t)p->n_head_kv;
    float *buffer = (float *)repkv_thread_scratch(p, ith);
    int64_t begin, end;
    share(dst->ne[2], ith, nth, &begin, &end);
    for (int64_t panel = begin; panel < end; panel++) {
        const float *x = (const float *)qkv->data + panel * qkv->ne[1] * PANEL;
        float *y = (float *)dst->data + panel * p->n_head * d * PANEL;
        const int64_t position = regions[FIRST] + panel * PANEL;
        const int n_tokens = regions[N_TOKENS] - panel * PANEL < PANEL ? (int)(regions[N_TOKENS] - panel * PANEL) : PANEL;
        for (int h = 0; h < p->n_head_kv; h++) {
            scatter_panel(k_store, x + (p->n_head + h) * d * PANEL, position, n_tokens, h, k_head_bytes, d, buffer);
            scatter_panel(v_store, x + (p->n_head + p->n_head_kv + h) * d * PANEL, position, n_tokens, h, v_head_bytes, d, buffer);
        }
        for (int h = 0; h < p->n_head; h++, x += d * PANEL, y += d * PANEL) {
            for (int i = 0; i < half; i++) {
                const float c = table[i] * p->scale, s = table[i + half] * p->scale;
                for (int t = 0; t < PANEL; t += 16) {
                    const f32x16 a = load16(x + i * PANEL + t), b = load16(x + (i + half) * PANEL + t);
                    store16(y + i * PANEL + t, a * c - b * s);
                    store16(y + (i + half) * PANEL + t, a * s + b * c);
                }
            }
            for (int i = p->rope_dim * PANEL; i < d * PANEL; i += 16) store16(y + i, load16(x + i) * p->scale);
        }
    }
}

/* sum[d] += sign * token t's query, summed over the heads that share key head kv. */
static void add_query(float *sum, const struct ggml_tensor *queries, const struct repkv_op_params *p, int kv, int64_t t,
                      float sign) {
    const int d = p->head_dim, group = p->n_head / p->n_head_kv;
    const float *q = (const float *)queries->data + ((t / PANEL * p->n_head + kv * group) * d) * PANEL + t % PANEL;
    for (int g = 0; g < group; g++) {
        for (int i = 0; i < d; i++) sum[i] += sign * q[(g * d + i) * PANEL];
    }
}

void repkv_score_acc(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
    const struct repkv_op_params *p = userdata;
    const struct ggml_tensor *queries = dst->src[0], *k_local = dst->src[1], *score = dst->src[2];
    const int32_t *regions = regions_of(dst->src[3]);
    const int d = p->head_dim;
    const size_t head_bytes = k_local->nb[1] / (size_t)p->n_head_kv;
    const float unit = 1.0f / (p->scale * (float)p->n_score);
    float *sum = (float *)repkv_thread_scratch(p, ith), *key = sum + d;
    if (ith == 0) *(float *)dst->data = 0.0f;

    const int64_t first = regions[FIRST], n_tokens = regions[N_TOKENS];
    const int64_t oldest = first > p->n_score ? first - p->n_score : 0;
    const int64_t from = oldest > regions[LOCAL_BASE] ? oldest : regions[LOCAL_BASE];
    int64_t begin, end;
    share(first + n_tokens - from, ith, nth, &begin, &end);
    for (int kv = 0; kv < p->n_head_kv; kv++) {
        /* A sum of the queries in (m, m + n_score] that slides along with m. */
        memset(sum, 0, (size_t)d * sizeof(float));
        int64_t low = 0, high = 0; /* tokens of this step in the sum: [low, high) */
        for (int64_t m = from + begin; m < from + end; m++) {
            const int64_t want_low = m + 1 > first ? m + 1 - first : 0;
            const int64_t want_high = m + 1 + p->n_score - first < n_tokens ? m + 1 + p->n_score - first : n_tokens;
            if (m == from + begin) low = high = want_low;
            while (high < want_high) add_query(sum, queries, p, kv, high++, 1.0f);
            while (low < want_low && low < high) add_query(sum, queries, p, kv, low++, -1.0f);
            to_f32(k_local->type, row(k_local, m - regions[LOCAL_BASE]) + (size_t)kv * head_bytes, key, d);
            ((float *)score->data)[m * p->n_head_kv + kv] += unit * dot_f32(sum, key, d);
        }
    }
}

void repkv_score_acc_one(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
    const struct repkv_op_params *p = userdata;
    const float *qkv = dst->src[0]->data, *cosine = dst->src[3]->data, *sine = cosine + p->rope_dim / 2;
    const struct ggml_tensor *k_local = dst->src[1], *score = dst->src[2];
    const int32_t *regions = regions_of(dst->src[4]);
    const int d = p->head_dim, group = p->n_head / p->n_head_kv, width = p->n_head_kv * d;
    float *sum = (float *)repkv_thread_scratch(p, ith), *rotated = sum + width, *keys = rotated + d;
    if (ith == 0) *(float *)dst->data = 0.0f;
    memset(sum, 0, (size_t)width * sizeof(float));
    for (int h = 0; h < p->n_head; h++) {
        rope(rotated, qkv + h * d, cosine, sine, p->rope_dim, d);
        axpy_f32(sum + h / group * d, rotated, 1.0f, d);
    }
    const int64_t first = regions[FIRST], oldest = first > p->n_score ? first - p->n_score : 0;
    const int64_t from = oldest > regions[LOCAL_BASE] ? oldest : regions[LOCAL_BASE];
    int64_t begin, end;
    share(first - from, ith, nth, &begin, &end);
    for (int64_t m = from + begin; m < from + end; m++) {
        to_f32(k_local->type, row(k_local, m - regions[LOCAL_BASE]), keys, width);
        float *r = (float *)score->data + m * p->n_head_kv;
        for (int kv = 0; kv < p->n_head_kv; kv++) r[kv] += dot_f32(sum + kv * d, keys + kv * d, d) / (float)p->n_score;
    }
}

/* x[b][h] = logsumexp over representatives of q_h . representative, for blocks [begin, end); q [n_head, d] is scaled. */
static void relevance(struct ggml_tensor *dst, const struct repkv_op_params *p, const struct ggml_tensor *index, const float *q,
                      float *representatives, int64_t begin, int64_t end) {
    const int d = p->head_dim, group = p->n_head / p->n_head_kv, n_repr = p->n_repr;
    const int width = p->n_head_kv * n_repr * d;
    for (int64_t b = begin; b < end; b++) {
        to_f32(index->type, row(index, b), representatives, width);
        float *x = (float *)dst->data + b * p->n_head;
        for (int h = 0; h < p->n_head; h++) {
            const float *k = representatives + h / group * n_repr * d;
            float max = -INFINITY, sum = 0.0f;
            for (int r = 0; r < n_repr; r++) {
                const float s = dot_f32(q + h * d, k + r * d, d);
                if (s > max) {
                    sum = sum * expf(max - s) + 1.0f;
                    max = s;
                } else {
                    sum += expf(s - max);
                }
            }
            x[h] = max + logf(sum);
        }
    }
}

void repkv_relevance(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
    const struct repkv_op_params *p = userdata;
    const int32_t *regions = regions_of(dst->src[2]);
    const int width = p->n_head * p->head_dim, n_tokens = regions[N_TOKENS];
    int64_t begin, end;
    share(regions[N_BLOCKS], ith, nth, &begin, &end);
    if (begin == end) return;
    /* The mean query of the chunk: padded lanes are left out. */
    float *mean = (float *)repkv_thread_scratch(p, ith);
    memset(mean, 0, (size_t)width * sizeof(float));
    for (int panel = 0; panel * PANEL < n_tokens; panel++) {
        const int lanes = n_tokens - panel * PANEL < PANEL ? n_tokens - panel * PANEL : PANEL;
        const float *q = (const float *)dst->src[0]->data + (size_t)panel * (size_t)width * PANEL;
        for (int i = 0; i < width; i++) {
            if (lanes == PANEL) {
                mean[i] += sum16(load16(q + i * PANEL) + load16(q + i * PANEL + 16));
            } else {
                for (int t = 0; t < lanes; t++) mean[i] += q[i * PANEL + t];
            }
        }
    }
    scale_f32(mean, 1.0f / (float)n_tokens, width);
    relevance(dst, p, dst->src[1], mean, mean + width, begin, end);
}

void repkv_relevance_one(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
    const struct repkv_op_params *p = userdata;
    const int d = p->head_dim;
    const float *qkv = dst->src[0]->data, *cosine = (const float *)dst->src[2]->data + p->rope_dim;
    const int32_t *regions = regions_of(dst->src[3]);
    int64_t begin, end;
    share(regions[N_BLOCKS], ith, nth, &begin, &end);
    if (begin == end) return;
    float *q = (float *)repkv_thread_scratch(p, ith);
    for (int h = 0; h < p->n_head; h++) rope(q + h * d, qkv + h * d, cosine, cosine + p->rope_dim / 2, p->rope_dim, d);
    scale_f32(q, p->scale, p->n_head * d);
    relevance(dst, p, dst->src[1], q, q + p->n_head * d, begin, end);
}

void repkv_block_topk(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
    (void)nth;
    if (ith != 0) return;
    const struct repkv_op_params *p = userdata;
    const float *x = dst->src[0]->data;
    const int n_blocks = regions_of(dst->src[1])[N_BLOCKS], n_head = p->n_head;
    int32_t *selected = dst->data;
    const int n_top = n_blocks < p->n_top ? n_blocks : p->n_top;
    selected[0] = n_top;
    if (n_blocks <= p->n_top || n_top == 0) {
        for (int b = 0; b < n_top; b++) selected[1 + b] = b;
        return;
    }
    /* Per head: the share of a softmax over blocks. Maximum and sum first, then every block's sum over heads. */
    float *max = (float *)repkv_thread_scratch(p, ith), *sum = max + n_head, *best = sum + n_head;
    for (int h = 0; h < n_head; h++) {
        max[h] = -INFINITY;
        sum[h] = 0.0f;
    }
    for (int b = 0; b < n_blocks; b++) {
        for (int h = 0; h < n_head; h++) {
            if (x[b * n_head + h] > max[h]) max[h] = x[b * n_head + h];
        }
    }
    for (int b = 0; b < n_blocks; b++) {
        for (int h = 0; h < n_head; h++) sum[h] += expf(x[b * n_head + h] - max[h]);
    }
    int n = 0;
    for (int b = 0; b < n_blocks; b++) {
        float weight = 0.0f;
        for (int h = 0; h < n_head; h++) weight += expf(x[b * n_head + h] - max[h]) / sum[h];
        if (!(weight == weight)) weight = -1.0f;
        /* A short sorted list, best first; an equal later block comes after. */
        if (n == n_top && !(weight > best[n - 1])) continue;
        int at = n < n_top ? n++ : n - 1;
        for (; at > 0 && weight > best[at - 1]; at--) {
            best[at] = best[at - 1];
            selected[1 + at] = selected[at];
        }
        best[at] = weight;
        selected[1 + at] = b;
    }
    /* Ascending, so that memory is read in order and sums do not depend on the ranking. */
    for (int i = 1; i < n_top; i++) {
        const int32_t b = selected[1 + i];
        int j = i;
        for (; j > 0 && selected[j] > b; j--) selected[1 + j] = selected[j];
        selected[1 + j] = b;
    }
}

void repkv_attend_memory(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
    const struct repkv_op_params *p = userdata;
    const struct ggml_tensor *q_local = dst->src[0], *k_local = dst->src[1], *v_local = dst->src[2];
    const struct ggml_tensor *q_far = dst->src[3], *k_store = dst->src[4], *v_store = dst->src[5];
    const int32_t *selected = dst->src[6]->data, *bounds = dst->src[7]->data, *regions = regions_of(dst->src[8]);
    const int64_t base = regions[LOCAL_BASE];
    for (int64_t unit = ith; unit < dst->ne[2] * p->n_head_kv; unit += nth) {
        if (repkv_abort_requested()) return;
        const int64_t panel = unit / p->n_head_kv;
        struct panel_attention a = panel_attention_begin(p, dst, panel, (int)(unit % p->n_head_kv), ith);
        attend_cells(&a, q_far, k_store, v_store, 0, regions[SINK_END], INT32_MAX);
        for (int i = 0; i < selected[0]; i++) {
            const int32_t b = selected[1 + i];
            attend_cells(&a, q_far, k_store, v_store, bounds[b], bounds[b + 1], INT32_MAX);
        }
        attend_cells(&a, q_far, k_store, v_store, regions[REMAINDER], regions[LOCAL], INT32_MAX);
        const int64_t done = (panel + 1) * PANEL < regions[N_TOKENS] ? (panel + 1) * PANEL : regions[N_TOKENS];
        const int64_t first = regions[FIRST] - base;
        attend_cells(&a, q_local, k_local, v_local, regions[LOCAL] - base, first + done, first + panel * PANEL);
        panel_attention_end(&a);
    }
}

/* The part of a run of rows [begin, end) that falls into a thread's share of all rows; moves `offset` past the run. */
static void attend_part(const struct attention *a, const float *q, const struct ggml_tensor *k_arena,
                        const struct ggml_tensor *v_arena, int64_t begin, int64_t end, int64_t *offset, int64_t mine_begin,
                        int64_t mine_end) {
    const int64_t start = *offset;
    *offset += end - begin;
    const int64_t low = mine_begin > start ? mine_begin - start : 0;
    const int64_t high = mine_end - start < end - begin ? mine_end - start : end - begin;
    if (low < high) attend_range(a, q, k_arena, v_arena, begin + low, begin + high);
}

void repkv_attend_memory_one(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
    const struct repkv_op_params *p = userdata;
    const float *qkv = dst->src[0]->data, *near = dst->src[5]->data, *far = near + p->rope_dim;
    const struct ggml_tensor *k_local = dst->src[1], *v_local = dst->src[2], *k_store = dst->src[3], *v_store = dst->src[4];
    const int32_t *selected = dst->src[6]->data, *bounds = dst->src[7]->data, *regions = regions_of(dst->src[8]);
    const int d = p->head_dim, half = p->rope_dim / 2;
    const int64_t base = regions[LOCAL_BASE];

    int64_t n_rows = regions[SINK_END] + regions[LOCAL] - regions[REMAINDER] + regions[FIRST] - regions[LOCAL];
    for (int i = 0; i < selected[0]; i++) n_rows += bounds[selected[1 + i] + 1] - bounds[selected[1 + i]];
    int64_t begin, end, offset = 0;
    share(n_rows, ith, nth, &begin, &end);

    struct attention a = attention_begin(p, dst, ith);
    for (int h = 0; h < p->n_head; h++) rope(a.q + h * d, qkv + h * d, far, far + half, p->rope_dim, d);
    attend_part(&a, a.q, k_store, v_store, 0, regions[SINK_END], &offset, begin, end);
    for (int i = 0; i < selected[0]; i++) {
        const int32_t b = selected[1 + i];
        attend_part(&a, a.q, k_store, v_store, bounds[b], bounds[b + 1], &offset, begin, end);
    }
    attend_part(&a, a.q, k_store, v_store, regions[REMAINDER], regions[LOCAL], &offset, begin, end);
    for (int h = 0; h < p->n_head; h++) rope(a.q + h * d, qkv + h * d, near, near + half, p->rope_dim, d);
    attend_part(&a, a.q, k_local, v_local, regions[LOCAL] - base, regions[FIRST] - base, &offset, begin, end);
    if (ith != nth - 1) return;

    attend_new(&a, a.q, k_local, v_local, regions[FIRST] - base, qkv, near, near + half);
    /* The store keeps what `local` keeps, or the key before RoPE. */
    const float *key = regions[FAR] ? qkv + p->n_head * d : a.keys;
    if (!regions[FAR]) to_f32(k_local->type, row(k_local, regions[FIRST] - base), a.keys, p->n_head_kv * d);
    from_f32(k_store->type, key, row(k_store, regions[FIRST]), p->n_head_kv * d);
    from_f32(v_store->type, qkv + (p->n_head + p->n_head_kv) * d, row(v_store, regions[FIRST]), p->n_head_kv * d);
}

void repkv_repr_topk(char *out, const char *store, size_t store_row_bytes, const float *score, int64_t begin, int64_t end,
                     int n_head_kv, int n_repr) {
    const size_t head_bytes = store_row_bytes / (size_t)n_head_kv;
    for (int kv = 0; kv < n_head_kv; kv++) {
        int64_t last = -1;
        int64_t chosen[64];
        int n = 0;
        const int wanted = n_repr < 64 ? n_repr : 64;
        for (int64_t m = begin; m < end; m++) {
            const float s = score[m * n_head_kv + kv];
            int at = n;
            /* Strictly greater: of equals the earlier token stays ahead. A NaN never moves up. */
            while (at > 0 && s > score[chosen[at - 1] * n_head_kv + kv]) at--;
            if (at >= wanted) continue;
            if (n < wanted) n++;
            for (int i = n - 1; i > at; i--) chosen[i] = chosen[i - 1];
            chosen[at] = m;
        }
        for (int i = 1; i < n; i++) {
            const int64_t m = chosen[i];
            int j = i;
            for (; j > 0 && chosen[j - 1] > m; j--) chosen[j] = chosen[j - 1];
            chosen[j] = m;
        }
        for (int i = 0; i < n_repr; i++) {
            if (i < n) last = chosen[i];
            memcpy(out + (size_t)(kv * n_repr + i) * head_bytes, store + (size_t)last * store_row_bytes + (size_t)kv * head_bytes,
                   head_bytes);
        }
    }
}

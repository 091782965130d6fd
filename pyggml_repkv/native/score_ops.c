#include "score_ops.h"

#include "compute.h"
#include "one_token.h"
#include "packed.h"
#include "regions.h"

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

/* How many of a panel's lanes hold tokens. */
static int lanes_of(const int32_t *regions, int64_t panel) {
    const int64_t n = regions[N_TOKENS] - panel * PANEL;
    return n < PANEL ? (int)n : PANEL;
}

/* scores[c][lane] = q . key of local row first + c, -inf where the lane comes before it. */
static void masked_scores(float *scores, float *keys, const float *q, const struct ggml_tensor *k_local, size_t head_offset,
                          int64_t first, int n_cells, int64_t row_of_lane_0, int d) {
    for (int c = 0; c < n_cells; c++) to_f32(k_local->type, row(k_local, first + c) + head_offset, keys + c * d, d);
    product(n_cells, scores, PANEL, keys, (size_t)d, 1, q, d, 0);
    for (int c = 0; c < n_cells; c++) {
        for (int64_t t = 0; t < PANEL && t < first + c - row_of_lane_0; t++) scores[c * PANEL + t] = -INFINITY;
    }
}

/* Adds to the scores of one key head what one of its query heads gives to each key of the window, panel by panel. */
static void add_probabilities(const struct repkv_op_params *p, const struct ggml_tensor *score, const struct ggml_tensor *queries,
                              const struct ggml_tensor *k_local, const int32_t *regions, int kv, int h, float *scratch) {
    const int d = p->head_dim;
    const size_t head_offset = k_local->nb[1] / (size_t)p->n_head_kv * (size_t)kv;
    const int64_t start = regions[LOCAL] - regions[LOCAL_BASE], row_0 = regions[FIRST] - regions[LOCAL_BASE];
    float *keys = scratch, *scores = keys + ATTEND_TILE * d;
    float *r = (float *)score->data + (int64_t)regions[LOCAL_BASE] * p->n_head_kv + kv;
    for (int64_t panel = 0; panel < queries->ne[2]; panel++) {
        if (repkv_abort_requested()) return;
        const float *q = (const float *)queries->data + (size_t)((panel * p->n_head + h) * d) * PANEL;
        const int n_lanes = lanes_of(regions, panel);
        const int64_t lane_0 = row_0 + panel * PANEL, end = lane_0 + n_lanes;
        f32x16 max[2] = {splat16(LEAST), splat16(LEAST)}, sum[2] = {splat16(0.0f), splat16(0.0f)};
        for (int64_t c0 = start; c0 < end; c0 += ATTEND_TILE) {
            const int n = end - c0 < ATTEND_TILE ? (int)(end - c0) : ATTEND_TILE;
            masked_scores(scores, keys, q, k_local, head_offset, c0, n, lane_0, d);
            for (int i = 0; i < 2 * n; i++) {
                const int half = i & 1;
                const f32x16 s = load16(scores + i * 16), most = max16(max[half], s);
                sum[half] = sum[half] * exp16(max[half] - most) + exp16(s - most);
                max[half] = most;
            }
        }
        for (int64_t c0 = start; c0 < end; c0 += ATTEND_TILE) {
            const int n = end - c0 < ATTEND_TILE ? (int)(end - c0) : ATTEND_TILE;
            masked_scores(scores, keys, q, k_local, head_offset, c0, n, lane_0, d);
            for (int i = 0; i < 2 * n; i++) {
                const int half = i & 1;
                const f32x16 share = exp16(load16(scores + i * 16) - max[half]) / sum[half];
                for (int t = 0; t < 16 && 16 * half + t < n_lanes; t++) r[(c0 + i / 2) * p->n_head_kv] += share[t];
            }
        }
    }
}

/* A key head belongs to one thread, so that two never add to the same score. */
void repkv_score_attention(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
    const struct repkv_op_params *p = userdata;
    const int group = p->n_head / p->n_head_kv;
    if (ith == 0) *(float *)dst->data = 0.0f;
    for (int kv = ith; kv < p->n_head_kv; kv += nth) {
        for (int h = kv * group; h < (kv + 1) * group; h++) {
            add_probabilities(p, dst->src[2], dst->src[0], dst->src[1], regions_of(dst->src[3]), kv, h,
                              (float *)repkv_thread_scratch(p, ith));
        }
    }
}

static void add_probabilities_one(const struct repkv_op_params *p, const struct ggml_tensor *score, const float *q, float own,
                                  const struct ggml_tensor *k_local, const int32_t *regions, int kv, float *key) {
    const int d = p->head_dim;
    const size_t head_offset = k_local->nb[1] / (size_t)p->n_head_kv * (size_t)kv;
    float *r = (float *)score->data + kv;
    float max = own, sum = 1.0f;
    for (int pass = 0; pass < 2; pass++) {
        for (int64_t m = regions[LOCAL]; m < regions[FIRST]; m++) {
            to_f32(k_local->type, row(k_local, m - regions[LOCAL_BASE]) + head_offset, key, d);
            const float s = dot_f32(q, key, d) * p->scale;
            if (pass == 1) {
                r[m * p->n_head_kv] += expf(s - max) / sum;
            } else if (s > max) {
                sum = sum * expf(max - s) + 1.0f;
                max = s;
            } else {
                sum += expf(s - max);
            }
        }
    }
    r[(int64_t)regions[FIRST] * p->n_head_kv] += expf(own - max) / sum;
}

void repkv_score_attention_one(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
    const struct repkv_op_params *p = userdata;
    const float *qkv = dst->src[0]->data, *cosine = dst->src[3]->data, *sine = cosine + p->rope_dim / 2;
    const int d = p->head_dim, group = p->n_head / p->n_head_kv;
    float *q = (float *)repkv_thread_scratch(p, ith), *own_key = q + d, *key = own_key + d;
    if (ith == 0) *(float *)dst->data = 0.0f;
    for (int kv = ith; kv < p->n_head_kv; kv += nth) {
        rope(own_key, qkv + (p->n_head + kv) * d, cosine, sine, p->rope_dim, d);
        for (int h = kv * group; h < (kv + 1) * group; h++) {
            rope(q, qkv + h * d, cosine, sine, p->rope_dim, d);
            const float own = dot_f32(q, own_key, d) * p->scale;
            add_probabilities_one(p, dst->src[2], q, own, dst->src[1], regions_of(dst->src[4]), kv, key);
        }
    }
}

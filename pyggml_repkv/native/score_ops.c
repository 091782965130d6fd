#include "score_ops.h"

#include "compute.h"
#include "one_token.h"
#include "packed.h"
#include "regions.h"

/* So many keys' scores are kept from the pass that finds their sum for the pass that adds them. */
enum { KEPT_SCORES = 1024 };

static size_t acc_scratch(int head_dim) {
    return 2 * repkv_piece((size_t)head_dim);
}

static size_t acc_one_scratch(int n_head_kv, int head_dim) {
    return 2 * repkv_piece((size_t)(n_head_kv * head_dim)) + repkv_piece((size_t)head_dim);
}

static size_t attention_chunk_scratch(int group, int head_dim) {
    return repkv_piece(ATTEND_TILE * (size_t)head_dim) + repkv_piece(ATTEND_TILE * PANEL) + 2 * repkv_piece((size_t)group * PANEL);
}

static size_t attention_one_scratch(int group, int head_dim) {
    const size_t d = (size_t)head_dim, n = (size_t)group;
    return repkv_piece(n * d) + repkv_piece(d) + repkv_piece(TILE * d) + repkv_piece(TILE) + 2 * repkv_piece(n) +
           repkv_piece(n * KEPT_SCORES);
}

size_t repkv_score_scratch(int group, int n_head_kv, int head_dim) {
    const size_t acc = acc_scratch(head_dim), acc_one = acc_one_scratch(n_head_kv, head_dim);
    const size_t chunk = attention_chunk_scratch(group, head_dim), one = attention_one_scratch(group, head_dim);
    const size_t most = acc > acc_one ? acc : acc_one, most_attention = chunk > one ? chunk : one;
    return most > most_attention ? most : most_attention;
}

/* sum[d] += sign * the query of token t, summed over the heads that share key head kv. */
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
    const struct repkv_score_acc_sources *src = SOURCES(dst, score_acc);
    const struct ggml_tensor *queries = src->q, *k_local = src->k_local, *score = src->score;
    const struct repkv_regions *regions = regions_of(src->regions);
    const int d = p->head_dim;
    const float unit = 1.0f / (p->scale * (float)p->n_score);
    struct repkv_scratch s = repkv_thread_scratch(p, ith, acc_scratch(d));
    float *sum = repkv_take(&s, (size_t)d), *key = repkv_take(&s, (size_t)d);
    if (ith == 0) *(float *)dst->data = 0.0f;

    const int64_t first = regions->first, n_tokens = regions->n_tokens;
    const int64_t oldest = first > p->n_score ? first - p->n_score : 0;
    const int64_t from = oldest > regions->local_base ? oldest : regions->local_base;
    int64_t begin, end;
    share(first + n_tokens - from, ith, nth, &begin, &end);
    for (int kv = 0; kv < p->n_head_kv; kv++) {
        /* The sum of the queries in (m, m + n_score] slides along with m. */
        memset(sum, 0, (size_t)d * sizeof(float));
        int64_t low = 0, high = 0; /* tokens of this step in the sum: [low, high) */
        for (int64_t m = from + begin; m < from + end; m++) {
            const int64_t want_low = m + 1 > first ? m + 1 - first : 0;
            const int64_t want_high = m + 1 + p->n_score - first < n_tokens ? m + 1 + p->n_score - first : n_tokens;
            if (m == from + begin) low = high = want_low;
            while (high < want_high) add_query(sum, queries, p, kv, high++, 1.0f);
            while (low < want_low && low < high) add_query(sum, queries, p, kv, low++, -1.0f);
            keys_f32(p, key, (size_t)d, k_local, m - regions->local_base, 1, kv, 1, regions->local_base);
            ((float *)score->data)[m * p->n_head_kv + kv] += unit * dot_f32(sum, key, d);
        }
    }
}

void repkv_score_acc_one(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
    const struct repkv_op_params *p = userdata;
    const struct repkv_score_acc_one_sources *src = SOURCES(dst, score_acc_one);
    const float *qkv = src->qkv->data, *cosine = src->rope->data, *sine = cosine + p->rope_dim / 2;
    const struct ggml_tensor *k_local = src->k_local, *score = src->score;
    const struct repkv_regions *regions = regions_of(src->regions);
    const int d = p->head_dim, group = p->n_head / p->n_head_kv, width = p->n_head_kv * d;
    struct repkv_scratch s = repkv_thread_scratch(p, ith, acc_one_scratch(p->n_head_kv, d));
    float *sum = repkv_take(&s, (size_t)width), *rotated = repkv_take(&s, (size_t)d), *keys = repkv_take(&s, (size_t)width);
    if (ith == 0) *(float *)dst->data = 0.0f;
    memset(sum, 0, (size_t)width * sizeof(float));
    for (int h = 0; h < p->n_head; h++) {
        rope(rotated, qkv + h * d, cosine, sine, p->rope_dim, d);
        axpy_f32(sum + h / group * d, rotated, 1.0f, d);
    }
    const int64_t first = regions->first, oldest = first > p->n_score ? first - p->n_score : 0;
    const int64_t from = oldest > regions->local_base ? oldest : regions->local_base;
    int64_t begin, end;
    share(first - from, ith, nth, &begin, &end);
    for (int64_t m = from + begin; m < from + end; m++) {
        keys_f32(p, keys, (size_t)width, k_local, m - regions->local_base, 1, 0, p->n_head_kv, regions->local_base);
        float *r = (float *)score->data + m * p->n_head_kv;
        for (int kv = 0; kv < p->n_head_kv; kv++) r[kv] += dot_f32(sum + kv * d, keys + kv * d, d) / (float)p->n_score;
    }
}

/* Returns the first key that a query scores: it scores the last n_score keys before it in the window, and its own. */
static int64_t first_scored(const struct repkv_op_params *p, const struct repkv_regions *regions, int64_t position) {
    const int64_t first = position - p->n_score;
    return first > regions->local ? first : regions->local;
}

/* scores[c][lane] = q . key of position first + c, -inf where the lane does not score it. */
static void masked_scores(const struct repkv_op_params *p, float *scores, const float *q, const float *keys,
                          const struct repkv_regions *regions, int64_t first, int n_cells, int64_t lane_0) {
    product(n_cells, scores, PANEL, keys, (size_t)p->head_dim, 1, q, p->head_dim, 0);
    if (first >= first_scored(p, regions, lane_0 + PANEL - 1) && first + n_cells - 1 <= lane_0) return;
    for (int t = 0; t < PANEL; t++) {
        const int64_t low = first_scored(p, regions, lane_0 + t);
        for (int c = 0; c < n_cells && first + c < low; c++) scores[c * PANEL + t] = -INFINITY;
        for (int64_t c = lane_0 + t + 1 > first ? lane_0 + t + 1 - first : 0; c < n_cells; c++) scores[c * PANEL + t] = -INFINITY;
    }
}

/* Adds the probabilities of one panel's queries to the scores of a key head, for the query heads that share it. */
static void add_probabilities(const struct repkv_op_params *p, const struct ggml_tensor *score, const struct ggml_tensor *queries,
                              const struct ggml_tensor *k_local, const struct repkv_regions *regions, int kv, int64_t panel,
                              struct repkv_scratch s) {
    const int d = p->head_dim, group = p->n_head / p->n_head_kv;
    const int64_t lane_0 = regions->first + panel * PANEL, left = regions->n_tokens - panel * PANEL;
    const int n_lanes = left < PANEL ? (int)left : PANEL;
    const int64_t begin = first_scored(p, regions, lane_0), end = lane_0 + n_lanes;
    const float *q = (const float *)queries->data + (size_t)((panel * p->n_head + kv * group) * d) * PANEL;
    float *keys = repkv_take(&s, (size_t)(ATTEND_TILE * d)), *scores = repkv_take(&s, ATTEND_TILE * PANEL);
    float *max = repkv_take(&s, (size_t)(group * PANEL)), *sum = repkv_take(&s, (size_t)(group * PANEL));
    for (int i = 0; i < group * PANEL; i++) {
        max[i] = LEAST;
        sum[i] = 0.0f;
    }
    for (int pass = 0; pass < 2; pass++) {
        for (int64_t c0 = begin; c0 < end; c0 += ATTEND_TILE) {
            const int n = end - c0 < ATTEND_TILE ? (int)(end - c0) : ATTEND_TILE;
            keys_f32(p, keys, (size_t)d, k_local, c0 - regions->local_base, n, kv, 1, regions->local_base);
            float *r = (float *)score->data + c0 * p->n_head_kv + kv;
            for (int g = 0; g < group; g++) {
                masked_scores(p, scores, q + (size_t)(g * d) * PANEL, keys, regions, c0, n, lane_0);
                for (int half = 0; half < PANEL; half += 16) {
                    f32x16 most = load16(max + g * PANEL + half), total = load16(sum + g * PANEL + half);
                    if (pass == 0) {
                        const f32x16 old = most;
                        for (int c = 0; c < n; c++) most = max16(most, load16(scores + c * PANEL + half));
                        total *= exp16(old - most);
                        for (int c = 0; c < n; c++) total += exp16(load16(scores + c * PANEL + half) - most);
                        store16(max + g * PANEL + half, most);
                        store16(sum + g * PANEL + half, total);
                        continue;
                    }
                    f32x16 scale = 1.0f / total;
                    for (int t = 0; t < 16; t++) scale[t] = half + t < n_lanes ? scale[t] : 0.0f;
                    for (int c = 0; c < n; c++) {
                        r[c * p->n_head_kv] += sum16(exp16(load16(scores + c * PANEL + half) - most) * scale);
                    }
                }
            }
        }
    }
}

/* Each key head belongs to one thread, so that two threads never add to the same score. */
void repkv_score_attention(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
    const struct repkv_op_params *p = userdata;
    const struct repkv_score_attention_sources *src = SOURCES(dst, score_attention);
    const struct repkv_scratch s = repkv_thread_scratch(p, ith, attention_chunk_scratch(p->n_head / p->n_head_kv, p->head_dim));
    if (ith == 0) *(float *)dst->data = 0.0f;
    for (int kv = ith; kv < p->n_head_kv; kv += nth) {
        for (int64_t panel = 0; panel < src->q->ne[2]; panel++) {
            if (repkv_abort_requested(p->compute)) return;
            add_probabilities(p, src->score, src->q, src->k_local, regions_of(src->regions), kv, panel, s);
        }
    }
}

/* Sets `to` [group][stride] to the scaled products of a group's queries with n keys from first_row on, and -inf beyond. */
static void tile_scores(const struct repkv_op_params *p, float *to, size_t stride, const float *q, float *keys,
                        const struct ggml_tensor *k_local, int64_t shift, int64_t first_row, int n, int kv) {
    const int d = p->head_dim, group = p->n_head / p->n_head_kv;
    keys_f32(p, keys, (size_t)d, k_local, first_row, n, kv, 1, shift);
    for (int g = 0; g < group; g++, to += stride) {
        for (int c = 0; c < TILE; c += 16) dots16_f32(to + c, q + g * d, keys + c * d, (size_t)d, d);
        for (int c = 0; c < TILE; c++) to[c] = c < n ? to[c] * p->scale : -INFINITY;
    }
}

static void add_probabilities_one(const struct repkv_op_params *p, const struct ggml_tensor *score, const float *q,
                                  const float *own_key, const struct ggml_tensor *k_local, const struct repkv_regions *regions,
                                  int kv, float *keys, struct repkv_scratch s) {
    const int d = p->head_dim, group = p->n_head / p->n_head_kv;
    const int64_t begin = first_scored(p, regions, regions->first), end = regions->first;
    float *r = (float *)score->data + kv, *weights = repkv_take(&s, TILE), *max = repkv_take(&s, (size_t)group);
    float *sum = repkv_take(&s, (size_t)group), *kept = repkv_take(&s, (size_t)group * KEPT_SCORES);
    const bool keeps = end - begin <= KEPT_SCORES - TILE;
    const size_t stride = keeps ? KEPT_SCORES : TILE;
    for (int g = 0; g < group; g++) {
        max[g] = dot_f32(q + g * d, own_key, d) * p->scale;
        sum[g] = 1.0f;
    }
    for (int pass = 0; pass < 2; pass++) {
        for (int64_t c0 = begin; c0 < end; c0 += TILE) {
            const int n = end - c0 < TILE ? (int)(end - c0) : TILE;
            float *scores = keeps ? kept + (c0 - begin) : kept;
            if (pass == 0 || !keeps) {
                tile_scores(p, scores, stride, q, keys, k_local, regions->local_base, c0 - regions->local_base, n, kv);
            }
            for (int g = 0; g < group; g++) {
                const float *x = scores + (size_t)g * stride;
                float most = max[g];
                for (int c = 0; c < n && pass == 0; c++) most = x[c] > most ? x[c] : most;
                for (int c = 0; c < TILE; c += 16) store16(weights + c, exp16(load16(x + c) - most));
                if (pass == 0) {
                    sum[g] *= expf(max[g] - most);
                    max[g] = most;
                    for (int c = 0; c < n; c++) sum[g] += weights[c];
                } else {
                    for (int c = 0; c < n; c++) r[(c0 + c) * p->n_head_kv] += weights[c] / sum[g];
                }
            }
        }
    }
    for (int g = 0; g < group; g++) {
        r[end * p->n_head_kv] += expf(dot_f32(q + g * d, own_key, d) * p->scale - max[g]) / sum[g];
    }
}

void repkv_score_attention_one(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
    const struct repkv_op_params *p = userdata;
    const struct repkv_score_attention_one_sources *src = SOURCES(dst, score_attention_one);
    const float *qkv = src->qkv->data, *cosine = src->rope->data, *sine = cosine + p->rope_dim / 2;
    const int d = p->head_dim, group = p->n_head / p->n_head_kv;
    struct repkv_scratch s = repkv_thread_scratch(p, ith, attention_one_scratch(group, d));
    float *q = repkv_take(&s, (size_t)(group * d)), *own_key = repkv_take(&s, (size_t)d);
    float *keys = repkv_take(&s, (size_t)(TILE * d));
    if (ith == 0) *(float *)dst->data = 0.0f;
    for (int kv = ith; kv < p->n_head_kv; kv += nth) {
        rope(own_key, qkv + (p->n_head + kv) * d, cosine, sine, p->rope_dim, d);
        for (int g = 0; g < group; g++) rope(q + g * d, qkv + (kv * group + g) * d, cosine, sine, p->rope_dim, d);
        /* A short tile keeps old rows at its end: they must be finite from the start. */
        memset(keys, 0, TILE * (size_t)d * sizeof(float));
        add_probabilities_one(p, src->score, q, own_key, src->k_local, regions_of(src->regions), kv, keys, s);
    }
}

#include "select_ops.h"

#include "one_token.h"
#include "packed.h"
#include "regions.h"

enum {
    MAX_HEADS_AT_ONCE = 4,
};

static size_t relevance_scratch(int n_head, int head_dim) {
    return repkv_piece((size_t)(n_head * head_dim)) + repkv_piece(2 * (size_t)n_head * LANES);
}

static size_t topk_scratch(int n_head) {
    return 2 * repkv_piece((size_t)n_head) + repkv_piece(MAX_SELECTED);
}

size_t repkv_select_scratch(int n_head, int head_dim) {
    const size_t relevance = relevance_scratch(n_head, head_dim), topk = topk_scratch(n_head);
    return relevance > topk ? relevance : topk;
}

#if defined(REPKV_HALVES)
/* Eight blocks at a time: the accumulators of sixteen would not fit into the registers. */
typedef __m256 lanes;

static inline lanes load_lanes(enum ggml_type type, const void *index, int64_t i) {
    if (type == GGML_TYPE_F16) return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)((const uint16_t *)index + i)));
    return _mm256_loadu_ps((const float *)index + i);
}
#else
typedef f32x16 lanes;

static inline lanes load_lanes(enum ggml_type type, const void *index, int64_t i) {
#if defined(__AVX512F__)
    if (type == GGML_TYPE_F16) return (f32x16)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)((const uint16_t *)index + i)));
#else
    if (type == GGML_TYPE_F16) {
        float values[LANES];
        to_f32(type, (const uint16_t *)index + i, values, LANES);
        return load16(values);
    }
#endif
    return load16((const float *)index + i);
}
#endif
enum { LANES_AT_ONCE = (int)(sizeof(lanes) / sizeof(float)) };

/* scores[h][16 blocks] = q_h . one representative of each of 16 blocks, for n_heads query heads with stride d. */
static inline __attribute__((always_inline)) void dot_lanes(const int n_heads, f32x16 *scores, const float *q, int d,
                                                            enum ggml_type type, const void *index, int64_t first) {
    for (int lane = 0; lane < LANES; lane += LANES_AT_ONCE) {
        lanes even[MAX_HEADS_AT_ONCE], odd[MAX_HEADS_AT_ONCE];
        const int64_t at = first + lane;
#pragma GCC unroll 4
        for (int h = 0; h < n_heads; h++) even[h] = odd[h] = (lanes){0};
        int i = 0;
        for (; i + 2 <= d; i += 2) {
            const lanes a = load_lanes(type, index, at + i * LANES), b = load_lanes(type, index, at + (i + 1) * LANES);
#pragma GCC unroll 4
            for (int h = 0; h < n_heads; h++) {
                even[h] += q[h * d + i] * a;
                odd[h] += q[h * d + i + 1] * b;
            }
        }
        for (; i < d; i++) {
            const lanes a = load_lanes(type, index, at + i * LANES);
#pragma GCC unroll 4
            for (int h = 0; h < n_heads; h++) even[h] += q[h * d + i] * a;
        }
#pragma GCC unroll 4
        for (int h = 0; h < n_heads; h++) {
            const lanes sum = even[h] + odd[h];
            memcpy((float *)(scores + h) + lane, &sum, sizeof sum);
        }
    }
}

/* Folds one more representative's scores into x (and for REPKV_LSE the sum of exp(score - x)). */
static inline void fold_representative(int kind, f32x16 *x, f32x16 *sum, f32x16 score, int first) {
    /* A NaN becomes LOWEST, which is finite, so that no difference is NaN. */
    score = select16(above16(score, splat16(LOWEST)), score, splat16(LOWEST));
    score = select16(above16(score, splat16(-LOWEST)), splat16(-LOWEST), score);
    if (kind == REPKV_MEAN) {
        *x = first ? score : *x + score;
        return;
    }
    const f32x16 max = first ? score : max16(*x, score);
    if (kind == REPKV_LSE) {
        *sum = first ? splat16(1.0f) : *sum * exp16(*x - max) + exp16(score - max);
    }
    *x = max;
}

/* Sets x[h][16] to the relevance of 16 blocks for the n_heads query heads that share key head kv. */
static void relevance_of_group(const struct repkv_op_params *p, f32x16 *x, const float *q, int n_heads, enum ggml_type type,
                               const void *index, int64_t first) {
    f32x16 sum[MAX_HEADS_AT_ONCE], scores[MAX_HEADS_AT_ONCE];
    const int d = p->head_dim;
    for (int r = 0; r < p->n_repr; r++, first += d * LANES) {
        switch (n_heads) {
        case 1: dot_lanes(1, scores, q, d, type, index, first); break;
        case 2: dot_lanes(2, scores, q, d, type, index, first); break;
        case 3: dot_lanes(3, scores, q, d, type, index, first); break;
        default: dot_lanes(4, scores, q, d, type, index, first); break;
        }
        for (int h = 0; h < n_heads; h++) fold_representative(p->relevance, x + h, sum + h, scores[h], r == 0);
    }
    for (int h = 0; h < n_heads; h++) {
        if (p->relevance == REPKV_MEAN) x[h] /= (float)p->n_repr;
        if (p->relevance == REPKV_LSE) x[h] += log16(sum[h]);
    }
}

/* q [n_head, d] is scaled, scratch [n_head][2][16]. Each thread reads its share of the groups of 16 blocks in order, because
 * reading the index takes most of the time. */
static void relevance(struct ggml_tensor *dst, const struct repkv_op_params *p, const struct ggml_tensor *index,
                      const float *q, float *scratch, int n_blocks, int ith, int nth) {
    const int d = p->head_dim, group = p->n_head / p->n_head_kv;
    const int64_t n_padded = index->ne[1] * LANES;
    float *x = dst->data, *seen = x + p->n_head * n_padded + ith * p->n_head * 2;
    for (int h = 0; h < p->n_head; h++) {
        store16(scratch + 2 * h * LANES, splat16(LOWEST));
        store16(scratch + (2 * h + 1) * LANES, splat16(0.0f));
    }
    int64_t begin, end;
    share((n_blocks + LANES - 1) / LANES, ith, nth, &begin, &end);
    for (int64_t g = begin; g < end; g++) {
        for (int head = 0; head < p->n_head;) {
            const int kv = head / group, left = (kv + 1) * group - head;
            const int n = left < MAX_HEADS_AT_ONCE ? left : MAX_HEADS_AT_ONCE;
            f32x16 v[MAX_HEADS_AT_ONCE];
            relevance_of_group(p, v, q + head * d, n, index->type, row(index, g), (int64_t)kv * p->n_repr * d * LANES);
            for (int h = 0; h < n; h++, head++) {
                f32x16 y = select16(above16(v[h], splat16(LOWEST)), v[h], splat16(LOWEST));
                y = select16(above16(y, splat16(-LOWEST)), splat16(-LOWEST), y); /* a mean may overflow */
                for (int64_t b = n_blocks - g * LANES; b < LANES; b++) y[b] = LOWEST;
                store16(x + head * n_padded + g * LANES, y);
                if (p->relevance != REPKV_LSE) continue;
                float *max = scratch + 2 * head * LANES, *sum = max + LANES;
                const f32x16 old = load16(max), most = max16(old, y);
                /* LOWEST has weight 0, also while it is the maximum. */
                const f32x16 weight = select16(above16(y, splat16(LOWEST)), exp16(y - most), splat16(0.0f));
                store16(sum, load16(sum) * exp16(old - most) + weight);
                store16(max, most);
            }
        }
    }
    for (int h = 0; h < p->n_head; h++) {
        const f32x16 max = load16(scratch + 2 * h * LANES), sum = load16(scratch + (2 * h + 1) * LANES);
        float most = LOWEST;
        for (int b = 0; b < LANES; b++) most = max[b] > most ? max[b] : most;
        seen[2 * h] = most;
        seen[2 * h + 1] = sum16(sum * exp16(max - most));
    }
}

void repkv_relevance(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
    const struct repkv_op_params *p = userdata;
    const struct repkv_relevance_sources *src = SOURCES(dst, relevance);
    const struct repkv_regions *regions = regions_of(src->regions);
    const int width = p->n_head * p->head_dim, n_tokens = regions->n_tokens;
    /* The mean query of the chunk, without padded lanes. */
    struct repkv_scratch s = repkv_thread_scratch(p, ith, relevance_scratch(p->n_head, p->head_dim));
    float *mean = repkv_take(&s, (size_t)width);
    memset(mean, 0, (size_t)width * sizeof(float));
    for (int panel = 0; panel * PANEL < n_tokens && regions->n_units > 0; panel++) {
        const int lanes = n_tokens - panel * PANEL < PANEL ? n_tokens - panel * PANEL : PANEL;
        const float *q = (const float *)src->q_far->data + (size_t)panel * (size_t)width * PANEL;
        for (int i = 0; i < width; i++) {
            if (lanes == PANEL) {
                mean[i] += sum16(load16(q + i * PANEL) + load16(q + i * PANEL + 16));
            } else {
                for (int t = 0; t < lanes; t++) mean[i] += q[i * PANEL + t];
            }
        }
    }
    scale_f32(mean, 1.0f / (float)n_tokens, width);
    relevance(dst, p, src->index, mean, repkv_take(&s, 2 * (size_t)p->n_head * LANES), regions->n_units, ith, nth);
}

void repkv_relevance_one(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
    const struct repkv_op_params *p = userdata;
    const struct repkv_relevance_one_sources *src = SOURCES(dst, relevance_one);
    const int d = p->head_dim;
    const float *qkv = src->qkv->data, *cosine = (const float *)src->rope->data + p->rope_dim;
    const struct repkv_regions *regions = regions_of(src->regions);
    struct repkv_scratch s = repkv_thread_scratch(p, ith, relevance_scratch(p->n_head, d));
    float *q = repkv_take(&s, (size_t)(p->n_head * d));
    for (int h = 0; h < p->n_head; h++) rope(q + h * d, qkv + h * d, cosine, cosine + p->rope_dim / 2, p->rope_dim, d);
    scale_f32(q, p->scale, p->n_head * d);
    relevance(dst, p, src->index, q, repkv_take(&s, 2 * (size_t)p->n_head * LANES), regions->n_units, ith, nth);
}

/* Sets max and scale of each head, which REPKV_LSE needs: the maximum of x, and 1 / sum of exp(x - maximum) over all blocks. */
static void head_totals(const struct repkv_op_params *p, float *max, float *scale, const float *seen, int nth) {
    for (int h = 0; h < p->n_head; h++) {
        float sum = 0.0f;
        max[h] = LOWEST;
        for (int t = 0; t < nth; t++) {
            if (seen[(t * p->n_head + h) * 2] > max[h]) max[h] = seen[(t * p->n_head + h) * 2];
        }
        for (int t = 0; t < nth; t++) {
            const float *s = seen + (t * p->n_head + h) * 2;
            if (s[1] > 0.0f) sum += s[1] * expf(s[0] - max[h]);
        }
        scale[h] = sum > 0.0f ? 1.0f / sum : 0.0f;
    }
}

/* One row of a selection: its lines [l0, l1) of x, their totals for REPKV_LSE, and its place. */
struct row_of_units {
    const float *x, *max, *scale;
    const int32_t *bounds;
    int64_t n_padded;
    int n_units, l0, l1;
    int32_t *selected;
    int n_top;
    int64_t budget;
    const int32_t *kept; /* the last token's selection, ascending; NULL: none */
};

static inline f32x16 weights_of(const struct repkv_op_params *p, const struct row_of_units *r, int first) {
    f32x16 weight = splat16(0.0f);
    for (int l = r->l0; l < r->l1; l++) {
        const f32x16 v = load16(r->x + l * r->n_padded + first);
        weight += p->relevance == REPKV_LSE ? select16(above16(v, splat16(LOWEST)), exp16(v - r->max[l]), splat16(0.0f)) * r->scale[l] : v;
    }
    return weight;
}

/* The best units so far, as a heap with the worst at its root. */
struct heap {
    float *weight;
    int32_t *unit;
    int n;
};

static inline bool worse(const struct heap *h, int a, int b) {
    return h->weight[a] < h->weight[b] || (h->weight[a] == h->weight[b] && h->unit[a] > h->unit[b]);
}

static inline void swap(struct heap *h, int a, int b) {
    const float weight = h->weight[a];
    const int32_t unit = h->unit[a];
    h->weight[a] = h->weight[b];
    h->unit[a] = h->unit[b];
    h->weight[b] = weight;
    h->unit[b] = unit;
}

static void sift_down(struct heap *h, int at, int n) {
    for (int child; (child = 2 * at + 1) < n; at = child) {
        if (child + 1 < n && worse(h, child + 1, child)) child++;
        if (!worse(h, child, at)) return;
        swap(h, child, at);
    }
}

/* Keeps a unit with a higher number than all before it, if it is among the n_top best; of equals the first stay. */
static void offer(struct heap *h, int n_top, float weight, int32_t unit) {
    if (h->n == n_top) {
        if (!(weight > h->weight[0])) return;
        h->weight[0] = weight;
        h->unit[0] = unit;
        sift_down(h, 0, h->n);
        return;
    }
    int at = h->n++;
    h->weight[at] = weight;
    h->unit[at] = unit;
    for (; at > 0 && worse(h, at, (at - 1) / 2); at = (at - 1) / 2) swap(h, at, (at - 1) / 2);
}

static void sort_ascending(int32_t *x, int n) {
    for (int gap = n / 2; gap > 0; gap /= 2) {
        for (int i = gap; i < n; i++) {
            const int32_t v = x[i];
            int j = i;
            for (; j >= gap && x[j - gap] > v; j -= gap) x[j] = x[j - gap];
            x[j] = v;
        }
    }
}

/* Sets selected[0] to the number of units, then the best ones that fit the budget, ascending. */
static void select_units(const struct repkv_op_params *p, const struct row_of_units *r, float *best) {
    const float factor = p->relevance == REPKV_LSE ? expf(p->sticky) : 1.0f;
    const float bonus = p->relevance == REPKV_LSE ? 0.0f : p->sticky * (float)(r->l1 - r->l0);
    struct heap heap = {best, r->selected + 1, 0};
    int at_kept = 1;
    for (int first = 0; first < r->n_units; first += LANES) {
        float weight[LANES], size[LANES];
        store16(weight, weights_of(p, r, first));
        const int n_lanes = r->n_units - first < LANES ? r->n_units - first : LANES;
        for (; r->kept != NULL && at_kept <= r->kept[0] && r->kept[at_kept] < first + n_lanes; at_kept++) {
            const int u = r->kept[at_kept] - first;
            weight[u] = weight[u] * factor + bonus;
        }
        store16(size, splat16(1.0f));
        for (int u = 0; p->by_size && u < n_lanes; u++) size[u] = (float)(r->bounds[first + u + 1] - r->bounds[first + u]);
        const f32x16 worth = load16(weight) / load16(size);
        /* Most units are worth less than the worst one so far. */
        if (heap.n == r->n_top && !any_above16(worth, splat16(best[0]))) continue;
        store16(weight, worth);
        for (int u = 0; u < n_lanes; u++) offer(&heap, r->n_top, weight[u], first + u);
    }
    for (int n = heap.n - 1; n > 0; n--) {
        swap(&heap, 0, n);
        sift_down(&heap, 0, n);
    }
    int n = 0;
    int64_t left = r->budget;
    for (int i = 0; i < heap.n; i++) {
        const int32_t unit = heap.unit[i], size = r->bounds[unit + 1] - r->bounds[unit];
        if (size > left) continue;
        left -= size;
        heap.unit[n++] = unit;
    }
    r->selected[0] = n;
    /* So that memory is read in order and sums do not depend on the ranking. */
    sort_ascending(heap.unit, n);
}

void repkv_block_topk(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
    const struct repkv_op_params *p = userdata;
    const struct repkv_block_topk_sources *src = SOURCES(dst, block_topk);
    const struct repkv_regions *regions = regions_of(src->regions);
    const struct ggml_tensor *kept = src->kept;
    const float *x = src->relevance->data;
    const int32_t *bounds = src->units->data;
    const int n_units = regions->n_units, last = kept ? regions->kept : -1, n_lines = p->n_lines;
    struct repkv_scratch s = repkv_thread_scratch(p, ith, topk_scratch(p->n_head));
    float *max = repkv_take(&s, (size_t)p->n_head), *scale = repkv_take(&s, (size_t)p->n_head);
    float *best = repkv_take(&s, MAX_SELECTED);
    if (ith >= p->n_rows) return;
    const bool all = n_units <= p->n_top && bounds[n_units] - bounds[0] <= regions->budget;
    const int n_top = p->n_top < MAX_SELECTED ? p->n_top : MAX_SELECTED;
    const bool chooses = !all && n_top > 0 && regions->budget > 0;
    if (chooses && p->relevance == REPKV_LSE) head_totals(p, max, scale, x + (int64_t)p->n_head * p->n_padded, nth);
    for (int r = ith; r < p->n_rows; r += nth) {
        int32_t *selected = (int32_t *)dst->data + r * dst->ne[0];
        if (chooses) {
            const struct row_of_units row = {x, max, scale, bounds, p->n_padded, n_units, r * n_lines, (r + 1) * n_lines, selected,
                                             n_top, regions->budget, last >= 0 ? kept_row(kept, last, r) : NULL};
            select_units(p, &row, best);
        } else {
            selected[0] = all ? n_units : 0;
            for (int u = 0; u < selected[0]; u++) selected[1 + u] = u;
        }
        if (kept == NULL) continue;
        int32_t *now = kept_row(kept, kept_half(last), r);
        const int32_t *before = last >= 0 ? kept_row(kept, last, r) : NULL;
        now[0] = 0;
        if (!chooses) continue;
        memcpy(now, selected, (size_t)(1 + selected[0]) * sizeof *now);
        if (p->late && before != NULL && before[0] > 0) memcpy(selected, before, (size_t)(1 + before[0]) * sizeof *now);
    }
}

void repkv_locate(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
    (void)userdata;
    const struct repkv_locate_sources *src = SOURCES(dst, locate);
    const int64_t n_planes = src->places->ne[2];
    for (int64_t r = ith; r < dst->ne[1]; r += nth) {
        const struct place *places = (const struct place *)src->places->data + r % n_planes * src->places->ne[1];
        const int32_t *blocks = (const int32_t *)src->blocks->data + r * src->blocks->ne[0];
        int32_t *runs = (int32_t *)dst->data + r * dst->ne[0];
        struct place *run = (struct place *)(runs + 1);
        runs[0] = blocks[0];
        for (int32_t i = 0; i < blocks[0]; i++) run[i] = places[blocks[1 + i]];
    }
}

void repkv_repr_topk(int32_t *out, const float *score, int64_t begin, int64_t end, int n_head_kv, int n_repr) {
    for (int kv = 0; kv < n_head_kv; kv++, out += n_repr) {
        int n = 0;
        for (int64_t m = begin; m < end; m++) {
            const float s = score[m * n_head_kv + kv];
            int at = n;
            /* Only a greater score, or a number over NaN, moves ahead: of equals the earlier token stays first. */
            while (at > 0) {
                const float other = score[out[at - 1] * n_head_kv + kv];
                if (!(s > other || (other != other && s == s))) break;
                at--;
            }
            if (at >= n_repr) continue;
            if (n < n_repr) n++;
            for (int i = n - 1; i > at; i--) out[i] = out[i - 1];
            out[at] = (int32_t)m;
        }
        for (int i = 1; i < n; i++) {
            const int32_t m = out[i];
            int j = i;
            for (; j > 0 && out[j - 1] > m; j--) out[j] = out[j - 1];
            out[j] = m;
        }
        for (int i = n; i < n_repr; i++) out[i] = out[n - 1];
    }
}

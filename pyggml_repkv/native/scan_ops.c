#include "scan_ops.h"

#include "codes.h"
#include "compute.h"
#include "one_token.h"
#include "packed.h"
#include "regions.h"
#include "select_ops.h"

enum {
    STRIP = 2 * MAX_UNIT,                            /* tokens whose scores are made before their units are weighed */
    STRIP_ROOM = STRIP + MAX_UNIT + 2 * CODE_LANES, /* with what tiles have beside them */
};

/* Query rows of one key head: [n][dim] in 8 bits, what turns sums of products into scores, and that sum for the middle level. */
struct rows {
    int n;
    int8_t *q;
    float scale[SCAN_ROWS], middle[SCAN_ROWS];
};

/* Where the codes of one key head lie, and how. */
struct coded {
    const char *codes; /* of the key head in the first tile */
    size_t row_bytes;
    int dim, bits;
};

static size_t rows_scratch(int head_dim) {
    return repkv_piece((size_t)head_dim) + repkv_piece(SCAN_ROWS * MAX_CODE_DIM / sizeof(float));
}

size_t repkv_scan_scratch(int group, int head_dim) {
    (void)group;
    return repkv_piece((size_t)head_dim) + rows_scratch(head_dim) + repkv_piece(SCAN_ROWS * STRIP_ROOM);
}

/* Adds a scaled query [head_dim], strided, to the rows: multiplied by `turn` and in 8 bits. */
static void add_row(struct rows *r, const float *q, int stride, float scale, const float *turn, float *buffer, int head_dim,
                    int dim, int bits) {
    memset(buffer, 0, (size_t)head_dim * sizeof(float));
    for (int i = 0; i < head_dim; i++) axpy_f32(buffer, turn + (size_t)i * (size_t)head_dim, q[i * stride] * scale, head_dim);
    float most = 0.0f;
    for (int i = 0; i < head_dim; i++) most = fabsf(buffer[i]) > most ? fabsf(buffer[i]) : most;
    int8_t *to = r->q + r->n * dim;
    int sum = 0;
    memset(to, 0, (size_t)dim);
    if (most > 0.0f && most < INFINITY) {
        for (int i = 0; i < head_dim; i++) {
            to[i] = (int8_t)lrintf(buffer[i] * (127.0f / most));
            sum += to[i];
        }
    } else {
        most = 0.0f;
    }
    r->scale[r->n] = most / 127.0f;
    r->middle[r->n] = 0.5f * (float)((1 << bits) - 1) * (float)sum;
    r->n++;
}

/* scores[r * stride + lane] of a tile for all rows. */
static void score_tile(const struct rows *r, float *scores, size_t stride, const char *tile, int dim, int bits) {
    const int mask = (1 << bits) - 1, per_word = 32 / bits;
    float step[CODE_LANES];
    to_f32(GGML_TYPE_F16, tile + (size_t)dim * (size_t)bits / 8 * CODE_LANES, step, CODE_LANES);
    for (int row = 0; row < r->n; row++) {
        int32_t sums[CODE_LANES] = {0};
        const int8_t *q = r->q + row * dim;
        for (int i = 0; i < dim; i++) {
            const int in_word = i % per_word, shift = in_word / 4 * bits;
            const unsigned char *byte = (const unsigned char *)tile + (size_t)(i / per_word) * CODE_LANES * 4 + in_word % 4;
            for (int lane = 0; lane < CODE_LANES; lane++) sums[lane] += q[i] * (byte[4 * lane] >> shift & mask);
        }
        for (int lane = 0; lane < CODE_LANES; lane++) {
            const float s = step[lane] * r->scale[row] * ((float)sums[lane] - r->middle[row]);
            scores[(size_t)row * stride + (size_t)lane] = s > LOWEST ? (s < -LOWEST ? s : -LOWEST) : LOWEST;
        }
    }
}

/* Sets x[row * x_stride + u] to the logarithm of the sum of exp(score) over the tokens of units [begin, end); bounds: of
 * positions, from `first` on. buffer [SCAN_ROWS][STRIP_ROOM]. */
static void weigh_units(const struct rows *r, float *x, size_t x_stride, const struct coded *c, const int32_t *bounds,
                        int32_t begin, int32_t end, float *buffer) {
    const int32_t first = bounds[0];
    for (int32_t u0 = begin, u1; u0 < end; u0 = u1) {
        for (u1 = u0 + 1; u1 < end && bounds[u1 + 1] - bounds[u0] <= STRIP;) u1++;
        const int32_t tile0 = (bounds[u0] - first) / CODE_LANES, tile1 = (bounds[u1] - first + CODE_LANES - 1) / CODE_LANES;
        for (int32_t tile = tile0; tile < tile1; tile++) {
            score_tile(r, buffer + (tile - tile0) * CODE_LANES, STRIP_ROOM, c->codes + (size_t)tile * c->row_bytes, c->dim, c->bits);
        }
        for (int row = 0; row < r->n; row++) {
            const float *scores = buffer + (size_t)row * STRIP_ROOM - (first + tile0 * CODE_LANES);
            for (int32_t u = u0; u < u1; u++) {
                float most = LOWEST, sum = 0.0f;
                for (int32_t t = bounds[u]; t < bounds[u + 1]; t++) most = scores[t] > most ? scores[t] : most;
                for (int32_t t = bounds[u]; t < bounds[u + 1]; t++) sum += expf(scores[t] - most);
                x[(size_t)row * x_stride + (size_t)u] = most > LOWEST ? most + logf(sum) : LOWEST;
            }
        }
    }
}

static struct coded codes_of(const struct repkv_op_params *p, const struct ggml_tensor *codes, int kv) {
    return (struct coded){(const char *)codes->data + (size_t)kv * code_head_bytes(p->head_dim, p->bits), codes->nb[1],
                          code_dim(p->head_dim, p->bits), p->bits};
}

/* Sets max and sum to the largest of x [n] and the sum of exp(x - max), without those that are LOWEST. */
static void total(const float *x, int32_t begin, int32_t end, float *max, float *sum) {
    *max = LOWEST;
    *sum = 0.0f;
    for (int32_t u = begin; u < end; u++) *max = x[u] > *max ? x[u] : *max;
    for (int32_t u = begin; u < end; u++) *sum += x[u] > LOWEST ? expf(x[u] - *max) : 0.0f;
}

void repkv_scan_tokens_one(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
    const struct repkv_op_params *p = userdata;
    const struct repkv_scan_tokens_one_sources *src = SOURCES(dst, scan_tokens_one);
    const int d = p->head_dim, dim = code_dim(d, p->bits), group = p->n_head / p->n_head_kv, half = p->rope_dim / 2;
    const float *qkv = src->qkv->data, *far = (const float *)src->rope->data + p->rope_dim, *turn = src->turn->data;
    const int32_t *bounds = src->units->data, n_units = regions_of(src->regions)->n_blocks;
    float *x = dst->data, *seen = x + (int64_t)p->n_head * p->n_padded + (int64_t)ith * p->n_head * 2;
    struct repkv_scratch s = repkv_thread_scratch(p, ith, repkv_scan_scratch(group, d));
    float *q = repkv_take(&s, (size_t)d), *buffer = repkv_take(&s, (size_t)d);
    struct rows rows = {.q = (int8_t *)repkv_take(&s, SCAN_ROWS * MAX_CODE_DIM / sizeof(float))};
    float *scores = repkv_take(&s, SCAN_ROWS * STRIP_ROOM);
    int64_t begin, end;
    share(n_units, ith, nth, &begin, &end);
    for (int head = 0; head < p->n_head; head += rows.n) {
        const int kv = head / group, left = (kv + 1) * group - head;
        for (rows.n = 0; rows.n < SCAN_ROWS && rows.n < left;) {
            rope(q, qkv + (head + rows.n) * d, far, far + half, p->rope_dim, d);
            add_row(&rows, q, 1, p->scale, turn, buffer, d, dim, p->bits);
        }
        const struct coded coded = codes_of(p, src->codes, kv);
        float *to = x + (int64_t)head * p->n_padded;
        weigh_units(&rows, to, (size_t)p->n_padded, &coded, bounds, (int32_t)begin, (int32_t)end, scores);
        for (int r = 0; r < rows.n; r++) {
            total(to + (int64_t)r * p->n_padded, (int32_t)begin, (int32_t)end, seen + 2 * (head + r), seen + 2 * (head + r) + 1);
        }
    }
}

void repkv_scan_tokens(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
    const struct repkv_op_params *p = userdata;
    const struct repkv_scan_tokens_sources *src = SOURCES(dst, scan_tokens);
    const struct repkv_regions *regions = regions_of(src->regions);
    const int d = p->head_dim, dim = code_dim(d, p->bits), group = p->n_head / p->n_head_kv;
    const int32_t *bounds = src->units->data, n_units = regions->n_blocks, n_tokens = regions->n_tokens;
    const int n_groups = p->n_rows / p->n_head_kv, n_queries = p->group ? p->group : n_tokens;
    const int64_t n_padded = p->n_padded;
    float *lines = dst->data, *x = lines + ((int64_t)p->n_rows * p->n_threads + (int64_t)ith * SCAN_ROWS) * n_padded;
    struct repkv_scratch s = repkv_thread_scratch(p, ith, repkv_scan_scratch(group, d));
    repkv_take(&s, (size_t)d);
    float *buffer = repkv_take(&s, (size_t)d);
    struct rows rows = {.q = (int8_t *)repkv_take(&s, SCAN_ROWS * MAX_CODE_DIM / sizeof(float))};
    float *scores = repkv_take(&s, SCAN_ROWS * STRIP_ROOM);
    /* Rows of one key head and group are heads of its queries, one query after another; every nth SCAN_ROWS of them are a
     * thread's, and go to its line of the group's row. */
    int item = 0;
    for (int r = 0; r < p->n_rows; r++) {
        const int g = r / p->n_head_kv, kv = r % p->n_head_kv;
        float *line = lines + ((int64_t)r * p->n_threads + ith) * n_padded;
        memset(line, 0, (size_t)n_units * sizeof(float));
        if (n_groups == 0 || n_units == 0) continue;
        const int first = g * n_queries, last = first + n_queries < n_tokens ? first + n_queries : n_tokens;
        const int n_asked = (last - first + p->stride - 1) / p->stride, n_heads = n_asked * group;
        const struct coded coded = codes_of(p, src->codes, kv);
        for (int at = 0; at < n_heads; at += SCAN_ROWS, item++) {
            if (item % nth != ith) continue;
            if (repkv_abort_requested(p->compute)) return;
            rows.n = 0;
            for (int i = at; i < n_heads && i < at + SCAN_ROWS; i++) {
                /* The last query is always asked. */
                const int t = last - 1 - i / group * p->stride, h = kv * group + i % group;
                const float *q = (const float *)src->q->data + ((int64_t)(t / PANEL) * p->n_head + h) * d * PANEL + t % PANEL;
                add_row(&rows, q, PANEL, 1.0f, src->turn->data, buffer, d, dim, p->bits);
            }
            weigh_units(&rows, x, (size_t)n_padded, &coded, bounds, 0, n_units, scores);
            for (int i = 0; i < rows.n; i++) {
                const float *from = x + (int64_t)i * n_padded;
                float max, sum;
                total(from, 0, n_units, &max, &sum);
                if (!(sum > 0.0f)) continue;
                for (int32_t u = 0; u < n_units; u++) {
                    if (from[u] > LOWEST) line[u] += expf(from[u] - max) / sum;
                }
            }
        }
    }
}

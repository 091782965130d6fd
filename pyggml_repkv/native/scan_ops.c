#include "scan_tile.h"

#include <float.h>

#include "compute.h"
#include "one_token.h"
#include "packed.h"
#include "regions.h"
#include "select_ops.h"

_Static_assert(STRIP >= MAX_UNIT + CODE_LANES, "a unit may begin in the middle of a tile");

/* By how many powers of two a score may be above the reference. What is more than 126 below it has no weight. */
static const float RISE = 40.0f;

static int code_rows(int n_head, int n_head_kv) {
    return n_head_kv * ((n_head / n_head_kv + SCAN_ROWS - 1) / SCAN_ROWS);
}

static size_t numbers_of_rows(int n) {
    return ((size_t)n * sizeof(struct rows) + sizeof(float) - 1) / sizeof(float);
}

size_t repkv_scan_scratch(int n_head, int n_head_kv, int head_dim) {
    const int n = code_rows(n_head, n_head_kv), d = (head_dim + CODE_LANES - 1) / CODE_LANES * CODE_LANES;
    return repkv_piece((size_t)head_dim) + repkv_piece((size_t)d) + repkv_piece(numbers_of_rows(n)) +
           repkv_piece((size_t)n * SCAN_ROWS * (size_t)code_dim(head_dim, 1) / sizeof(float)) + repkv_piece(SCAN_ROWS * STRIP);
}

/* What a thread works with. */
struct scan {
    const struct repkv_op_params *p;
    const float *turn;
    float *q, *turned, *scores; /* q: a query [head_dim]; turned: with zeros after it; scores [SCAN_ROWS][STRIP] */
    struct rows *rows;          /* one for each key head, or more for one with over SCAN_ROWS queries */
    int dim;
};

static struct scan scan_begin(const struct repkv_op_params *p, int ith, const struct ggml_tensor *turn) {
    const int n = code_rows(p->n_head, p->n_head_kv), d = (p->head_dim + CODE_LANES - 1) / CODE_LANES * CODE_LANES;
    struct repkv_scratch s = repkv_thread_scratch(p, ith, repkv_scan_scratch(p->n_head, p->n_head_kv, p->head_dim));
    struct scan scan = {.p = p, .turn = turn->data, .dim = code_dim(p->head_dim, p->bits)};
    scan.q = repkv_take(&s, (size_t)p->head_dim);
    scan.turned = repkv_take(&s, (size_t)d);
    scan.rows = (struct rows *)repkv_take(&s, numbers_of_rows(n));
    int8_t *q = (int8_t *)repkv_take(&s, (size_t)n * SCAN_ROWS * (size_t)code_dim(p->head_dim, 1) / sizeof(float));
    for (int i = 0; i < n; i++) scan.rows[i].q = q + i * SCAN_ROWS * scan.dim;
    scan.scores = repkv_take(&s, SCAN_ROWS * STRIP);
    memset(scan.turned, 0, (size_t)d * sizeof(float));
    return scan;
}

static void clear_rows(const struct scan *scan, struct rows *r) {
    r->n = 0;
    memset(r->q, 0, SCAN_ROWS * (size_t)scan->dim);
    memset(r->sum, 0, sizeof r->sum);
    for (int row = 0; row < SCAN_ROWS; row++) {
        r->reference[row] = r->limit[row] = LOWEST;
        r->scale[row] = r->middle[row] = 0.0f;
    }
}

/* Adds the scaled query scan->q, times `turn` and in 8 bits. One with a NaN or an infinity finds all keys alike. */
static void add_row(const struct scan *scan, struct rows *r) {
    typedef int8_t i8x16 __attribute__((vector_size(16)));
    const int d = scan->p->head_dim, row = r->n++;
    memset(scan->turned, 0, (size_t)d * sizeof(float));
    weighted_rows_f32(scan->turned, scan->q, scan->turn, d, (size_t)d, d);
    f32x16 largest = splat16(0.0f), sum = splat16(0.0f);
    for (int i = 0; i < d; i += 16) {
        const f32x16 v = load16(scan->turned + i);
        largest = max16(v, max16(-v, largest));
    }
    const float most = largest16(largest);
    if (!(most > 1e-30f && most < INFINITY)) return;
    const f32x16 magic = splat16(12582912.0f); /* 1.5 * 2^23: adding it rounds to the nearest integer */
    for (int i = 0; i < d; i += 16) {
        const f32x16 v = max16(load16(scan->turned + i), splat16(-most)) * (127.0f / most); /* without NaN */
        const f32x16 whole = (v + magic) - magic;
        const i8x16 bytes = __builtin_convertvector(__builtin_convertvector(whole, i32x16), i8x16);
        for (int four = i; four < i + 16 && four < scan->dim; four += 4) {
            memcpy(r->q + four * SCAN_ROWS + 4 * row, (const char *)&bytes + four - i, 4);
        }
        sum += whole;
    }
    /* So that every score is finite. */
    r->scale[row] = (most < 1e27f ? most : 1e27f) * (1.44269504f / 127.0f);
    r->middle[row] = 0.5f * (float)((1 << scan->p->bits) - 1) * sum16(sum);
}

/* 2^x to 3e-6; 0 far below zero and for NaN. x is at most RISE, but for rounding of huge scores. */
static inline f32x16 power16(f32x16 x) {
    x = min16(max16(x, splat16(-200.0f)), splat16(RISE + 1.0f));
#if defined(__AVX512DQ__)
    const f32x16 f = (f32x16)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); /* x - floor(x) */
    f32x16 p = splat16(0.0135341678f);
    p = p * f + 0.0520114601f;
    p = p * f + 0.241442755f;
    p = p * f + 0.693003833f;
    p = p * f + 1.00000262f;
    return (f32x16)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
    return exp16(x * 0.69314718f);
#endif
}

/* Where the codes of one key head lie, and how. */
struct coded {
    const char *codes; /* of the key head in the first tile */
    size_t tile_bytes;
    const int32_t *bounds; /* of units */
};

static struct coded coded_of(const struct repkv_op_params *p, const struct ggml_tensor *codes, const struct ggml_tensor *units,
                             int kv) {
    const char *of_head = (const char *)codes->data + (size_t)kv * code_head_bytes(p->head_dim, p->bits);
    return (struct coded){of_head, codes->nb[1], units->data};
}

/* Units [unit, end) whose tokens lie in STRIP / CODE_LANES tiles, from `tile` on; `whole`: they begin and end with tiles. */
struct strip {
    int32_t unit, end, tile, n_tiles;
    bool whole;
};

static struct strip strip_at(const int32_t *bounds, int32_t unit, int32_t last) {
    const int32_t tile = (bounds[unit] - bounds[0]) / CODE_LANES, first = bounds[0] + tile * CODE_LANES;
    struct strip s = {unit, unit, tile, 0, bounds[unit] == first};
    for (; s.end < last && bounds[s.end + 1] - first <= STRIP; s.end++) {
        s.whole &= (bounds[s.end + 1] - first) % CODE_LANES == 0;
    }
    s.n_tiles = (bounds[s.end] - first + CODE_LANES - 1) / CODE_LANES;
    return s;
}

/* Sets mass[u] of the units of a strip to the sum of 2^(scale * (score - reference)) over their tokens. scores [STRIP] are
 * lost. */
static inline void weigh(float *mass, float *scores, float scale, float reference, const struct strip *s, const int32_t *bounds) {
    const f32x16 from = splat16(reference);
    if (s->whole) {
        f32x16 tiles[STRIP / CODE_LANES];
#pragma GCC unroll 16
        for (int i = 0; i < STRIP / CODE_LANES; i++) tiles[i] = power16((load16(scores + i * CODE_LANES) - from) * scale);
        const f32x16 sums = sums16(tiles);
        if (s->end - s->unit == STRIP / CODE_LANES) {
            store16(mass + s->unit, sums);
            return;
        }
        for (int32_t u = s->unit, i = 0; u < s->end; u++) {
            const int32_t n = (bounds[u + 1] - bounds[u]) / CODE_LANES;
            float sum = 0.0f;
            for (int32_t j = 0; j < n; j++) sum += sums[i + j];
            mass[u] = sum;
            i += n;
        }
        return;
    }
    for (int i = 0; i < s->n_tiles * CODE_LANES; i += CODE_LANES) {
        store16(scores + i, power16((load16(scores + i) - from) * scale));
    }
    const int32_t first = bounds[0] + s->tile * CODE_LANES;
    for (int32_t u = s->unit; u < s->end; u++) {
        float sum = 0.0f;
        for (int32_t t = bounds[u]; t < bounds[u + 1]; t++) sum += scores[t - first];
        mass[u] = sum;
    }
}

static inline f32x16 log_mass16(f32x16 mass, float reference) {
    return select16(above16(mass, splat16(FLT_MIN)), reference * 0.69314718f + log16(mass), splat16(LOWEST));
}

/* Adds the units of a strip, of which x[row * stride + u] gets the mass, or the logarithm of the mass. If the reference of a row
 * rises, its masses from unit 0 on shrink; logarithms need not. */
static void scan_strip(const struct scan *scan, struct rows *r, float *x, size_t stride, const struct coded *c,
                       const struct strip *s, const bool logs) {
    const int32_t *bounds = c->bounds, first = bounds[0] + s->tile * CODE_LANES;
    const int begin = bounds[s->unit] - first, end = bounds[s->end] - first;
    const char *tiles = c->codes + (size_t)s->tile * c->tile_bytes;
    score_tiles(scan->p->bits, r, scan->scores, tiles, c->tile_bytes, s->n_tiles, scan->dim);
    for (int row = 0; row < r->n; row++) {
        float *scores = scan->scores + row * STRIP, *to = x + (size_t)row * stride;
        /* What is no token of the units has no weight. */
        for (int i = 0; i < begin; i++) scores[i] = -INFINITY;
        for (int i = end; i < STRIP; i++) scores[i] = -INFINITY;
        f32x16 largest = splat16(LOWEST), sum = load16(r->sum[row]);
#pragma GCC unroll 16
        for (int i = 0; i < STRIP; i += 16) largest = max16(load16(scores + i), largest);
        if (any_above16(largest, splat16(r->limit[row]))) {
            const float most = largest16(largest), shrink = exp2f((r->reference[row] - most) * r->scale[row]);
            sum *= shrink;
            if (!logs) scale_f32(to, shrink, s->unit);
            r->reference[row] = most;
            r->limit[row] = most + RISE / r->scale[row];
        }
        weigh(to, scores, r->scale[row], r->reference[row], s, bounds);
        const float reference = r->reference[row] * r->scale[row];
        int32_t u = s->unit;
        for (; u + 16 <= s->end; u += 16) {
            const f32x16 v = load16(to + u);
            sum += v;
            if (logs) store16(to + u, log_mass16(v, reference));
        }
        if (u < s->end) {
            float few[16] = {0};
            const size_t n = (size_t)(s->end - u) * sizeof(float);
            memcpy(few, to + u, n);
            const f32x16 v = load16(few);
            sum += v;
            if (logs) store16(few, log_mass16(v, reference));
            memcpy(to + u, few, n);
        }
        store16(r->sum[row], sum);
    }
}

void repkv_scan_tokens_one(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
    const struct repkv_op_params *p = userdata;
    const struct repkv_scan_tokens_one_sources *src = SOURCES(dst, scan_tokens_one);
    const int d = p->head_dim, group = p->n_head / p->n_head_kv, half = p->rope_dim / 2;
    const int n_rows = code_rows(p->n_head, p->n_head_kv);
    const float *qkv = src->qkv->data, *far = (const float *)src->rope->data + p->rope_dim;
    float *x = dst->data, *seen = x + (int64_t)p->n_head * p->n_padded + (int64_t)ith * p->n_head * 2;
    const struct scan scan = scan_begin(p, ith, src->turn);
    for (int i = 0, head = 0; i < n_rows; i++) {
        const int last = (head / group + 1) * group;
        clear_rows(&scan, scan.rows + i);
        for (; head < last && scan.rows[i].n < SCAN_ROWS; head++) {
            rope(scan.q, qkv + head * d, far, far + half, p->rope_dim, d);
            scale_f32(scan.q, p->scale, d);
            add_row(&scan, scan.rows + i);
        }
    }
    int64_t begin, end;
    share(regions_of(src->regions)->n_units, ith, nth, &begin, &end);
    /* All key heads of a strip, because memory is read in order. */
    for (int32_t unit = (int32_t)begin; unit < end;) {
        const struct strip strip = strip_at(src->units->data, unit, (int32_t)end);
        for (int i = 0, head = 0; i < n_rows; head += scan.rows[i++].n) {
            const struct coded coded = coded_of(p, src->codes, src->units, head / group);
            scan_strip(&scan, scan.rows + i, x + (int64_t)head * p->n_padded, (size_t)p->n_padded, &coded, &strip, true);
        }
        unit = strip.end;
    }
    for (int i = 0; i < n_rows; i++) {
        for (int row = 0; row < scan.rows[i].n; row++, seen += 2) {
            seen[1] = sum16(load16(scan.rows[i].sum[row]));
            seen[0] = seen[1] > 0.0f ? scan.rows[i].reference[row] * scan.rows[i].scale[row] * 0.69314718f : LOWEST;
        }
    }
}

/* The queries of a chunk that are asked for one row of a selection: every p->stride-th up to the last one of a group. */
struct asked {
    int last, n;
};

static struct asked asked_of(const struct repkv_op_params *p, int g, int n_tokens) {
    const int n_queries = p->group ? p->group : n_tokens, first = g * n_queries;
    const int last = first + n_queries < n_tokens ? first + n_queries : n_tokens;
    return (struct asked){last - 1, last > first ? (last - first + p->stride - 1) / p->stride : 0};
}

void repkv_scan_tokens(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
    const struct repkv_op_params *p = userdata;
    const struct repkv_scan_tokens_sources *src = SOURCES(dst, scan_tokens);
    const struct repkv_regions *regions = regions_of(src->regions);
    const int d = p->head_dim, group = p->n_head / p->n_head_kv;
    const int32_t n_units = regions->n_units, n_tokens = regions->n_tokens;
    const int64_t n_padded = p->n_padded;
    float *lines = dst->data, *mass = lines + ((int64_t)p->n_rows * p->n_threads + (int64_t)ith * SCAN_ROWS) * n_padded;
    const struct scan scan = scan_begin(p, ith, src->turn);
    struct rows *rows = scan.rows;
    int64_t n_asked = 0;
    for (int r = 0; r < p->n_rows; r++) {
        for (int t = ith; t < p->n_threads; t += nth) {
            memset(lines + ((int64_t)r * p->n_threads + t) * n_padded, 0, (size_t)n_units * sizeof(float));
        }
        n_asked += asked_of(p, r / p->n_head_kv, n_tokens).n * group;
    }
    if (n_asked == 0 || n_units == 0) return;
    /* Items of as many queries as there may be, if all threads get equally many of them; every nth is a thread's, and goes to
     * its line of the item's row. */
    const int64_t n_rounds = (n_asked + SCAN_ROWS * nth - 1) / (SCAN_ROWS * nth);
    const int n_at_once = (int)((n_asked + n_rounds * nth - 1) / (n_rounds * nth));
    int item = 0;
    for (int r = 0; r < p->n_rows; r++) {
        const int kv = r % p->n_head_kv;
        const struct asked asked = asked_of(p, r / p->n_head_kv, n_tokens);
        const struct coded coded = coded_of(p, src->codes, src->units, kv);
        float *line = lines + ((int64_t)r * p->n_threads + ith) * n_padded;
        for (int at = 0; at < asked.n * group; at += n_at_once, item++) {
            if (item % nth != ith) continue;
            if (repkv_abort_requested(p->compute)) return;
            clear_rows(&scan, rows);
            for (int i = at; i < asked.n * group && i < at + n_at_once; i++) {
                const int t = asked.last - i / group * p->stride, h = kv * group + i % group;
                const float *q = (const float *)src->q->data + ((int64_t)(t / PANEL) * p->n_head + h) * d * PANEL + t % PANEL;
                for (int j = 0; j < d; j++) scan.q[j] = q[j * PANEL];
                add_row(&scan, rows);
            }
            for (int32_t unit = 0; unit < n_units;) {
                const struct strip strip = strip_at(coded.bounds, unit, n_units);
                scan_strip(&scan, rows, mass, (size_t)n_padded, &coded, &strip, false);
                unit = strip.end;
            }
            for (int i = 0; i < rows->n; i++) {
                const float sum = sum16(load16(rows->sum[i]));
                if (sum > 0.0f) axpy_f32(line, mass + (int64_t)i * n_padded, 1.0f / sum, n_units);
            }
        }
    }
}

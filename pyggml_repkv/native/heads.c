#include "convert.h"
#include "ops.h"
#include "packed.h"

/* Returns the place of value i of a head. */
static inline int place_of(int i, int pairs, int d) {
    return pairs ? i / 2 + i % 2 * (d / 2) : i;
}

/* Returns the norm of head h, or NULL; both ops have the same sources. */
static const float *norm_of(const struct repkv_op_params *p, const struct ggml_tensor *dst, int64_t h) {
    const struct repkv_qk_norm_sources *s = SOURCES(dst, qk_norm);
    const struct ggml_tensor *norm = h < p->n_head ? s->q_norm : s->k_norm;
    return norm ? norm->data : NULL;
}

void repkv_qk_norm(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
    const struct repkv_op_params *p = userdata;
    const int d = p->head_dim;
    const int64_t n_heads = dst->ne[0] / d;
    int64_t begin, end;
    share(n_heads * dst->ne[1], ith, nth, &begin, &end);
    for (int64_t unit = begin; unit < end; unit++) {
        const float *x = (const float *)SOURCES(dst, qk_norm)->qkv->data + unit * d;
        float *y = (float *)dst->data + unit * d;
        const int64_t h = unit % n_heads;
        if (h >= p->n_head + p->n_head_kv) {
            memcpy(y, x, (size_t)d * sizeof(float));
            continue;
        }
        const float *weight = norm_of(p, dst, h);
        const float scale = weight ? 1.0f / sqrtf(dot_f32(x, x, d) / (float)d + p->eps) : 1.0f;
        for (int i = 0; i < d; i++) y[place_of(i, p->pairs, d)] = weight ? x[i] * scale * weight[i] : x[i];
    }
}

void repkv_qk_norm_packed(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
    const struct repkv_op_params *p = userdata;
    const int d = p->head_dim;
    const int64_t n_heads = dst->ne[1] / d;
    int64_t begin, end;
    share(n_heads * dst->ne[2], ith, nth, &begin, &end);
    for (int64_t unit = begin; unit < end; unit++) {
        const float *x = (const float *)SOURCES(dst, qk_norm)->qkv->data + unit * d * PANEL;
        float *y = (float *)dst->data + unit * d * PANEL;
        const int64_t h = unit % n_heads;
        if (h >= p->n_head + p->n_head_kv) {
            memcpy(y, x, (size_t)(d * PANEL) * sizeof(float));
            continue;
        }
        const float *weight = norm_of(p, dst, h);
        for (int lanes = 0; lanes < PANEL; lanes += 16) {
            f32x16 scale = splat16(1.0f);
            if (weight) {
                f32x16 sum = splat16(0.0f);
                for (int i = 0; i < d; i++) sum += load16(x + i * PANEL + lanes) * load16(x + i * PANEL + lanes);
                for (int t = 0; t < 16; t++) scale[t] = 1.0f / sqrtf(sum[t] / (float)d + p->eps);
            }
            for (int i = 0; i < d; i++) {
                const f32x16 factor = weight ? scale * weight[i] : scale;
                store16(y + place_of(i, p->pairs, d) * PANEL + lanes, load16(x + i * PANEL + lanes) * factor);
            }
        }
    }
}

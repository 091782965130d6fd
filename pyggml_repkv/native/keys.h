/* Stored keys as F32. A quantised key is stored less its head's bias: one large value of it would set the scale of a whole
 * block. The bias is rotated as the key is, so that RoPE may turn a stored key like any other. */
#ifndef REPKV_KEYS_H
#define REPKV_KEYS_H

#include "convert.h"
#include "ops.h"

enum { CENTRE_STEP = 64 };

/* In place of "position less row": keys are as before RoPE. */
#define UNROTATED INT64_MIN

/* What is taken from the keys of a layer. bias [n_head_kv * head_dim], each head by halves.
 * tables [2 * CENTRE_STEP + n, rope_dim]: cosines, then sines, of positions i, CENTRE_STEP * i and CENTRE_STEP^2 * i; only the
 * last ones have YaRN's factor. */
struct repkv_key_centre {
    const float *bias, *tables;
};

/* Compact positions of older tokens, whose keys are stored before RoPE: those that a key head attends stand side by side, in
 * order, just before the window. Positions count from the window's first token.
 * keys [n, rope_dim]: cosines, then sines, of positions -1, -2, ..., as far back as a step attends.
 * query [rope_dim]: turns a rotated query to its own position. */
struct repkv_order {
    const float *keys, *query;
};

/* Returns the bias of a key head, or NULL where keys are stored as they are. */
static inline const float *key_bias(const struct repkv_op_params *p, int kv) {
    return p->centre ? p->centre->bias + (size_t)kv * (size_t)p->head_dim : NULL;
}

/* Rotates the pairs (i, i + rope_dim / 2) of x, in place. */
static inline void turn_f32(float *x, const float *table, int rope_dim) {
    const int half = rope_dim / 2;
    int i = 0;
    for (; i + 16 <= half; i += 16) {
        const f32x16 a = load16(x + i), b = load16(x + half + i), c = load16(table + i), s = load16(table + half + i);
        store16(x + i, a * c - b * s);
        store16(x + half + i, a * s + b * c);
    }
    for (; i < half; i++) {
        const float a = x[i], b = x[i + half];
        x[i] = a * table[i] - b * table[i + half];
        x[i + half] = a * table[i + half] + b * table[i];
    }
}

/* y[n][stride] += sign * the bias of one head, rotated as at positions from `position` on, all in one CENTRE_STEP. */
static inline void add_rotated_bias(const struct repkv_op_params *p, float *y, int n, size_t stride, int64_t position,
                                    const float *bias, float sign) {
    const int half = p->rope_dim / 2, fine = (int)(position % CENTRE_STEP);
    const size_t width = (size_t)p->rope_dim;
    const float *tables = p->centre->tables;
    const float *middle = tables + (size_t)(CENTRE_STEP + position / CENTRE_STEP % CENTRE_STEP) * width;
    const float *coarse = tables + (size_t)(2 * CENTRE_STEP + position / (CENTRE_STEP * CENTRE_STEP)) * width;
    int i = 0;
    for (; i + 16 <= half; i += 16) {
        const f32x16 mc = load16(middle + i), ms = load16(middle + half + i);
        const f32x16 cc = load16(coarse + i), cs = load16(coarse + half + i);
        const f32x16 c0 = (mc * cc - ms * cs) * sign, s0 = (mc * cs + ms * cc) * sign;
        const f32x16 a = load16(bias + i), b = load16(bias + half + i), u = a * c0 - b * s0, v = a * s0 + b * c0;
        for (int r = 0; r < n; r++) {
            const float *table = tables + (size_t)(fine + r) * width + i;
            float *to = y + (size_t)r * stride + i;
            const f32x16 c = load16(table), s = load16(table + half);
            store16(to, load16(to) + u * c - v * s);
            store16(to + half, load16(to + half) + u * s + v * c);
        }
    }
    for (; i < half; i++) {
        const float c0 = middle[i] * coarse[i] - middle[half + i] * coarse[half + i];
        const float s0 = middle[i] * coarse[half + i] + middle[half + i] * coarse[i];
        const float u = (bias[i] * c0 - bias[half + i] * s0) * sign, v = (bias[i] * s0 + bias[half + i] * c0) * sign;
        for (int r = 0; r < n; r++) {
            const float *table = tables + (size_t)(fine + r) * width + i;
            y[(size_t)r * stride + (size_t)i] += u * table[0] - v * table[half];
            y[(size_t)r * stride + (size_t)(half + i)] += u * table[half] + v * table[0];
        }
    }
    for (int r = 0; r < n; r++) {
        for (i = p->rope_dim; i < p->head_dim; i++) y[(size_t)r * stride + (size_t)i] += sign * bias[i];
    }
}

/* keys[n][stride] += sign * what is taken from the keys of a layer, for key heads [kv, kv + n_heads) side by side and
 * positions from `position` on (UNROTATED: before RoPE). */
static inline void add_centre(const struct repkv_op_params *p, float *keys, int n, size_t stride, int64_t position, int kv,
                              int n_heads, float sign) {
    const int d = p->head_dim;
    for (int h = 0; h < n_heads && p->centre; h++, keys += d) {
        const float *bias = key_bias(p, kv + h);
        if (position == UNROTATED) {
            for (int r = 0; r < n; r++) axpy_f32(keys + (size_t)r * stride, bias, sign, d);
            continue;
        }
        for (int done = 0, part; done < n; done += part) {
            const int left = CENTRE_STEP - (int)((position + done) % CENTRE_STEP);
            part = n - done < left ? n - done : left;
            add_rotated_bias(p, keys + (size_t)done * stride, part, stride, position + done, bias, sign);
        }
    }
}

/* Returns what is stored of a head's key x [head_dim], before RoPE: x, or in `buffer` x less the bias. */
static inline const float *stored_key(const struct repkv_op_params *p, float *buffer, const float *x, int kv) {
    if (!p->centre) return x;
    memcpy(buffer, x, (size_t)p->head_dim * sizeof(float));
    add_centre(p, buffer, 1, 0, UNROTATED, kv, 1, -1.0f);
    return buffer;
}

/* Converts rows [first, first + n) of an arena, key heads [kv, kv + n_heads), to keys [n][stride]. shift: a row's position
 * less its number. */
static inline void keys_f32(const struct repkv_op_params *p, float *keys, size_t stride, const struct ggml_tensor *k_arena,
                            int64_t first, int n, int kv, int n_heads, int64_t shift) {
    const size_t width = (size_t)(n_heads * p->head_dim);
    const size_t offset = k_arena->nb[1] / (size_t)p->n_head_kv * (size_t)kv;
    if (n_heads == p->n_head_kv && stride == width) {
        to_f32(k_arena->type, row(k_arena, first), keys, n * (int)width);
    } else {
        for (int r = 0; r < n; r++) to_f32(k_arena->type, row(k_arena, first + r) + offset, keys + (size_t)r * stride, (int)width);
    }
    add_centre(p, keys, n, stride, shift == UNROTATED ? UNROTATED : first + shift, kv, n_heads, 1.0f);
}

#endif

/* Converts rows of ggml tensors to F32 and back, and splits work over threads. */
#ifndef REPKV_CONVERT_H
#define REPKV_CONVERT_H

#include "ggml_api.h"
#include "simd.h"

/* Sets [begin, end) to thread ith's part of n items. */
static inline void share(int64_t n, int ith, int nth, int64_t *begin, int64_t *end) {
    *begin = n * ith / nth;
    *end = n * (ith + 1) / nth;
}

static inline char *row(const struct ggml_tensor *t, int64_t i) {
    return (char *)t->data + (size_t)i * t->nb[1];
}

/* Converts n values of any type with a to_float; n is a multiple of the type's block size. */
static inline void to_f32(enum ggml_type type, const void *x, float *y, int n) {
#if defined(__F16C__)
    if (type == GGML_TYPE_F16 && n % 8 == 0) {
        f16_to_f32(x, y, n);
        return;
    }
#endif
    if (type == GGML_TYPE_F32) {
        memcpy(y, x, (size_t)n * sizeof(float));
    } else {
        repkv_ggml.get_type_traits(type)->to_float(x, y, n);
    }
}

static inline void from_f32(enum ggml_type type, const float *x, void *y, int n) {
    repkv_ggml.get_type_traits_cpu(type)->from_float(x, y, n);
}

/* Returns a row in the type that the dot product of `weight_type` takes: x itself if that is F32, else the buffer. */
static inline const void *quantize_row(enum ggml_type weight_type, const float *x, void *buffer, int n) {
    const enum ggml_type type = repkv_ggml.get_type_traits_cpu(weight_type)->vec_dot_type;
    if (type == GGML_TYPE_F32) return x;
    from_f32(type, x, buffer, n);
    return buffer;
}

#endif

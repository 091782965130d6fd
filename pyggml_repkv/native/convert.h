/* Rows of ggml tensors to F32 and back, and the split of work over threads: shared by all ops. */
#ifndef REPKV_CONVERT_H
#define REPKV_CONVERT_H

#include "ggml_api.h"
#include "simd.h"

/* The part [begin, end) of n items that thread ith of nth does. */
static inline void share(int64_t n, int ith, int nth, int64_t *begin, int64_t *end) {
    *begin = n * ith / nth;
    *end = n * (ith + 1) / nth;
}

static inline char *row(const struct ggml_tensor *t, int64_t i) {
    return (char *)t->data + (size_t)i * t->nb[1];
}

/* n values of any type with a to_float; n is a multiple of the type's block size. */
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

/* A row as the dot product of `weight_type` wants it: x itself if that is F32, else converted into the buffer. */
static inline const void *quantize_row(enum ggml_type weight_type, const float *x, void *buffer, int n) {
    const enum ggml_type type = repkv_ggml.get_type_traits_cpu(weight_type)->vec_dot_type;
    if (type == GGML_TYPE_F32) return x;
    from_f32(type, x, buffer, n);
    return buffer;
}

#endif

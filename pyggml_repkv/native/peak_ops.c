#include "peak_ops.h"

#include "ops.h"
#include "simd.h"

void repkv_peak_read(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
    (void)userdata;
    const struct repkv_peak_read_sources *src = SOURCES(dst, peak_read);
    const float *x = src->x->data;
    const int64_t n_vectors = src->x->ne[0] / 64;
    const int64_t begin = n_vectors * ith / nth, end = n_vectors * (ith + 1) / nth;
    f32x16 a = splat16(0.0f), b = a, c = a, d = a;
    for (int64_t i = begin; i < end; i++) {
        a += load16(x + 64 * i);
        b += load16(x + 64 * i + 16);
        c += load16(x + 64 * i + 32);
        d += load16(x + 64 * i + 48);
    }
    ((float *)dst->data)[ith] = sum16(a + b + c + d);
}

#if defined(__AVX512F__)
typedef __m512 wide;
#define SPLAT(x) _mm512_set1_ps(x)
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
enum { PER_CHAIN = 1 };
#elif defined(__FMA__)
typedef __m256 wide;
#define SPLAT(x) _mm256_set1_ps(x)
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
enum { PER_CHAIN = 2 };
#else
typedef f32x16 wide;
#define SPLAT(x) splat16(x)
#define FMA(a, b, c) ((a) * (b) + (c))
enum { PER_CHAIN = 1 };
#endif

void repkv_peak_fma(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
    (void)nth;
    (void)userdata;
    const struct repkv_peak_fma_sources *src = SOURCES(dst, peak_fma);
    const int32_t n = *(const int32_t *)src->repetitions->data;
    /* So many independent chains hide the latency of a multiply-add on two ports. */
    enum { N = REPKV_PEAK_CHAINS };
    wide x[N];
    for (int i = 0; i < N; i++) x[i] = SPLAT(1.0f + (float)i);
    const wide factor = SPLAT(0.999f), term = SPLAT(0.001f);
    for (int32_t r = 0; r < n; r++) {
        for (int repeat = 0; repeat < PER_CHAIN; repeat++) {
#pragma GCC unroll 12
            for (int i = 0; i < N; i++) x[i] = FMA(x[i], factor, term);
        }
    }
    float sum = 0.0f, values[sizeof(wide) / sizeof(float)];
    for (int i = 0; i < N; i++) {
        memcpy(values, x + i, sizeof values);
        sum += values[0];
    }
    ((float *)dst->data)[ith] = sum;
}

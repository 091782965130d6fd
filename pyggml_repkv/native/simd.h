/* Vectors of sixteen floats through GCC's vector extensions: one source for AVX-512, AVX2, NEON and others. */
#ifndef REPKV_SIMD_H
#define REPKV_SIMD_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__F16C__) || defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

typedef float f32x16 __attribute__((vector_size(64), aligned(4)));
typedef float f32x8 __attribute__((vector_size(32), aligned(4)));
typedef int32_t i32x16 __attribute__((vector_size(64), aligned(4)));

/* Loads and stores use a type that may alias: memcpy of a vector wider than the CPU's goes through the stack in pieces. */
typedef f32x16 stored16 __attribute__((may_alias));

static inline f32x16 load16(const float *p) {
    return *(const stored16 *)p;
}

static inline void store16(float *p, f32x16 v) {
    *(stored16 *)p = v;
}

static inline f32x16 splat16(float x) {
    return (f32x16){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
}

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && !defined(__AVX512F__)
/* GCC takes apart comparisons, conversions and long-lived variables of vectors wider than the CPU's; halves stay whole. */
#define REPKV_HALVES 1
union halves {
    f32x16 whole;
    __m256 half[2];
};

static inline float sum8(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
#endif

static inline float sum16(f32x16 v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#elif defined(REPKV_HALVES)
    const union halves u = {.whole = v};
    return sum8(_mm256_add_ps(u.half[0], u.half[1]));
#else
    float s[8], t[4];
    for (int i = 0; i < 8; i++) s[i] = v[i] + v[i + 8];
    for (int i = 0; i < 4; i++) t[i] = s[i] + s[i + 4];
    return (t[0] + t[2]) + (t[1] + t[3]);
#endif
}

static inline float dot_f32(const float *a, const float *b, int n) {
#if defined(REPKV_HALVES)
    __m256 acc[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    int k = 0;
    for (; k + 32 <= n; k += 32) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) acc[j] = _mm256_fmadd_ps(_mm256_loadu_ps(a + k + 8 * j), _mm256_loadu_ps(b + k + 8 * j), acc[j]);
    }
    for (; k + 8 <= n; k += 8) acc[0] = _mm256_fmadd_ps(_mm256_loadu_ps(a + k), _mm256_loadu_ps(b + k), acc[0]);
    float total = sum8(_mm256_add_ps(_mm256_add_ps(acc[0], acc[2]), _mm256_add_ps(acc[1], acc[3])));
    for (; k < n; k++) total += a[k] * b[k];
    return total;
#else
    f32x16 acc0 = {0}, acc1 = {0};
    int i = 0;
    for (; i + 32 <= n; i += 32) {
        acc0 += load16(a + i) * load16(b + i);
        acc1 += load16(a + i + 16) * load16(b + i + 16);
    }
    for (; i + 16 <= n; i += 16) acc0 += load16(a + i) * load16(b + i);
    float s = sum16(acc0 + acc1);
    for (; i < n; i++) s += a[i] * b[i];
    return s;
#endif
}

#if defined(__AVX512F__)
static inline __attribute__((always_inline)) __m512 sums_across(const __m512 v[16]) {
    __m512 four[4]; /* each 128-bit lane: sums over that lane's positions for four vectors */
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
        const __m512 x = _mm512_add_ps(_mm512_unpacklo_ps(v[4 * k], v[4 * k + 1]), _mm512_unpackhi_ps(v[4 * k], v[4 * k + 1]));
        const __m512 y = _mm512_add_ps(_mm512_unpacklo_ps(v[4 * k + 2], v[4 * k + 3]), _mm512_unpackhi_ps(v[4 * k + 2], v[4 * k + 3]));
        four[k] = _mm512_add_ps(
            _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y))),
            _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y))));
    }
    const __m512 x = _mm512_add_ps(_mm512_shuffle_f32x4(four[0], four[1], 0x88), _mm512_shuffle_f32x4(four[0], four[1], 0xdd));
    const __m512 y = _mm512_add_ps(_mm512_shuffle_f32x4(four[2], four[3], 0x88), _mm512_shuffle_f32x4(four[2], four[3], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
}
#elif defined(REPKV_HALVES)
static inline __attribute__((always_inline)) __m256 sums_across(const __m256 v[8]) {
    __m256 two[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) two[k] = _mm256_hadd_ps(v[2 * k], v[2 * k + 1]);
    /* each 128-bit lane: sums over that half's positions for four vectors */
    const __m256 low = _mm256_hadd_ps(two[0], two[1]), high = _mm256_hadd_ps(two[2], two[3]);
    return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}
#endif

/* Returns the sums of the lanes of 16 vectors. */
static inline __attribute__((always_inline)) f32x16 sums16(const f32x16 v[16]) {
#if defined(__AVX512F__)
    return (f32x16)sums_across((const __m512 *)v);
#elif defined(REPKV_HALVES)
    union halves sums;
    for (int first = 0; first < 16; first += 8) {
        __m256 both[8];
#pragma GCC unroll 8
        for (int c = 0; c < 8; c++) {
            const union halves u = {.whole = v[first + c]};
            both[c] = _mm256_add_ps(u.half[0], u.half[1]);
        }
        sums.half[first / 8] = sums_across(both);
    }
    return sums.whole;
#else
    float sums[16];
    for (int c = 0; c < 16; c++) sums[c] = sum16(v[c]);
    return load16(sums);
#endif
}

/* out[c] = a . b[c * stride ...] for 16 rows: the partial sums are added across lanes for all rows together. */
static inline void dots16_f32(float *out, const float *a, const float *b, size_t stride, int n) {
#if defined(__AVX512F__)
    if (n % 16 == 0) {
        __m512 acc[16];
#pragma GCC unroll 16
        for (int c = 0; c < 16; c++) acc[c] = _mm512_setzero_ps();
        for (int i = 0; i < n; i += 16) {
            const __m512 v = _mm512_loadu_ps(a + i);
#pragma GCC unroll 16
            for (int c = 0; c < 16; c++) acc[c] = _mm512_fmadd_ps(v, _mm512_loadu_ps(b + (size_t)c * stride + i), acc[c]);
        }
        _mm512_storeu_ps(out, sums_across(acc));
        return;
    }
#elif defined(REPKV_HALVES)
    if (n % 8 == 0) {
        for (int first = 0; first < 16; first += 8, b += 8 * stride) {
            __m256 acc[8];
#pragma GCC unroll 8
            for (int c = 0; c < 8; c++) acc[c] = _mm256_setzero_ps();
            for (int i = 0; i < n; i += 8) {
                const __m256 v = _mm256_loadu_ps(a + i);
#pragma GCC unroll 8
                for (int c = 0; c < 8; c++) acc[c] = _mm256_fmadd_ps(v, _mm256_loadu_ps(b + (size_t)c * stride + i), acc[c]);
            }
            _mm256_storeu_ps(out + first, sums_across(acc));
        }
        return;
    }
#endif
    for (int c = 0; c < 16; c++) out[c] = dot_f32(a, b + (size_t)c * stride, n);
}

/* y += s * x */
static inline void axpy_f32(float *y, const float *x, float s, int n) {
    const f32x16 sv = splat16(s);
    int i = 0;
    for (; i + 16 <= n; i += 16) store16(y + i, load16(y + i) + sv * load16(x + i));
    for (; i < n; i++) y[i] += s * x[i];
}

/* Transposes four values of each row [stride] to y[4][32]. Rows four apart are read into a vector's 128-bit lanes, which leaves
 * exchanges within lanes. */
#if defined(__AVX512F__)
enum { ROWS_AT_ONCE = 16 };

static inline __m512 rows4_f32(const float *x, size_t stride) {
    __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(x));
    v = _mm512_mask_broadcast_f32x4(v, 0x00f0, _mm_loadu_ps(x + 4 * stride));
    v = _mm512_mask_broadcast_f32x4(v, 0x0f00, _mm_loadu_ps(x + 8 * stride));
    return _mm512_mask_broadcast_f32x4(v, 0xf000, _mm_loadu_ps(x + 12 * stride));
}

static inline void transpose4_f32(float *y, const float *x, size_t stride) {
    const __m512 r0 = rows4_f32(x, stride), r1 = rows4_f32(x + stride, stride);
    const __m512 r2 = rows4_f32(x + 2 * stride, stride), r3 = rows4_f32(x + 3 * stride, stride);
    const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(r0, r1)), b = _mm512_castps_pd(_mm512_unpackhi_ps(r0, r1));
    const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(r2, r3)), d = _mm512_castps_pd(_mm512_unpackhi_ps(r2, r3));
    _mm512_storeu_ps(y, _mm512_castpd_ps(_mm512_unpacklo_pd(a, c)));
    _mm512_storeu_ps(y + 32, _mm512_castpd_ps(_mm512_unpackhi_pd(a, c)));
    _mm512_storeu_ps(y + 64, _mm512_castpd_ps(_mm512_unpacklo_pd(b, d)));
    _mm512_storeu_ps(y + 96, _mm512_castpd_ps(_mm512_unpackhi_pd(b, d)));
}
#elif defined(REPKV_HALVES)
enum { ROWS_AT_ONCE = 8 };

static inline __m256 rows4_f32(const float *x, size_t stride) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(x)), _mm_loadu_ps(x + 4 * stride), 1);
}

static inline void transpose4_f32(float *y, const float *x, size_t stride) {
    const __m256 r0 = rows4_f32(x, stride), r1 = rows4_f32(x + stride, stride);
    const __m256 r2 = rows4_f32(x + 2 * stride, stride), r3 = rows4_f32(x + 3 * stride, stride);
    const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(r0, r1)), b = _mm256_castps_pd(_mm256_unpackhi_ps(r0, r1));
    const __m256d c = _mm256_castps_pd(_mm256_unpacklo_ps(r2, r3)), d = _mm256_castps_pd(_mm256_unpackhi_ps(r2, r3));
    _mm256_storeu_ps(y, _mm256_castpd_ps(_mm256_unpacklo_pd(a, c)));
    _mm256_storeu_ps(y + 32, _mm256_castpd_ps(_mm256_unpackhi_pd(a, c)));
    _mm256_storeu_ps(y + 64, _mm256_castpd_ps(_mm256_unpacklo_pd(b, d)));
    _mm256_storeu_ps(y + 96, _mm256_castpd_ps(_mm256_unpackhi_pd(b, d)));
}
#else
enum { ROWS_AT_ONCE = 1 };

static inline void transpose4_f32(float *y, const float *x, size_t stride) {
    (void)stride;
    for (int i = 0; i < 4; i++) y[32 * i] = x[i];
}
#endif

/* y[i][0..31] = x[0..31][i], of 32 rows of n values. */
static inline void transpose32_f32(float *y, const float *x, size_t n) {
    const size_t whole = n / 4 * 4;
    for (size_t i = 0; i < whole; i += 4) {
        for (size_t r = 0; r < 32; r += ROWS_AT_ONCE) transpose4_f32(y + i * 32 + r, x + r * n + i, n);
    }
    for (size_t i = whole; i < n; i++) {
        for (size_t r = 0; r < 32; r++) y[i * 32 + r] = x[r * n + i];
    }
}

/* y [n] += sum over rows of weights[row] * x[row * stride ...] */
static inline void weighted_rows_f32(float *y, const float *weights, const float *x, int n_rows, size_t stride, int n) {
    int i = 0;
#if defined(REPKV_HALVES)
    for (; i + 64 <= n; i += 64) {
        __m256 acc[8];
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) acc[j] = _mm256_loadu_ps(y + i + 8 * j);
        for (int r = 0; r < n_rows; r++) {
            const __m256 w = _mm256_set1_ps(weights[r]);
            const float *row = x + (size_t)r * stride + i;
#pragma GCC unroll 8
            for (int j = 0; j < 8; j++) acc[j] = _mm256_fmadd_ps(w, _mm256_loadu_ps(row + 8 * j), acc[j]);
        }
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) _mm256_storeu_ps(y + i + 8 * j, acc[j]);
    }
#endif
    for (; i + 64 <= n; i += 64) {
        f32x16 acc[4];
        for (int j = 0; j < 4; j++) acc[j] = load16(y + i + 16 * j);
        for (int r = 0; r < n_rows; r++) {
            const f32x16 w = splat16(weights[r]);
            for (int j = 0; j < 4; j++) acc[j] += w * load16(x + (size_t)r * stride + i + 16 * j);
        }
        for (int j = 0; j < 4; j++) store16(y + i + 16 * j, acc[j]);
    }
    for (; i + 16 <= n; i += 16) {
        f32x16 acc = load16(y + i);
        for (int r = 0; r < n_rows; r++) acc += splat16(weights[r]) * load16(x + (size_t)r * stride + i);
        store16(y + i, acc);
    }
    for (; i < n; i++) {
        for (int r = 0; r < n_rows; r++) y[i] += weights[r] * x[(size_t)r * stride + i];
    }
}

static inline void scale_f32(float *y, float s, int n) {
    for (int i = 0; i < n; i++) y[i] *= s;
}

#if defined(__F16C__)
/* Converts n half-precision values to F32; n is a multiple of 8. */
static inline void f16_to_f32(const void *x, float *y, int n) {
    const uint16_t *from = x;
    int i = 0;
#if defined(__AVX512F__)
    for (; i + 64 <= n; i += 64) {
#pragma GCC unroll 4
        for (int j = i; j < i + 64; j += 16) {
            _mm512_storeu_ps(y + j, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(from + j))));
        }
    }
#endif
    for (; i < n; i += 8) _mm256_storeu_ps(y + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + i))));
}
#endif

/* Returns the lanes of a where the mask is all ones, and those of b where it is zero. */
static inline f32x16 select16(i32x16 mask, f32x16 a, f32x16 b) {
    i32x16 ai, bi;
    memcpy(&ai, &a, sizeof ai);
    memcpy(&bi, &b, sizeof bi);
    ai = (ai & mask) | (bi & ~mask);
    memcpy(&a, &ai, sizeof a);
    return a;
}

/* Returns all ones where a > b; with a NaN on either side, zero. */
static inline i32x16 above16(f32x16 a, f32x16 b) {
#if defined(REPKV_HALVES)
    const union halves x = {.whole = a}, y = {.whole = b};
    union {
        i32x16 whole;
        __m256 half[2];
    } mask;
    for (int i = 0; i < 2; i++) mask.half[i] = _mm256_cmp_ps(x.half[i], y.half[i], _CMP_GT_OQ);
    return mask.whole;
#else
    return a > b;
#endif
}

static inline int any_above16(f32x16 a, f32x16 b) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
#else
    const i32x16 mask = above16(a, b);
    int32_t any = 0;
    for (int i = 0; i < 16; i++) any |= mask[i];
    return any != 0;
#endif
}

/* The larger lanes; those of b where either is NaN. */
static inline f32x16 max16(f32x16 a, f32x16 b) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(REPKV_HALVES)
    union halves x = {.whole = a};
    const union halves y = {.whole = b};
    for (int i = 0; i < 2; i++) x.half[i] = _mm256_max_ps(x.half[i], y.half[i]);
    return x.whole;
#else
    return select16(a > b, a, b);
#endif
}

static inline f32x16 min16(f32x16 a, f32x16 b) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(REPKV_HALVES)
    union halves x = {.whole = a};
    const union halves y = {.whole = b};
    for (int i = 0; i < 2; i++) x.half[i] = _mm256_min_ps(x.half[i], y.half[i]);
    return x.whole;
#else
    return select16(a < b, a, b);
#endif
}

/* Returns the largest lane; no lane is NaN. */
static inline float largest16(f32x16 v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#else
    float x[16];
    store16(x, v);
    for (int n = 8; n > 0; n /= 2) {
        for (int i = 0; i < n; i++) x[i] = x[i] > x[i + n] ? x[i] : x[i + n];
    }
    return x[0];
#endif
}

/* e^x to about 2 ulp: x = n ln2 + r, |r| <= ln2 / 2, Taylor series to r^7. Exactly zero far below zero, -inf included;
 * without AVX-512 from -87.3 on, where it also saturates above 88.3. */
#if defined(REPKV_HALVES)
static inline __m256 exp8(__m256 x) {
    const __m256 vanishes = _mm256_cmp_ps(x, _mm256_set1_ps(-87.3f), _CMP_LT_OQ);
    x = _mm256_min_ps(_mm256_set1_ps(88.3f), _mm256_blendv_ps(x, _mm256_setzero_ps(), vanishes));
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
    r = _mm256_fmadd_ps(n, _mm256_set1_ps(2.12194440e-4f), r);
    __m256 p = _mm256_set1_ps(1.0f / 5040.0f);
    const float coefficients[] = {1.0f / 720.0f, 1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f, 1.0f, 1.0f};
#pragma GCC unroll 7
    for (int i = 0; i < 7; i++) p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(coefficients[i]));
    const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_andnot_ps(vanishes, _mm256_mul_ps(p, _mm256_castsi256_ps(bits)));
}
#endif

static inline f32x16 exp16(f32x16 x) {
#if defined(REPKV_HALVES)
    union halves u = {.whole = x};
    for (int i = 0; i < 2; i++) u.half[i] = exp8(u.half[i]);
    return u.whole;
#else
#if defined(__AVX512F__)
    x = max16(x, splat16(-200.0f));
    const f32x16 n = (f32x16)_mm512_roundscale_ps((__m512)(x * 1.44269504f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const i32x16 vanishes = x < -87.3f;
    x = select16(vanishes, splat16(0.0f), x);
    x = select16(x > 88.3f, splat16(88.3f), x);
    const f32x16 magic = splat16(12582912.0f); /* 1.5 * 2^23: adding it rounds to the nearest integer */
    const f32x16 n = (x * 1.44269504f + magic) - magic;
#endif
    const f32x16 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    f32x16 p = splat16(1.0f / 5040.0f);
    p = p * r + 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
#if defined(__AVX512F__)
    return (f32x16)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    const i32x16 bits = (__builtin_convertvector(n, i32x16) + 127) << 23;
    f32x16 power;
    memcpy(&power, &bits, sizeof power);
    return select16(vanishes, splat16(0.0f), p * power);
#endif
#endif
}

/* Natural logarithm of normal positive numbers: x = 2^e m, log m = 2 atanh((m - 1) / (m + 1)) as a series, |argument| < .172. */
static inline f32x16 log16(f32x16 x) {
    i32x16 bits;
    memcpy(&bits, &x, sizeof bits);
    const i32x16 e = (bits - 0x3f3504f3) >> 23; /* m from sqrt(1/2) to sqrt(2) */
    bits -= e << 23;
    f32x16 m;
    memcpy(&m, &bits, sizeof m);
    const f32x16 s = (m - 1.0f) / (m + 1.0f), z = s * s;
    const f32x16 p = (((2.0f / 9.0f * z + 2.0f / 7.0f) * z + 2.0f / 5.0f) * z + 2.0f / 3.0f) * z * s + 2.0f * s;
    return __builtin_convertvector(e, f32x16) * 0.69314718f + p;
}

#endif

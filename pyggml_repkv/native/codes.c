#include "codes.h"

#include <math.h>
#include <string.h>

#include "convert.h"

size_t repkv_code_row_bytes(int n_head_kv, int head_dim, int bits) {
    return ((size_t)n_head_kv * code_head_bytes(head_dim, bits) + 63) / 64 * 64;
}

/* Shares of the largest value at which the outermost level may lie: few large values are worth less than many small ones. */
static const float REACH[3][4] = {{1.0f}, {0.85f, 0.7f, 0.55f, 0.45f}, {1.0f, 0.9f, 0.8f, 0.7f}};

/* Sets code [dim] of x [dim] -> its step: of the reaches that which leaves the least error. The step makes products with the
 * key right on average, as RaBitQ does (arXiv 2405.12497). */
static float quantize(uint8_t *code, const float *x, int dim, int bits) {
    const int top = (1 << bits) - 1, n_tries = bits == 1 ? 1 : 4;
    const float *reach = REACH[bits == 1 ? 0 : bits == 2 ? 1 : 2];
    float most = 0.0f, best = -1.0f, step = 0.0f, square = 0.0f;
    for (int i = 0; i < dim; i++) {
        most = fabsf(x[i]) > most ? fabsf(x[i]) : most;
        square += x[i] * x[i];
    }
    memset(code, 0, (size_t)dim);
    if (!(most > 0.0f)) return most; /* zero, or a NaN */
    for (int k = 0; k < n_tries; k++) {
        const float scale = (float)top / (2.0f * most * reach[k]), middle = 0.5f * (float)top;
        float dot = 0.0f, norm = 0.0f;
        for (int i = 0; i < dim; i++) {
            const float level = fminf(fmaxf(roundf(x[i] * scale + middle), 0.0f), (float)top) - middle;
            dot += x[i] * level;
            norm += level * level;
        }
        if (!(dot * dot / norm > best)) continue;
        best = dot * dot / norm;
        step = square / dot;
        for (int i = 0; i < dim; i++) code[i] = (uint8_t)fminf(fmaxf(roundf(x[i] * scale + middle), 0.0f), (float)top);
    }
    return step;
}

static inline char *code_byte(char *codes, int lane, int i, int bits, int *shift) {
    const int per_word = 32 / bits, in_word = i % per_word;
    *shift = in_word / 4 * bits;
    return codes + ((size_t)(i / per_word) * CODE_LANES + (size_t)lane) * 4 + in_word % 4;
}

void repkv_encode_keys(char *codes, const float *keys, int64_t first, int64_t n, int n_head_kv, int head_dim, int bits,
                       const float *centre, const float *turn, float *scratch) {
    const size_t row_bytes = repkv_code_row_bytes(n_head_kv, head_dim, bits), head_bytes = code_head_bytes(head_dim, bits);
    uint8_t *code = (uint8_t *)(scratch + head_dim);
    const int mask = (1 << bits) - 1;
    for (int64_t t = 0; t < n; t++) {
        const int lane = (int)((first + t) % CODE_LANES);
        char *to = codes + (size_t)((first + t) / CODE_LANES) * row_bytes;
        for (int kv = 0; kv < n_head_kv; kv++, to += head_bytes) {
            const float *key = keys + (t * n_head_kv + kv) * head_dim;
            memset(scratch, 0, (size_t)head_dim * sizeof(float));
            for (int i = 0; i < head_dim; i++) axpy_f32(scratch, turn + (size_t)i * (size_t)head_dim, key[i] - centre[kv * head_dim + i], head_dim);
            const float step = quantize(code, scratch, head_dim, bits);
            from_f32(GGML_TYPE_F16, &step, to + code_bytes(head_dim, bits) + (size_t)lane * sizeof(uint16_t), 1);
            for (int i = 0, shift; i < head_dim; i++) {
                char *byte = code_byte(to, lane, i, bits, &shift);
                *byte = (char)(((unsigned char)*byte & ~(mask << shift)) | code[i] << shift);
            }
        }
    }
}

void repkv_decode_codes(const char *codes, float *keys, int64_t first, int64_t n, int n_head_kv, int head_dim, int bits) {
    const size_t row_bytes = repkv_code_row_bytes(n_head_kv, head_dim, bits), head_bytes = code_head_bytes(head_dim, bits);
    const int mask = (1 << bits) - 1;
    for (int64_t t = 0; t < n; t++) {
        const int lane = (int)((first + t) % CODE_LANES);
        const char *from = codes + (size_t)((first + t) / CODE_LANES) * row_bytes;
        for (int kv = 0; kv < n_head_kv; kv++, from += head_bytes) {
            float step;
            to_f32(GGML_TYPE_F16, from + code_bytes(head_dim, bits) + (size_t)lane * sizeof(uint16_t), &step, 1);
            for (int i = 0, shift; i < head_dim; i++) {
                const char *byte = code_byte((char *)from, lane, i, bits, &shift);
                *keys++ = step * ((float)((unsigned char)*byte >> shift & mask) - 0.5f * (float)mask);
            }
        }
    }
}

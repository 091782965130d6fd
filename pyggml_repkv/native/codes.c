#include "codes.h"

#include "convert.h"

typedef uint8_t u8x16 __attribute__((vector_size(16)));

size_t repkv_code_row_bytes(int n_head_kv, int head_dim, int bits) {
    return ((size_t)n_head_kv * code_head_bytes(head_dim, bits) + 63) / 64 * 64;
}

/* Shares of the largest value at which the outermost level may lie: few large values are worth less than many small ones. */
enum { N_REACHES = 4 };
static const float REACHES[3][N_REACHES] = {{1.0f}, {0.85f, 0.7f, 0.55f, 0.45f}, {1.0f, 0.9f, 0.8f, 0.7f}};

/* The nearest code, less the middle one. */
static inline f32x16 level16(f32x16 x, float scale, float middle) {
    const f32x16 magic = splat16(12582912.0f); /* 1.5 * 2^23: adding it rounds to the nearest integer */
    const f32x16 code = ((x * scale + middle) + magic) - magic;
    return min16(max16(code, splat16(0.0f)), splat16(2.0f * middle)) - middle;
}

/* Sets code [dim] of x [dim] -> its step: of the reaches that which leaves the least error. The step makes products with the
 * key right on average, as RaBitQ does (arXiv 2405.12497). x ends with zeros up to a multiple of 16. A key whose
 * square is not finite has the step NaN. */
static float quantize(uint8_t *code, const float *x, int dim, int bits) {
    const int n_tries = bits == 1 ? 1 : N_REACHES, top = (1 << bits) - 1;
    const float *reaches = REACHES[bits / 2], middle = 0.5f * (float)top;
    f32x16 largest = splat16(0.0f), squares = splat16(0.0f);
    for (int i = 0; i < dim; i += 16) {
        const f32x16 v = load16(x + i);
        largest = max16(v, max16(-v, largest));
        squares += v * v;
    }
    const float most = largest16(largest), square = sum16(squares);
    memset(code, 0, (size_t)dim);
    if (!(square < INFINITY)) return NAN;
    if (!(square > 0.0f)) return 0.0f;
    f32x16 dots[N_REACHES] = {{0}}, norms[N_REACHES] = {{0}};
    for (int i = 0; i < dim; i += 16) {
        for (int k = 0; k < n_tries; k++) {
            const f32x16 v = load16(x + i), level = level16(v, middle / (most * reaches[k]), middle);
            dots[k] += v * level;
            norms[k] += level * level;
        }
    }
    float best = -1.0f, step = 0.0f, scale = 0.0f;
    for (int k = 0; k < n_tries; k++) {
        /* Levels of the zeros at the end are half a step away from them. */
        const float dot = sum16(dots[k]), norm = sum16(norms[k]) - 0.25f * (float)((16 - dim % 16) % 16);
        if (!(dot * dot / norm > best)) continue;
        best = dot * dot / norm;
        step = square / dot;
        scale = middle / (most * reaches[k]);
    }
    for (int i = 0; i < dim; i += 16) {
        const u8x16 codes = __builtin_convertvector(level16(load16(x + i), scale, middle) + middle, u8x16);
        memcpy(code + i, &codes, sizeof codes);
    }
    return step;
}

static inline char *code_byte(char *codes, int lane, int i, int bits, int *shift) {
    const int per_word = 32 / bits, in_word = i % per_word;
    *shift = in_word / 4 * bits;
    return codes + ((size_t)(i / per_word) * CODE_LANES + (size_t)lane) * 4 + in_word % 4;
}

void repkv_encode_keys(char *codes, const float *keys, int64_t first, int64_t n, int n_head_kv, int head_dim, int bits,
                       const float *centre, const float *turn) {
    const size_t row_bytes = repkv_code_row_bytes(n_head_kv, head_dim, bits), head_bytes = code_head_bytes(head_dim, bits);
    const int per_word = 8 / bits, n_words = code_dim(head_dim, bits) / (4 * per_word);
    float key[MAX_CODE_DIM], turned[MAX_CODE_DIM + 16];
    uint8_t code[MAX_CODE_DIM + 32];
    memset(turned, 0, sizeof turned);
    memset(code, 0, sizeof code);
    for (int64_t t = 0; t < n; t++) {
        const int lane = (int)((first + t) % CODE_LANES);
        char *to = codes + (size_t)((first + t) / CODE_LANES) * row_bytes;
        for (int kv = 0; kv < n_head_kv; kv++, to += head_bytes, keys += head_dim) {
            for (int i = 0; i < head_dim; i++) key[i] = keys[i] - centre[kv * head_dim + i];
            memset(turned, 0, (size_t)head_dim * sizeof(float));
            weighted_rows_f32(turned, key, turn, head_dim, (size_t)head_dim, head_dim);
            const float step = quantize(code, turned, head_dim, bits), stored = step > 65504.0f ? 65504.0f : step;
            from_f32(GGML_TYPE_F16, &stored, to + code_bytes(head_dim, bits) + (size_t)lane * sizeof(uint16_t), 1);
            for (int word = 0, i = 0; word < n_words; word++) {
                uint32_t all = 0;
                for (int k = 0; k < per_word; k++, i += 4) {
                    uint32_t four;
                    memcpy(&four, code + i, sizeof four);
                    all |= four << (k * bits);
                }
                memcpy(to + (size_t)(word * CODE_LANES + lane) * 4, &all, sizeof all);
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

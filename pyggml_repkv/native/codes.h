/* Codes of evicted keys: `bits` (1, 2 or 4) for each value of a key, after a rotation that spreads what is in few values.
 *
 * A value x of a rotated, centred key [dim] is about step * (code - (2^bits - 1) / 2), with one step for each token and key
 * head. A row of a codes arena is a tile of CODE_LANES tokens: [n_head_kv][codes, then F16 steps [CODE_LANES]], padded to 64
 * bytes. Codes of a tile are [dim / per_word][CODE_LANES] words of 32 bits: byte b of word i of a token holds, from its low bits
 * up, values i * per_word + b, then i * per_word + 4 + b, and so on, where per_word = 32 / bits. dim is head_dim, rounded up to
 * whole words; what is added counts nothing, because queries are zero there. */
#ifndef REPKV_CODES_H
#define REPKV_CODES_H

#include <stddef.h>
#include <stdint.h>

enum {
    CODE_LANES = 16,
    MAX_CODE_DIM = 512, /* values of a coded key; Python checks it */
};

static inline int code_dim(int head_dim, int bits) {
    const int per_word = 32 / bits;
    return (head_dim + per_word - 1) / per_word * per_word;
}

/* Bytes of one key head's codes of a tile, without steps. */
static inline size_t code_bytes(int head_dim, int bits) {
    return (size_t)code_dim(head_dim, bits) * (size_t)bits / 8 * CODE_LANES;
}

static inline size_t code_head_bytes(int head_dim, int bits) {
    return code_bytes(head_dim, bits) + CODE_LANES * sizeof(uint16_t);
}

/* Bytes of a row of a codes arena. */
size_t repkv_code_row_bytes(int n_head_kv, int head_dim, int bits);

/* Encodes keys [n, n_head_kv, head_dim] of tokens [first, first + n), counted from the first one that has codes, less
 * `centre` [n_head_kv, head_dim] and multiplied by `turn` [head_dim, head_dim] (rows are inputs). */
void repkv_encode_keys(char *codes, const float *keys, int64_t first, int64_t n, int n_head_kv, int head_dim, int bits,
                       const float *centre, const float *turn);

/* The reverse: keys [n, n_head_kv, head_dim] of tokens from `first` on, still multiplied by `turn`, without the centre. */
void repkv_decode_codes(const char *codes, float *keys, int64_t first, int64_t n, int n_head_kv, int head_dim, int bits);

#endif

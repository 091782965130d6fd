/* The parts of a sequence that a step of a bounded memory sees, as its ops get them.
 *
 * regions I32 [11]: first position, n_tokens, end of sinks, start of remainder, start of local window (= end of remainder),
 * local_base, n_blocks, 1 for far positions, how many blocks to select, store_base, which half of `kept` the last token's
 * selection is in (-1: there is none). Positions fit 31 bits.
 * Two arenas per layer: `local` holds the rotated keys of the window, row = position - local_base; `store` holds sinks at
 * row = position, tokens from the remainder on at row = position - store_base, as far as it has rows, and blocks where
 * `places` I32 [n_blocks, 2] = (first row, n_tokens) says. Its keys are as before RoPE (far positions) or rotated at their
 * true position (exact). */
#ifndef REPKV_REGIONS_H
#define REPKV_REGIONS_H

#include "ops.h"

enum repkv_region { FIRST, N_TOKENS, SINK_END, REMAINDER, LOCAL, LOCAL_BASE, N_BLOCKS, FAR, N_SELECT, STORE_BASE, KEPT, N_REGIONS };

static inline const int32_t *regions_of(const struct ggml_tensor *t) {
    return t->data;
}

/* A row of one half of kept-l, I32 [2, rows, 1 + n_top]: how many blocks a token selected, and which, ascending. */
static inline int32_t *kept_row(const struct ggml_tensor *kept, int half, int64_t row_index) {
    return (int32_t *)kept->data + (half * kept->ne[1] + row_index) * kept->ne[0];
}

/* The half that a step writes, if it finds the last selection in half `last` (-1: nowhere). */
static inline int kept_half(int last) {
    return last == 0;
}

/* Where a block lies in the store. */
struct place {
    int32_t row, n_tokens;
};

#endif

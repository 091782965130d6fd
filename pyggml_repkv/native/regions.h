/* The parts of a sequence that a step of a bounded memory sees, as the ops get them.
 *
 * Two arenas per layer: `local` holds the rotated keys of the window, row = position - local_base; `store` holds sinks at
 * row = position, tokens from the remainder on at row = position - store_base, as far as it has rows, and units where
 * `places` I32 [1 or n_lanes, n_units, 3] says: a unit is a part of a block, or all of it; a lane is one key head, or all of
 * them. Its keys are as before RoPE (far positions) or rotated at their true position (exact). */
#ifndef REPKV_REGIONS_H
#define REPKV_REGIONS_H

#include "ops.h"

/* The input `regions` I32 [11]; memory/regions.py fills it. Positions fit 31 bits. */
struct repkv_regions {
    int32_t first;      /* position of the step's first token */
    int32_t n_tokens;   /* of the step */
    int32_t sink_end;   /* sinks are [0, sink_end) */
    int32_t remainder;  /* evicted tokens that fill no block are [remainder, local) */
    int32_t local;      /* the window is [local, first) */
    int32_t local_base; /* position less row in `local` */
    int32_t n_units;    /* that can be selected */
    int32_t far;        /* 1: far positions */
    int32_t budget;     /* tokens to select, if there are as many */
    int32_t store_base; /* position less row in `store` */
    int32_t kept;       /* half of kept-l with the last token's selection; -1: none */
};

static inline const struct repkv_regions *regions_of(const struct ggml_tensor *t) {
    return t->data;
}

/* A row of one half of kept-l, I32 [2, rows, 1 + n_top]: how many blocks a token selected, and which, ascending. */
static inline int32_t *kept_row(const struct ggml_tensor *kept, int half, int64_t row_index) {
    return (int32_t *)kept->data + (half * kept->ne[1] + row_index) * kept->ne[0];
}

/* Returns the half that a step writes; `last` is the half with the last selection (-1: none). */
static inline int kept_half(int last) {
    return last == 0;
}

/* The place of a unit in the store, and the position of its first token. */
struct place {
    int32_t row, n_tokens, position;
};

#endif

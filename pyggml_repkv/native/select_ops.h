/* Selects the blocks that matter to the queries of a step.
 *
 * index [n_groups, n_head_kv * n_repr * head_dim * LANES], F16 or F32: representatives of LANES blocks side by side, so that
 * one vector holds one feature of all of them: [group][kv][representative][feature][block % LANES].
 * relevance (flat): x [n_head][LANES * n_groups], then each thread's [n_head][maximum, sum of exp(x - maximum)]. */
#ifndef REPKV_SELECT_OPS_H
#define REPKV_SELECT_OPS_H

#include "ops.h"

enum {
    LANES = 16,
    MAX_SELECTED = 4096, /* units, if they are chosen and not all taken; Python checks it */
};

/* The value of a NaN, and of lanes beyond the last block: below any relevance, and finite. */
#define LOWEST (-3.0e38f)

enum repkv_relevance_kind {
    REPKV_LSE,  /* log of the sum of exp(q . representative), weighted by a softmax over blocks */
    REPKV_MEAN, /* mean of q . representative */
    REPKV_MAX,  /* largest q . representative */
};

/* Not a graph op, because blocks are sealed between steps. Sets out [n_head_kv, n_repr] to the n_repr tokens of [begin, end)
 * with the highest score of each key head (of equals the first), in order of position. A block shorter than n_repr repeats its
 * last token. */
void repkv_repr_topk(int32_t *out, const float *score, int64_t begin, int64_t end, int n_head_kv, int n_repr);

/* Bytes of scratch per thread. */
size_t repkv_select_scratch(int n_head, int head_dim);

#endif

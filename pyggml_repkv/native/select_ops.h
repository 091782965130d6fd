/* Which blocks matter to the queries of a step. See ops.h and regions.h for common rules.
 *
 * index [n_groups, n_head_kv * n_repr * head_dim * 16], F16 or F32: representatives of 16 blocks side by side, so that one
 * vector holds one feature of 16 blocks: [group][kv][representative][feature][block % 16].
 * relevance (flat): x [n_head][16 * n_groups], then what each thread saw, [n_threads][n_head][maximum, sum of exp(x - maximum)]. */
#ifndef REPKV_SELECT_OPS_H
#define REPKV_SELECT_OPS_H

#include "ops.h"

enum repkv_relevance_kind {
    REPKV_LSE,  /* log of the sum of exp(q . representative), weighed by a softmax over blocks */
    REPKV_MEAN, /* mean of q . representative */
    REPKV_MAX,  /* largest q . representative */
};

/* src: packed far queries, index, regions, marker of a score op -> relevance of the chunk's mean query, scaled. */
void repkv_relevance(struct ggml_tensor *dst, int ith, int nth, void *userdata);

/* The same for one token. src: qkv, index, rope [2, rope_dim] of which the second is used, regions, marker. */
void repkv_relevance_one(struct ggml_tensor *dst, int ith, int nth, void *userdata);

/* src: relevance, regions -> I32 [1 or n_head_kv, 1 + n_top]: how many (at most n_top and regions[N_SELECT]), then the
 * blocks with the highest weight, ascending; of equals the lowest. The weight is the sum over heads (with per_head over those
 * that share a key head, a row for each key head) of x, or for REPKV_LSE of the softmax of x over blocks. NaN counts as lowest.
 *
 * With a third source, kept-l I32 [2, rows, 1 + n_top], a block that the last token selected (half regions[KEPT]) ranks
 * `sticky` nats higher: REPKV_LSE multiplies its weight by exp(sticky), else sticky is added for each head. A fourth is the
 * same tensor again where this node also writes what it selects to the other half (as none, if it had not to choose).
 * With `late` it then returns what the last token selected, if that chose, instead of its own. */
void repkv_block_topk(struct ggml_tensor *dst, int ith, int nth, void *userdata);

/* Not graph ops: blocks are sealed between steps. For each key head the n_repr tokens of [begin, end) with the highest
 * score (of equals the first), in order of position: out [n_head_kv, n_repr]. A block shorter than n_repr repeats the last. */
void repkv_repr_topk(int32_t *out, const float *score, int64_t begin, int64_t end, int n_head_kv, int n_repr);

/* Bytes of scratch per thread. */
size_t repkv_select_scratch(int n_head, int head_dim);

#endif

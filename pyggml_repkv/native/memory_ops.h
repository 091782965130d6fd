/* Representative-token memory: scores, block selection, and attention over what was selected.
 *
 * Two arenas per layer: `local` holds the rotated keys of the window, row = position - local_base; `store` holds every
 * token, row = position, its keys as they are before RoPE (far positions) or rotated at their true position (exact).
 * A step attends the sinks, the selected blocks, the remainder and the local window, in one softmax. With far positions
 * everything in the store is seen from one distance: the queries are rotated by it, the keys not at all.
 *
 * regions I32 [8]: first position, n_tokens, end of sinks, start of remainder, start of local window (= end of remainder),
 * local_base, n_blocks, 1 for far positions. bounds I32 [n_blocks + 1]: block b is [bounds[b], bounds[b + 1]).
 * Positions fit 31 bits. One-token forms take qkv [(n_head + 2 n_head_kv) * head_dim] and
 * rope [2, rope_dim] = tables (cosines, sines) for the true position and for the far distance. See ops.h for common rules. */
#ifndef REPKV_MEMORY_OPS_H
#define REPKV_MEMORY_OPS_H

#include "ops.h"

enum repkv_region { FIRST, N_TOKENS, SINK_END, REMAINDER, LOCAL, LOCAL_BASE, N_BLOCKS, FAR, N_REGIONS };

/* src: packed qkv, k_store, v_store, rope [rope_dim] for the far distance, regions -> queries rotated by it and scaled, packed.
 * Side effect: keys before RoPE and values are written to the store. */
void repkv_store_far(struct ggml_tensor *dst, int ith, int nth, void *userdata);

/* src: packed queries of store_kv, k_local, score [n_positions, n_head_kv], regions -> marker [1].
 * Side effect: score[m] += 1/n_score * sum over this step's queries at m+1 .. m+n_score, summed over the heads that share a
 * key head, of q . k_m (both rotated; the queries' scale is taken out). */
void repkv_score_acc(struct ggml_tensor *dst, int ith, int nth, void *userdata);

/* The same for one token. src: qkv, k_local, score, rope, regions. */
void repkv_score_acc_one(struct ggml_tensor *dst, int ith, int nth, void *userdata);

/* src: packed far queries, index [n_blocks, n_head_kv * n_repr * head_dim], regions, marker of score_acc
 * -> logsumexp over representatives of mean query . representative [n_blocks_max, n_head]. */
void repkv_relevance(struct ggml_tensor *dst, int ith, int nth, void *userdata);

/* The same for one token. src: qkv, index, rope, regions, marker. */
void repkv_relevance_one(struct ggml_tensor *dst, int ith, int nth, void *userdata);

/* src: relevance, regions -> I32 [1 + top]: how many, then the blocks with the highest sum over heads of
 * softmax over blocks, ascending; of equals the lowest. NaN counts as lowest. */
void repkv_block_topk(struct ggml_tensor *dst, int ith, int nth, void *userdata);

/* src: packed local queries, k_local, v_local, packed far queries, k_store, v_store, selected blocks, bounds, regions
 * -> heads, packed [n_panels, n_head * head_dim, PANEL]. */
void repkv_attend_memory(struct ggml_tensor *dst, int ith, int nth, void *userdata);

/* src: qkv, k_local, v_local, k_store, v_store, rope, selected blocks, bounds, regions
 * -> partial sums as of repkv_attend [n_threads, n_head, 2 + head_dim].
 * Side effect: the new key and value are written to both arenas. */
void repkv_attend_memory_one(struct ggml_tensor *dst, int ith, int nth, void *userdata);

/* Representatives of one block of one layer: for each key head the n_repr tokens of [begin, end) with the highest score (of
 * equals the first), in order of position; their keys are copied from the store to out [n_head_kv, n_repr, head_dim].
 * If the block is shorter than n_repr, the last one is repeated. Not a graph op: blocks are sealed between steps. */
void repkv_repr_topk(char *out, const char *store, size_t store_row_bytes, const float *score, int64_t begin, int64_t end,
                     int n_head_kv, int n_repr);

#endif

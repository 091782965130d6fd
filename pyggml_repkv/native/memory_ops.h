/* Attention over sinks, selected blocks, remainder and local window, in one softmax. See ops.h and regions.h.
 *
 * With far positions everything in the store is seen from one distance: the queries are rotated by it, the keys not at all.
 * places: regions.h. selected: as from repkv_block_topk.
 * One-token forms take qkv [(n_head + 2 n_head_kv) * head_dim] and rope [2, rope_dim] = tables (cosines, sines) for the
 * true position and for the far distance. */
#ifndef REPKV_MEMORY_OPS_H
#define REPKV_MEMORY_OPS_H

#include "ops.h"

/* src: packed qkv, k_store, v_store, rope [rope_dim] for the far distance, regions -> queries rotated by it and scaled, packed.
 * Side effect: keys before RoPE and values are written to the store, as far as it has rows. */
void repkv_store_far(struct ggml_tensor *dst, int ith, int nth, void *userdata);

/* src: packed local queries, k_local, v_local, packed far queries, k_store, v_store, selected, places, regions
 * -> heads, packed [n_panels, n_head * head_dim, PANEL]. */
void repkv_attend_memory(struct ggml_tensor *dst, int ith, int nth, void *userdata);

/* src: qkv, k_local, v_local, k_store, v_store, rope, selected, places, regions
 * -> partial sums as of repkv_attend [n_threads, n_head, 2 + head_dim].
 * Side effect: the new key and value are written to both arenas. */
void repkv_attend_memory_one(struct ggml_tensor *dst, int ith, int nth, void *userdata);

/* Not a graph op. Rotates the n_heads heads of n_rows rows in place; table [n_rows, rope_dim]: cosines, then sines, of each row. */
void repkv_rotate_rows(char *rows, int type, size_t row_bytes, int64_t n_rows, int n_heads, int head_dim, const float *table,
                       int rope_dim, float *scratch);

#endif

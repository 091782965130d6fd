/* Representative scores: how strongly later queries ask for each recent key. See ops.h and regions.h for common rules.
 *
 * score [n_positions, n_head_kv]. One-token forms take qkv [(n_head + 2 n_head_kv) * head_dim] and rope [2, rope_dim], of
 * which the first table is that of the true position. */
#ifndef REPKV_SCORE_OPS_H
#define REPKV_SCORE_OPS_H

#include "ops.h"

/* src: packed queries of store_kv, k_local, score, regions -> marker [1].
 * Side effect: score[m] += 1/n_score * sum over this step's queries at m+1 .. m+n_score, summed over the heads that share a
 * key head, of q . k_m (both rotated; the queries' scale is taken out). */
void repkv_score_acc(struct ggml_tensor *dst, int ith, int nth, void *userdata);

/* The same for one token. src: qkv, k_local, score, rope, regions. */
void repkv_score_acc_one(struct ggml_tensor *dst, int ith, int nth, void *userdata);

/* Sources as of repkv_score_acc. Side effect: score[m] += sum over this step's queries and the heads that share a key head
 * of the probability that a softmax over a query's own key and the n_score before it (in the window) gives to key m. */
void repkv_score_attention(struct ggml_tensor *dst, int ith, int nth, void *userdata);

/* The same for one token, which is in its own window but not yet in k_local. src: qkv, k_local, score, rope, regions. */
void repkv_score_attention_one(struct ggml_tensor *dst, int ith, int nth, void *userdata);

/* Bytes of scratch per thread for one token; for a chunk these ops need less than attention does. */
size_t repkv_score_scratch(int n_head, int n_head_kv, int head_dim);

#endif

/* One token through one layer in five nodes.
 *
 * In decode, nodes and barriers cost more than reading the weights of a small model, so these custom ops fuse some twenty of
 * ggml's nodes. Every thread repeats the cheap parts (norm, quantising the input row) and computes its own share of the rows,
 * so an op needs no barrier. The dot products are ggml's own (type traits), so each row equals ggml's; only norms, softmax and
 * silu round differently. */
#ifndef REPKV_DECODE_OPS_H
#define REPKV_DECODE_OPS_H

#include "ops.h"

/* Bytes of scratch per thread. */
size_t repkv_decode_scratch(int n_embd, int n_ff, int n_head, int n_head_kv, int head_dim);

#endif

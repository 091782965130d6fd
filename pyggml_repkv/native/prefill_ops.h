/* Many tokens through one layer in seven nodes, in a layout where tokens are the vector lanes.
 *
 * Packed layout: PANEL tokens lie side by side, [n_panels, n_features, PANEL], padded with zeros to a whole panel. Every step
 * then multiplies a vector of tokens by one broadcast weight, key or value: without horizontal sums or transposes, and norms,
 * RoPE, softmax and masks work lane by lane. Weights are converted to F32 a few rows at a time, in cache, for all tokens of
 * the chunk. Activations are not quantised, so results are closer to the model than with ggml's 8-bit activations. */
#ifndef REPKV_PREFILL_OPS_H
#define REPKV_PREFILL_OPS_H

#include "ops.h"

#include "packed.h"

/* Bytes of scratch per thread; group: query heads that share a key head. */
size_t repkv_prefill_scratch(int group, int n_head_kv, int head_dim);

#endif

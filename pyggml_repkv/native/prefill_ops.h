/* Many tokens through one layer in seven nodes, in a layout where tokens are the vector lanes.
 *
 * Packed layout: PANEL tokens lie side by side, [n_panels, n_features, PANEL], padded with zeros to a whole panel. Then
 * every step is a broadcast of one weight, key or value times a vector of tokens: no horizontal sums, no transposes, and
 * norms, RoPE, softmax and masks work lane by lane. Weights are converted to F32 a few rows at a time, in cache, and serve
 * all tokens of the chunk; activations are not quantised, so results are closer to the model's than ggml's 8-bit ones.
 * See ops.h for the rules that all ops share. */
#ifndef REPKV_PREFILL_OPS_H
#define REPKV_PREFILL_OPS_H

#include "ops.h"

#include "packed.h"

/* src: x [T, n] -> packed [n_panels, n, PANEL]. */
void repkv_pack(struct ggml_tensor *dst, int ith, int nth, void *userdata);

/* src: packed x, norm [n] -> rms_norm(x) * norm, packed. */
void repkv_norm_packed(struct ggml_tensor *dst, int ith, int nth, void *userdata);

/* src: packed x, n_matrices weights, n_biases biases -> the products one after another, packed [n_panels, sum of rows, PANEL]. */
void repkv_matmul(struct ggml_tensor *dst, int ith, int nth, void *userdata);

/* src: packed x, weight, packed residual -> weight @ x + residual, packed. */
void repkv_matmul_add(struct ggml_tensor *dst, int ith, int nth, void *userdata);

/* src: packed x, gate, up -> silu(gate @ x) * (up @ x), packed. */
void repkv_matmul_gate_up(struct ggml_tensor *dst, int ith, int nth, void *userdata);

/* src: packed qkv [n_panels, (n_head + 2 n_head_kv) * head_dim, PANEL], k_arena and v_arena [n_cells, n_head_kv * head_dim],
 * rope [n_panels, rope_dim, PANEL] (cosines, then sines), cells I32 [2] = (first cell to write, number of tokens)
 * -> rotated and scaled queries, packed [n_panels, n_head * head_dim, PANEL].
 * Side effect: rotated keys and values are written to the arenas from the first cell on. */
void repkv_store_kv(struct ggml_tensor *dst, int ith, int nth, void *userdata);

/* src: queries of repkv_store_kv, k_arena, v_arena, cells as above -> packed [n_panels, n_head * head_dim, PANEL].
 * Token t attends the cells [0, first + t]; the arenas must hold them, which taking store_kv's result as a source ensures. */
void repkv_attend_chunk(struct ggml_tensor *dst, int ith, int nth, void *userdata);

/* Bytes of scratch per thread. */
size_t repkv_prefill_scratch(int n_head, int head_dim);

#endif

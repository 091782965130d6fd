/* One token through one layer in five nodes.
 *
 * In decode, nodes and barriers cost more than reading the weights of a small model, so these custom ops fuse what ggml
 * computes in some twenty nodes. Every thread repeats the cheap parts (norm, quantising the input row) and computes its own
 * share of the rows, so no barrier is needed inside an op. The dot products are ggml's own (type traits), so each row equals
 * ggml's; only norms, softmax and silu round differently.
 * See ops.h for the rules that all ops share. */
#ifndef REPKV_DECODE_OPS_H
#define REPKV_DECODE_OPS_H

#include "ops.h"

/* src: x [n_in], norm [n_in], n_matrices weights, n_biases biases [n_rows] -> the products one after another [sum of n_rows]. */
void repkv_norm_linear(struct ggml_tensor *dst, int ith, int nth, void *userdata);

/* src: qkv [(n_head + 2 n_head_kv) * head_dim], k_arena and v_arena [n_cells, n_head_kv * head_dim] (F16, BF16, F32, Q8_0),
 * rope [2, rope_dim / 2] (cosines, sines), cells I32 [2] = (cell to write, number of cells before it that are attended)
 * -> partial softmax sums [n_threads, n_head, 2 + head_dim] = (maximum, sum, weighted values).
 * Side effect: the new key (rotated) and value are written to the arenas at the cell. Attends cells [0, n) and the new token. */
void repkv_attend(struct ggml_tensor *dst, int ith, int nth, void *userdata);

/* src: partial sums of repkv_attend, weight, residual [n_rows] -> weight @ merged heads + residual [n_rows]. */
void repkv_attn_out(struct ggml_tensor *dst, int ith, int nth, void *userdata);

/* src: x [n_in], norm [n_in], gate, up -> silu(gate @ norm(x)) * (up @ norm(x)) [n_rows]. */
void repkv_gate_up(struct ggml_tensor *dst, int ith, int nth, void *userdata);

/* src: x [n_in], weight, residual [n_rows] -> weight @ x + residual [n_rows]. */
void repkv_linear_add(struct ggml_tensor *dst, int ith, int nth, void *userdata);

/* Bytes of scratch per thread. */
size_t repkv_decode_scratch(int n_embd, int n_ff, int n_head, int n_head_kv, int head_dim);

#endif

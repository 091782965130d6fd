/* One token through one layer in five nodes.
 *
 * In decode, nodes and barriers cost more than reading the weights of a small model, so these custom ops fuse what ggml
 * computes in some twenty nodes. Every thread repeats the cheap parts (norm, quantising the input row) and computes its own
 * share of the rows, so no barrier is needed inside an op. The dot products are ggml's own (type traits), so each row equals
 * ggml's; only norms, softmax and silu round differently.
 *
 * Common rules: called by all `nth` threads; tensors are contiguous; F32 unless said; weights are [n_rows, n_in] of any type
 * with a vec_dot; `userdata` is a struct repkv_op_params that outlives the graph, with scratch for n_threads >= nth threads,
 * 64-byte aligned, of repkv_scratch_size() bytes each. Shapes are in numpy order. */
#ifndef REPKV_DECODE_OPS_H
#define REPKV_DECODE_OPS_H

#include "ggml_api.h"

struct repkv_op_params {
    float eps;          /* RMS norm */
    float scale;        /* of attention scores: 1 / sqrt(head_dim) */
    int32_t n_matrices; /* norm_linear: how many weights follow the norm */
    int32_t n_biases;   /* norm_linear: 0 or n_matrices */
    int32_t n_head;
    int32_t n_head_kv;
    int32_t head_dim;
    int32_t rope_dim;
    int32_t n_threads;
    char *scratch;
    size_t scratch_stride;
};

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

enum repkv_op { REPKV_NORM_LINEAR, REPKV_ATTEND, REPKV_ATTN_OUT, REPKV_GATE_UP, REPKV_LINEAR_ADD, REPKV_N_OPS };

/* The address of an op, for ggml_custom_4d; NULL for an unknown one. */
void *repkv_op_address(enum repkv_op op);

/* Bytes of scratch per thread that the ops need for a model of these sizes. */
size_t repkv_scratch_size(int n_embd, int n_ff, int n_head, int head_dim);

#endif

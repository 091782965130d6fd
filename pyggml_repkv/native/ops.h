/* What all custom ops of the extension share: their parameters and how Python finds them.
 *
 * Common rules: every op is called by all `nth` threads of ggml and splits its work itself, without barriers; tensors are
 * contiguous and F32 unless said; weights are [n_rows, n_in] of any type with a vec_dot (decode) or to_float (prefill);
 * `userdata` is a struct repkv_op_params that outlives the graph, with scratch for n_threads >= nth threads, 64-byte
 * aligned, of repkv_scratch_size() bytes each. Shapes are in numpy order. Python has checked all sizes. */
#ifndef REPKV_OPS_H
#define REPKV_OPS_H

#include "ggml_api.h"

struct repkv_op_params {
    float eps;          /* RMS norm */
    float scale;        /* of attention scores: 1 / sqrt(head_dim) */
    int32_t n_matrices; /* norm_linear, matmul: how many weights */
    int32_t n_biases;   /* norm_linear, matmul: 0 or n_matrices */
    int32_t n_head;
    int32_t n_head_kv;
    int32_t head_dim;
    int32_t rope_dim;
    float sticky;  /* block_topk: advantage of a block that the last token selected, in nats */
    int32_t late;  /* block_topk: what is attended is what the last token selected */
    int32_t n_score; /* score_acc: how many later queries score a key */
    int32_t n_repr;  /* relevance: representatives per block and key head */
    int32_t n_top;   /* block_topk, attend_memory: most blocks that can be selected */
    int32_t relevance; /* relevance, block_topk: enum repkv_relevance_kind */
    int32_t per_head;  /* block_topk, attend_memory: whether every key head selects its own blocks */
    int32_t n_threads;
    char *scratch;
    size_t scratch_stride;
    void *traced;             /* repkv_traced_op: the op that it runs */
    int64_t begin_ns, end_ns; /* repkv_traced_op: when the first thread last ran it, CLOCK_MONOTONIC */
};

enum repkv_op {
    REPKV_NORM_LINEAR,
    REPKV_ATTEND,
    REPKV_ATTN_OUT,
    REPKV_GATE_UP,
    REPKV_LINEAR_ADD,
    REPKV_PACK,
    REPKV_NORM_PACKED,
    REPKV_MATMUL,
    REPKV_MATMUL_ADD,
    REPKV_MATMUL_GATE_UP,
    REPKV_STORE_KV,
    REPKV_ATTEND_CHUNK,
    REPKV_STORE_FAR,
    REPKV_SCORE_ACC,
    REPKV_SCORE_ACC_ONE,
    REPKV_SCORE_ATTENTION,
    REPKV_SCORE_ATTENTION_ONE,
    REPKV_RELEVANCE,
    REPKV_RELEVANCE_ONE,
    REPKV_BLOCK_TOPK,
    REPKV_ATTEND_MEMORY,
    REPKV_ATTEND_MEMORY_ONE,
    REPKV_PEAK_READ,
    REPKV_PEAK_FMA,
    REPKV_N_OPS
};

/* The address of an op, for ggml_custom_4d; NULL for an unknown one. */
void *repkv_op_address(enum repkv_op op);

/* Any op, with a note of when it ran; `traced` of its parameters says which. Costs two looks at the clock. */
void repkv_traced_op(struct ggml_tensor *dst, int ith, int nth, void *userdata);
void *repkv_traced_op_address(void);

/* Bytes of scratch per thread that the ops need for a model of these sizes. */
size_t repkv_scratch_size(int n_embd, int n_ff, int n_head, int n_head_kv, int head_dim);

/* Tokens that lie side by side in the packed layout of the prefill ops (see prefill_ops.h). */
int repkv_panel(void);

/* 1 if the prefill ops were compiled for vectors wide enough to outrun ggml's own multiplication. */
int repkv_has_fast_prefill(void);

static inline char *repkv_thread_scratch(const struct repkv_op_params *p, int ith) {
    return p->scratch + (size_t)ith * p->scratch_stride;
}

#endif

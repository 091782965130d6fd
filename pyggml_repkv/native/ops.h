/* The table, parameters and sources of all custom ops.
 *
 * Rules for all ops: all `nth` threads of ggml call an op, which splits its work itself, without barriers; tensors are
 * contiguous, and F32 if nothing else is said; weights are [n_rows, n_in] of any type with a vec_dot (decode) or to_float
 * (prefill); `userdata` is a struct repkv_op_params that outlives the graph, with scratch for n_threads >= nth threads,
 * 64-byte aligned, of repkv_scratch_size() bytes each. Shapes are in numpy order. Python has checked all sizes. */
#ifndef REPKV_OPS_H
#define REPKV_OPS_H

#include "ggml_api.h"
#include "scratch.h"

struct repkv_compute;
struct repkv_key_centre;
struct repkv_order;

struct repkv_op_params {
    float eps;          /* RMS norm */
    float scale;        /* of attention scores: 1 / sqrt(head_dim) */
    int32_t n_matrices; /* norm_linear, matmul: how many weights */
    int32_t n_biases;   /* norm_linear, matmul: 0 or n_matrices */
    int32_t n_head;
    int32_t n_head_kv;
    int32_t head_dim;
    int32_t rope_dim;
    int32_t pairs; /* qk_norm: whether heads come with pairs side by side */
    float sticky;  /* block_topk: advantage of a unit that the last token selected, in nats */
    int32_t late;  /* block_topk: whether the last token's selection is attended */
    int32_t n_score; /* score_acc: how many later queries score a key */
    int32_t n_repr;  /* relevance: representatives per block and key head */
    int32_t n_top;   /* block_topk: most units that it can select */
    int32_t relevance; /* relevance, block_topk: enum repkv_relevance_kind */
    int32_t n_rows;    /* block_topk, scan_tokens: selections that are made */
    int32_t n_lines;   /* block_topk: lines of relevance that are added up for each of them */
    int32_t n_padded;  /* block_topk, scan_tokens: numbers in a line */
    int32_t by_size;   /* block_topk: whether the weight of a token counts, not that of a unit */
    int32_t bits;      /* scan_tokens: of a code */
    int32_t group;     /* queries of a chunk that share a selection, a multiple of PANEL; 0: all of them */
    int32_t stride;    /* scan_tokens: every so manyth query is asked */
    int32_t n_threads;
    char *scratch;
    size_t scratch_stride;
    const struct repkv_compute *compute; /* of the backend that computes the node, see compute.h */
    const struct repkv_key_centre *centre; /* of the layer whose keys the node stores or reads, see keys.h; NULL: none */
    const struct repkv_order *order; /* attend_memory: see keys.h; NULL: older tokens are as the store has them */
    float sign; /* shift_keys */
    ggml_custom_op_t traced;  /* repkv_traced_op: the op that it runs */
    int64_t begin_ns, end_ns; /* repkv_traced_op: when the first thread last ran it, CLOCK_MONOTONIC */
};

/* How an op uses a source, other than to read it whole. */
enum repkv_source_use {
    REPKV_MAYBE = 1, /* may be missing, with all sources after it */
    REPKV_MANY = 2,
    REPKV_ROWS = 4, /* reads only some rows */
    REPKV_WRITES = 8, /* writes some rows */
};

struct repkv_op_source {
    const char *name;
    int32_t use; /* bits of enum repkv_source_use */
};

struct repkv_op_info {
    const char *name, *cost;
    ggml_custom_op_t function;
    struct repkv_op_source sources[GGML_MAX_SRC]; /* zeros after the last one */
};

/* Declares each repkv_NAME, and its sources by name: struct repkv_NAME_sources. */
#define OP(name, cost, sources)                                                                         \
    void repkv_##name(struct ggml_tensor *dst, int ith, int nth, void *userdata);                       \
    struct repkv_##name##_sources {                                                                     \
        sources                                                                                         \
    };                                                                                                  \
    _Static_assert(sizeof(struct repkv_##name##_sources) < GGML_MAX_SRC * sizeof(struct ggml_tensor *), \
                   "a custom op takes fewer than GGML_MAX_SRC sources");
#define IN(name) struct ggml_tensor *name;
#define MANY(name) IN(name[])
#define ROWS(name) IN(name)
#define OUT(name) IN(name)
#define INOUT(name) IN(name)
#define MAYBE(name) IN(name)
#define MAYBE_INOUT(name) IN(name)
#include "ops.def"

/* The sources of a node by name: SOURCES(dst, attend)->qkv is a struct ggml_tensor *, NULL for one that is missing. */
#define SOURCES(node, op) ((const struct repkv_##op##_sources *)(node)->src)

/* The table, for Python. */
#define OP(name, cost, sources) +1
enum {
    REPKV_N_OPS = 0
#include "ops.def"
};
extern const struct repkv_op_info repkv_ops[REPKV_N_OPS];

/* Runs the op `traced` of its parameters and notes when. Reads the clock twice. */
void repkv_traced_op(struct ggml_tensor *dst, int ith, int nth, void *userdata);

/* Returns the bytes of scratch that a thread needs for a model of these sizes. */
size_t repkv_scratch_size(int n_embd, int n_ff, int n_head, int n_head_kv, int head_dim);

/* Returns 1 if the prefill ops were compiled for vectors that make them faster than ggml's own multiplication. */
int repkv_has_fast_prefill(void);

/* Returns the n_bytes of scratch that thread ith may take in one call. */
static inline struct repkv_scratch repkv_thread_scratch(const struct repkv_op_params *p, int ith, size_t n_bytes) {
    return repkv_scratch_begin(p->scratch + (size_t)ith * p->scratch_stride, p->scratch_stride, n_bytes);
}

#endif

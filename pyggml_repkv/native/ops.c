#include "ops.h"

#include <string.h>
#include <time.h>

#include "decode_ops.h"
#include "memory_ops.h"
#include "peak_ops.h"
#include "prefill_ops.h"
#include "score_ops.h"
#include "select_ops.h"
#include "simd.h"

void *repkv_op_address(enum repkv_op op) {
    static const ggml_custom_op_t ops[REPKV_N_OPS] = {
        [REPKV_NORM_LINEAR] = repkv_norm_linear,
        [REPKV_ATTEND] = repkv_attend,
        [REPKV_ATTN_OUT] = repkv_attn_out,
        [REPKV_GATE_UP] = repkv_gate_up,
        [REPKV_LINEAR_ADD] = repkv_linear_add,
        [REPKV_PACK] = repkv_pack,
        [REPKV_NORM_PACKED] = repkv_norm_packed,
        [REPKV_MATMUL] = repkv_matmul,
        [REPKV_MATMUL_ADD] = repkv_matmul_add,
        [REPKV_MATMUL_GATE_UP] = repkv_matmul_gate_up,
        [REPKV_STORE_KV] = repkv_store_kv,
        [REPKV_ATTEND_CHUNK] = repkv_attend_chunk,
        [REPKV_STORE_FAR] = repkv_store_far,
        [REPKV_SCORE_ACC] = repkv_score_acc,
        [REPKV_SCORE_ACC_ONE] = repkv_score_acc_one,
        [REPKV_SCORE_ATTENTION] = repkv_score_attention,
        [REPKV_SCORE_ATTENTION_ONE] = repkv_score_attention_one,
        [REPKV_RELEVANCE] = repkv_relevance,
        [REPKV_RELEVANCE_ONE] = repkv_relevance_one,
        [REPKV_BLOCK_TOPK] = repkv_block_topk,
        [REPKV_ATTEND_MEMORY] = repkv_attend_memory,
        [REPKV_ATTEND_MEMORY_ONE] = repkv_attend_memory_one,
        [REPKV_PEAK_READ] = repkv_peak_read,
        [REPKV_PEAK_FMA] = repkv_peak_fma,
    };
    void *address = NULL;
    if (op < REPKV_N_OPS) memcpy(&address, &ops[op], sizeof address);
    return address;
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

void repkv_traced_op(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
    struct repkv_op_params *p = userdata;
    ggml_custom_op_t op;
    memcpy(&op, &p->traced, sizeof op);
    if (ith == 0) p->begin_ns = now_ns();
    op(dst, ith, nth, userdata);
    if (ith == 0) p->end_ns = now_ns();
}

void *repkv_traced_op_address(void) {
    const ggml_custom_op_t op = repkv_traced_op;
    void *address = NULL;
    memcpy(&address, &op, sizeof address);
    return address;
}

size_t repkv_scratch_size(int n_embd, int n_ff, int n_head, int n_head_kv, int head_dim) {
    const size_t decode = repkv_decode_scratch(n_embd, n_ff, n_head, n_head_kv, head_dim);
    const size_t prefill = repkv_prefill_scratch(n_head, head_dim);
    const size_t select = repkv_select_scratch(n_head, head_dim);
    const size_t score = repkv_score_scratch(n_head, n_head_kv, head_dim);
    size_t most = decode > prefill ? decode : prefill;
    most = most > select ? most : select;
    return most > score ? most : score;
}

int repkv_panel(void) {
    return PANEL;
}

int repkv_has_fast_prefill(void) {
#if defined(__AVX512F__) || defined(REPKV_HALVES)
    return 1;
#else
    return 0;
#endif
}

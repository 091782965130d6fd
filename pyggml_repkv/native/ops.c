#include "ops.h"

#include <time.h>

#include "decode_ops.h"
#include "prefill_ops.h"
#include "scan_ops.h"
#include "score_ops.h"
#include "select_ops.h"
#include "simd.h"

#define OP(name, cost, sources) {#name, #cost, repkv_##name, {sources}},
#define IN(name) {#name, 0},
#define MANY(name) {#name, REPKV_MANY},
#define ROWS(name) {#name, REPKV_ROWS},
#define OUT(name) {#name, REPKV_WRITES},
#define INOUT(name) {#name, REPKV_ROWS | REPKV_WRITES},
#define MAYBE(name) {#name, REPKV_MAYBE},
#define MAYBE_INOUT(name) {#name, REPKV_MAYBE | REPKV_ROWS | REPKV_WRITES},
const struct repkv_op_info repkv_ops[REPKV_N_OPS] = {
#include "ops.def"
};

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

void repkv_traced_op(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
    struct repkv_op_params *p = userdata;
    if (ith == 0) p->begin_ns = now_ns();
    p->traced(dst, ith, nth, userdata);
    if (ith == 0) p->end_ns = now_ns();
}

size_t repkv_scratch_size(int n_embd, int n_ff, int n_head, int n_head_kv, int head_dim) {
    const size_t decode = repkv_decode_scratch(n_embd, n_ff, n_head, n_head_kv, head_dim);
    const size_t prefill = repkv_prefill_scratch(n_head / n_head_kv, n_head_kv, head_dim);
    const size_t select = repkv_select_scratch(n_head, head_dim);
    const size_t score = repkv_score_scratch(n_head / n_head_kv, n_head_kv, head_dim);
    size_t most = decode > prefill ? decode : prefill;
    const size_t scan = repkv_scan_scratch(n_head, n_head_kv, head_dim);
    most = most > select ? most : select;
    most = most > scan ? most : scan;
    return most > score ? most : score;
}

int repkv_has_fast_prefill(void) {
#if defined(__AVX512F__) || defined(REPKV_HALVES)
    return 1;
#else
    return 0;
#endif
}

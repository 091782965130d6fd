#include "node_trace.h"

#include <string.h>
#include <time.h>

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Such a node is left to the one that follows: each range that ggml computes by itself costs some microseconds. */
static bool computes_nothing(const struct ggml_tensor *node) {
    switch (node->op) {
        case GGML_OP_NONE:
        case GGML_OP_RESHAPE:
        case GGML_OP_VIEW:
        case GGML_OP_PERMUTE:
        case GGML_OP_TRANSPOSE:
            return true;
        default:
            return false;
    }
}

bool repkv_node_trace_hook(struct ggml_tensor *node, bool ask, void *data) {
    struct repkv_node_trace *trace = data;
    if (ask && computes_nothing(node)) {
        if (trace->n < trace->n_max) trace->times[trace->n].begin_ns = trace->times[trace->n].end_ns = now_ns();
        trace->n++;
        return false;
    }
    if (ask) {
        if (trace->hooks != NULL) repkv_eval_hook(node, true, trace->hooks);
        if (trace->n < trace->n_max) trace->times[trace->n].begin_ns = now_ns();
        return true;
    }
    if (trace->n < trace->n_max) trace->times[trace->n].end_ns = now_ns();
    trace->n++;
    return trace->hooks == NULL || repkv_eval_hook(node, false, trace->hooks);
}

void *repkv_node_trace_hook_address(void) {
    ggml_backend_sched_eval_callback callback = repkv_node_trace_hook;
    void *address = NULL;
    memcpy(&address, &callback, sizeof address);
    return address;
}

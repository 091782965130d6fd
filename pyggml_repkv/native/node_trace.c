#include "node_trace.h"

#include <string.h>
#include <time.h>

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

void repkv_node_trace_begin(struct repkv_node_trace *trace) {
    trace->n = 0;
    trace->resumed_ns = now_ns();
}

void repkv_node_trace_end(struct repkv_node_trace *trace) {
    int64_t now = now_ns();
    if (trace->n < trace->n_max) trace->times[trace->n] = (struct repkv_node_time){trace->resumed_ns, now};
    trace->n++;
    trace->resumed_ns = now;
}

bool repkv_node_trace_hook(struct ggml_tensor *node, bool ask, void *data) {
    struct repkv_node_trace *trace = data;
    bool answer = repkv_eval_hook(node, ask, trace->hooks);
    trace->resumed_ns = now_ns();
    return answer;
}

void *repkv_node_trace_hook_address(void) {
    ggml_backend_sched_eval_callback callback = repkv_node_trace_hook;
    void *address = NULL;
    memcpy(&address, &callback, sizeof address);
    return address;
}

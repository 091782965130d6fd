/* Notes when each of ggml's nodes ran. ggml's first thread notes it where it asks whether to abort: after each node, before it
 * waits for the other threads. Nothing else of the compute changes, so the cost is next to nothing. */
#ifndef REPKV_NODE_TRACE_H
#define REPKV_NODE_TRACE_H

#include "hooks.h"

struct repkv_node_time {
    int64_t begin_ns, end_ns; /* CLOCK_MONOTONIC */
};

struct repkv_node_trace {
    struct repkv_hooks *hooks; /* for repkv_node_trace_hook; NULL: none */
    struct repkv_node_time *times; /* [n_max], in the order of compute; ggml skips views and fuses some pairs */
    int32_t n_max;
    int32_t n; /* nodes since the compute began; those beyond n_max are not noted */
    int64_t resumed_ns; /* when the running node began */
};

void repkv_node_trace_begin(struct repkv_node_trace *trace);

/* Notes that a node has ended and the next begins. */
void repkv_node_trace_end(struct repkv_node_trace *trace);

/* A ggml_backend_sched_eval_callback with a struct repkv_node_trace: runs repkv_eval_hook, whose time counts to no node. */
bool repkv_node_trace_hook(struct ggml_tensor *node, bool ask, void *trace);

/* Returns its address, for ggml_backend_sched_set_eval_callback. */
void *repkv_node_trace_hook_address(void);

#endif

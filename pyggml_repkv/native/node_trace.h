/* When each of ggml's nodes was computed, noted by ggml's first thread where it asks whether to abort: after each node,
 * before it waits for the other threads. Nothing else of the compute changes, so that noting costs next to nothing. */
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
    int32_t n; /* since the compute began; those beyond n_max are not noted */
    int64_t resumed_ns; /* when the node that is running began */
};

void repkv_node_trace_begin(struct repkv_node_trace *trace);

/* A node was computed; the next begins. */
void repkv_node_trace_end(struct repkv_node_trace *trace);

/* A ggml_backend_sched_eval_callback with a struct repkv_node_trace: repkv_eval_hook, whose time is no node's. */
bool repkv_node_trace_hook(struct ggml_tensor *node, bool ask, void *trace);

/* Its address, for ggml_backend_sched_set_eval_callback. */
void *repkv_node_trace_hook_address(void);

#endif

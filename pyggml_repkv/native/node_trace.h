/* When each node of a graph was computed: an eval callback of ggml's scheduler that observes all of them.
 *
 * What must run between nodes anyway (hooks.h) runs as it would without it, after the node's end was noted. */
#ifndef REPKV_NODE_TRACE_H
#define REPKV_NODE_TRACE_H

#include "hooks.h"

struct repkv_node_time {
    int64_t begin_ns, end_ns; /* CLOCK_MONOTONIC */
};

struct repkv_node_trace {
    struct repkv_hooks *hooks; /* NULL: none */
    struct repkv_node_time *times; /* [n_max], in the order of compute */
    int32_t n_max;
    int32_t n; /* nodes computed since it was set to 0; those beyond n_max are not noted */
};

/* A ggml_backend_sched_eval_callback with a struct repkv_node_trace. */
bool repkv_node_trace_hook(struct ggml_tensor *node, bool ask, void *trace);

/* Its address, for ggml_backend_sched_set_eval_callback. */
void *repkv_node_trace_hook_address(void);

#endif

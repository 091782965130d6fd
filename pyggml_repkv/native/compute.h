/* Graph compute that Ctrl-C can stop, and that each caller can stop for itself. */
#ifndef REPKV_COMPUTE_H
#define REPKV_COMPUTE_H

#include <stdatomic.h>
#include <stdbool.h>

#include "node_trace.h"

/* The compute of one backend, which computes one graph at a time. It begins as zeros. */
struct repkv_compute {
    atomic_bool abort_requested;
    bool interrupted; /* SIGINT or SIGTERM came during the last compute */
    unsigned n_interrupts_before;
    struct repkv_node_trace *trace;
};

/* Runs ggml_backend_graph_compute on a CPU backend and returns its status (0 ok, 1 aborted, < 0 failed).
 * SIGINT stops it after the running node and calls the previous handler too, so that Python raises KeyboardInterrupt when the
 * call returns. Several threads may compute at once, each with its own backend and struct repkv_compute: SIGINT stops them
 * all, a request to abort stops only one.
 * trace: notes when ggml's nodes ran, or NULL. */
int repkv_compute(struct repkv_compute *compute, void *backend, void *graph, struct repkv_node_trace *trace);

/* As repkv_compute, through ggml's scheduler, whose eval callback runs between nodes. A callback that cancels must request an
 * abort. */
int repkv_compute_scheduled(struct repkv_compute *compute, void *backend, void *scheduler, void *graph,
                            struct repkv_node_trace *trace);

/* Returns true while a running compute must stop: long ops ask between blocks and return early; nobody reads their result.
 * False for NULL. */
bool repkv_abort_requested(const struct repkv_compute *compute);

/* Returns true if SIGINT or SIGTERM came during the last compute. */
bool repkv_was_interrupted(const struct repkv_compute *compute);

/* Stops the running compute, if any. Any thread may call it. */
void repkv_request_abort(struct repkv_compute *compute);

#endif

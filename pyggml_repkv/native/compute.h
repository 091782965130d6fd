/* Graph compute that Ctrl-C can stop, and each caller its own. */
#ifndef REPKV_COMPUTE_H
#define REPKV_COMPUTE_H

#include <stdatomic.h>
#include <stdbool.h>

#include "node_trace.h"

/* The compute of one backend, which runs one at a time; begins as zeros. */
struct repkv_compute {
    atomic_bool abort_requested;
    bool interrupted; /* SIGINT came while the last one ran */
    unsigned n_interrupts_before;
    struct repkv_node_trace *trace;
};

/* Runs ggml_backend_graph_compute on a CPU backend and returns its status (0 ok, 1 aborted, < 0 failed).
 * While it runs, SIGINT stops it after the node that ggml is at; the handler that was installed before is called as well, so
 * Python raises KeyboardInterrupt once the call returns. Several threads may compute at once, each with a backend and a
 * struct repkv_compute of its own: SIGINT stops them all, a request to abort only the one.
 * trace: where ggml's nodes are noted, or NULL. */
int repkv_compute(struct repkv_compute *compute, void *backend, void *graph, struct repkv_node_trace *trace);

/* The same through ggml's scheduler, whose eval callback runs between nodes. One that cancels must request an abort. */
int repkv_compute_scheduled(struct repkv_compute *compute, void *backend, void *scheduler, void *graph,
                            struct repkv_node_trace *trace);

/* True while a running compute is to stop: long ops ask it between blocks and return early, their result unread. False for
 * NULL. */
bool repkv_abort_requested(const struct repkv_compute *compute);

/* True if SIGINT came while the last compute ran. */
bool repkv_was_interrupted(const struct repkv_compute *compute);

/* Stops the compute that is running, if one is. Safe from any thread. */
void repkv_request_abort(struct repkv_compute *compute);

#endif

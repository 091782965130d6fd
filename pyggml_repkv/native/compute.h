/* Graph compute that Ctrl-C can stop. */
#ifndef REPKV_COMPUTE_H
#define REPKV_COMPUTE_H

#include <stdbool.h>

#include "node_trace.h"

/* Runs ggml_backend_graph_compute on a CPU backend and returns its status (0 ok, 1 aborted, < 0 failed).
 * While it runs, SIGINT also sets an abort flag that ggml polls after every node; the handler that was installed before
 * is called as well, so Python raises KeyboardInterrupt once the call returns. Several threads may compute at once.
 * trace: where ggml's nodes are noted, or NULL. */
int repkv_compute(void *backend, void *graph, struct repkv_node_trace *trace);

/* The same through ggml's scheduler, whose eval callback runs between nodes. One that cancels must request an abort. */
int repkv_compute_scheduled(void *backend, void *scheduler, void *graph, struct repkv_node_trace *trace);

/* True while a running compute is to stop: long ops ask it between blocks and return early, their result unread. */
bool repkv_abort_requested(void);

/* True if it was SIGINT that stopped the last compute. */
bool repkv_was_interrupted(void);

/* Stops every compute that is running, as SIGINT would. Safe from any thread and from signal handlers. */
void repkv_request_abort(void);

#endif

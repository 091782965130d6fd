#define _POSIX_C_SOURCE 200809L
#include "compute.h"

#include <pthread.h>
#include <signal.h>

#include "ggml_api.h"

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int n_running;

/* Signals that end a process that does nothing about them. */
static const int signals[] = {SIGINT, SIGTERM};
enum { N_SIGNALS = 2 };
static bool installed[N_SIGNALS];
static struct sigaction previous[N_SIGNALS];

/* How many signals came during computes. Each compute compares it with its value at the start, so the handler needs no list
 * of computes, which might change under it. */
static atomic_uint n_interrupts;

static void on_signal(int signal_number, siginfo_t *info, void *context) {
    const struct sigaction *before = &previous[signal_number == signals[0] ? 0 : 1];
    /* The previous handler goes first: a compute may return as soon as the count rises, and Python must know of the signal. */
    if (before->sa_flags & SA_SIGINFO) {
        before->sa_sigaction(signal_number, info, context);
    } else {
        before->sa_handler(signal_number);
    }
    atomic_fetch_add(&n_interrupts, 1);
}

static bool interrupted(const struct repkv_compute *compute) {
    return atomic_load_explicit(&n_interrupts, memory_order_relaxed) != compute->n_interrupts_before;
}

bool repkv_abort_requested(const struct repkv_compute *compute) {
    if (compute == NULL) return false;
    return atomic_load_explicit(&compute->abort_requested, memory_order_relaxed) || interrupted(compute);
}

/* ggml's first thread calls it after each node. */
static bool should_abort(void *data) {
    const struct repkv_compute *compute = data;
    if (compute->trace != NULL) repkv_node_trace_end(compute->trace);
    return repkv_abort_requested(compute);
}

static void enter(void) {
    pthread_mutex_lock(&lock);
    for (int i = 0; n_running == 0 && i < N_SIGNALS; i++) {
        struct sigaction *before = &previous[i];
        sigaction(signals[i], NULL, before);
        /* Add to a real handler (Python's) only: the default action must still kill, and "ignore" must still ignore. */
        installed[i] = (before->sa_flags & SA_SIGINFO) || (before->sa_handler != SIG_DFL && before->sa_handler != SIG_IGN);
        if (installed[i]) {
            struct sigaction action = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_RESTART};
            sigemptyset(&action.sa_mask);
            sigaction(signals[i], &action, NULL);
        }
    }
    n_running++;
    pthread_mutex_unlock(&lock);
}

static void leave(void) {
    pthread_mutex_lock(&lock);
    n_running--;
    for (int i = 0; n_running == 0 && i < N_SIGNALS; i++) {
        if (installed[i]) sigaction(signals[i], &previous[i], NULL);
    }
    pthread_mutex_unlock(&lock);
}

static void begin(struct repkv_compute *compute, void *backend, struct repkv_node_trace *trace) {
    compute->trace = trace;
    compute->n_interrupts_before = atomic_load(&n_interrupts);
    atomic_store(&compute->abort_requested, false);
    enter();
    repkv_ggml.set_abort_callback(backend, should_abort, compute);
    if (trace != NULL) repkv_node_trace_begin(trace);
}

static int finish(struct repkv_compute *compute, int status) {
    /* Another thread may have returned early from the last node after ggml's first thread asked for the last time. */
    if (status == GGML_STATUS_SUCCESS && repkv_abort_requested(compute)) status = GGML_STATUS_ABORTED;
    compute->interrupted = interrupted(compute);
    leave();
    return status;
}

int repkv_compute(struct repkv_compute *compute, void *backend, void *graph, struct repkv_node_trace *trace) {
    begin(compute, backend, trace);
    return finish(compute, repkv_ggml.graph_compute(backend, graph));
}

int repkv_compute_scheduled(struct repkv_compute *compute, void *backend, void *scheduler, void *graph,
                            struct repkv_node_trace *trace) {
    begin(compute, backend, trace);
    return finish(compute, repkv_ggml.sched_graph_compute(scheduler, graph));
}

bool repkv_was_interrupted(const struct repkv_compute *compute) {
    return compute->interrupted;
}

void repkv_request_abort(struct repkv_compute *compute) {
    atomic_store(&compute->abort_requested, true);
}

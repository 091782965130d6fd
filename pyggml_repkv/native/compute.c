#define _POSIX_C_SOURCE 200809L
#include "compute.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>

#include "ggml_api.h"

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int n_running;
static bool installed;
static struct sigaction previous;
static atomic_bool abort_requested;
static atomic_bool interrupted;

static void on_sigint(int signal_number, siginfo_t *info, void *context) {
    /* The other handler first: compute may end as soon as the flag is set, and must then have been told of the signal. */
    if (previous.sa_flags & SA_SIGINFO) {
        previous.sa_sigaction(signal_number, info, context);
    } else {
        previous.sa_handler(signal_number);
    }
    atomic_store(&interrupted, true);
    atomic_store(&abort_requested, true);
}

bool repkv_abort_requested(void) {
    return atomic_load_explicit(&abort_requested, memory_order_relaxed);
}

/* Called by ggml's first thread, after each node. */
static bool should_abort(void *trace) {
    if (trace != NULL) repkv_node_trace_end(trace);
    return repkv_abort_requested();
}

static void enter(void) {
    pthread_mutex_lock(&lock);
    if (n_running++ == 0) {
        atomic_store(&abort_requested, false);
        atomic_store(&interrupted, false);
        sigaction(SIGINT, NULL, &previous);
        /* The default action kills and "ignore" ignores; only a real handler (Python's) wants company. */
        installed = (previous.sa_flags & SA_SIGINFO) || (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN);
        if (installed) {
            struct sigaction action = {.sa_sigaction = on_sigint, .sa_flags = SA_SIGINFO | SA_RESTART};
            sigemptyset(&action.sa_mask);
            sigaction(SIGINT, &action, NULL);
        }
    }
    pthread_mutex_unlock(&lock);
}

static void leave(void) {
    pthread_mutex_lock(&lock);
    if (--n_running == 0 && installed) {
        sigaction(SIGINT, &previous, NULL);
    }
    pthread_mutex_unlock(&lock);
}

static int finish(int status) {
    /* ggml's first thread may have polled for the last time before another returned early from the last node. */
    if (status == GGML_STATUS_SUCCESS && repkv_abort_requested()) status = GGML_STATUS_ABORTED;
    leave();
    return status;
}

static void begin(void *backend, struct repkv_node_trace *trace) {
    enter();
    repkv_ggml.set_abort_callback(backend, should_abort, trace);
    if (trace != NULL) repkv_node_trace_begin(trace);
}

int repkv_compute(void *backend, void *graph, struct repkv_node_trace *trace) {
    begin(backend, trace);
    return finish(repkv_ggml.graph_compute(backend, graph));
}

int repkv_compute_scheduled(void *backend, void *scheduler, void *graph, struct repkv_node_trace *trace) {
    begin(backend, trace);
    return finish(repkv_ggml.sched_graph_compute(scheduler, graph));
}

bool repkv_was_interrupted(void) {
    return atomic_load(&interrupted);
}

void repkv_request_abort(void) {
    atomic_store(&abort_requested, true);
}

/* The few ggml functions that the extension calls. Python passes their addresses at run time, from the library that
 * ggml-python has loaded: the extension links to nothing, so it works wherever ggml matches its headers. */
#ifndef REPKV_GGML_API_H
#define REPKV_GGML_API_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

struct repkv_ggml_api {
    void *get_type_traits_cpu; /* ggml_get_type_traits_cpu */
    void *get_type_traits;     /* ggml_get_type_traits */
    void *graph_compute;       /* ggml_backend_graph_compute */
    void *set_abort_callback;  /* ggml_backend_cpu_set_abort_callback */
    void *sched_graph_compute; /* ggml_backend_sched_graph_compute */
    void *log_set;             /* ggml_log_set */
};

struct repkv_ggml {
    const struct ggml_type_traits_cpu *(*get_type_traits_cpu)(enum ggml_type);
    const struct ggml_type_traits *(*get_type_traits)(enum ggml_type);
    enum ggml_status (*graph_compute)(ggml_backend_t, struct ggml_cgraph *);
    void (*set_abort_callback)(ggml_backend_t, ggml_abort_callback, void *);
    enum ggml_status (*sched_graph_compute)(ggml_backend_sched_t, struct ggml_cgraph *);
    void (*log_set)(ggml_log_callback, void *);
};

extern struct repkv_ggml repkv_ggml;

/* Takes the addresses and captures ggml's log from then on. Returns 0, or -1 if one is NULL. Call it once, first of all. */
int repkv_bind(const struct repkv_ggml_api *api);

/* Returns the last warning or error that ggml logged in this thread, or "". */
const char *repkv_last_log(void);
void repkv_clear_log(void);

#endif

#include "ggml_api.h"

#include <stdio.h>
#include <string.h>

struct repkv_ggml repkv_ggml;

static _Thread_local char last_log[512];

static void capture_log(enum ggml_log_level level, const char *text, void *user_data) {
    (void)user_data;
    if (level == GGML_LOG_LEVEL_WARN || level == GGML_LOG_LEVEL_ERROR) {
        snprintf(last_log, sizeof last_log, "%s", text);
        last_log[strcspn(last_log, "\r\n")] = '\0';
    }
}

int repkv_bind(const struct repkv_ggml_api *api) {
    if (!api->get_type_traits_cpu || !api->get_type_traits || !api->graph_compute || !api->set_abort_callback ||
        !api->sched_graph_compute || !api->log_set) {
        return -1;
    }
    /* memcpy because ISO C has no cast from object to function pointers. */
    memcpy(&repkv_ggml.get_type_traits_cpu, &api->get_type_traits_cpu, sizeof(void *));
    memcpy(&repkv_ggml.get_type_traits, &api->get_type_traits, sizeof(void *));
    memcpy(&repkv_ggml.graph_compute, &api->graph_compute, sizeof(void *));
    memcpy(&repkv_ggml.set_abort_callback, &api->set_abort_callback, sizeof(void *));
    memcpy(&repkv_ggml.sched_graph_compute, &api->sched_graph_compute, sizeof(void *));
    memcpy(&repkv_ggml.log_set, &api->log_set, sizeof(void *));
    repkv_ggml.log_set(capture_log, NULL);
    return 0;
}

const char *repkv_last_log(void) {
    return last_log;
}

void repkv_clear_log(void) {
    last_log[0] = '\0';
}

#include "block_store_private.h"

void store_record(struct repkv_store *s, struct repkv_event event) {
    if (s->n_events == s->max_events) return;
    event.end_ms = now_ms();
    s->events[s->n_events++] = event;
}

void repkv_store_get_stats(struct repkv_store *s, struct repkv_store_stats *stats) {
    pthread_mutex_lock(&s->lock);
    *stats = s->stats;
    if (s->n_reading > 0) stats->read_ms += now_ms() - s->reading_since;
    pthread_mutex_unlock(&s->lock);
}

int32_t repkv_store_trace(struct repkv_store *s, struct repkv_event *events, int32_t n) {
    pthread_mutex_lock(&s->lock);
    const int32_t n_recorded = s->n_events;
    s->events = events;
    s->max_events = events ? n : 0;
    s->n_events = 0;
    pthread_mutex_unlock(&s->lock);
    return n_recorded;
}

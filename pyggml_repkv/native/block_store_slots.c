#include "block_store_private.h"

#include <string.h>

#include "compute.h"

static void poison(struct repkv_store *s, int32_t layer, int32_t slot) {
    const struct repkv_record_layout *l = &s->config.layout;
    memset(rows_of_slot(s, s->k_rows, layer, slot, l->k_row_bytes), 0xff, (size_t)l->max_tokens * l->k_row_bytes);
    memset(rows_of_slot(s, s->v_rows, layer, slot, l->v_row_bytes), 0xff, (size_t)l->max_tokens * l->v_row_bytes);
}

static bool ask(struct repkv_store *s, struct queue *q, int32_t layer, int32_t block, double limit) {
    const int32_t slot = slots_take(s->layers + layer, block, limit);
    if (slot < 0) return false;
    if (s->config.debug) poison(s, layer, slot);
    queue_push(s, q, layer, slot);
    return true;
}

/* Queues reads of blocks; resident blocks that score less than `limit` give way. */
static void read_ahead(struct repkv_store *s, int32_t layer_index, const int32_t *blocks, int32_t n, double limit) {
    struct slots *layer = s->layers + layer_index;
    layer->n_prefetches++;
    for (int32_t i = 0; i < n; i++) {
        const int32_t slot = layer->slot_of[blocks[i]];
        if (slot >= 0) layer->slot[slot].kept = layer->n_prefetches;
    }
    int32_t n_asked = 0;
    for (int32_t i = 0; i < n; i++) {
        if (layer->slot_of[blocks[i]] >= 0) continue;
        if (!ask(s, &s->ahead, layer_index, blocks[i], limit)) break;
        struct slot *slot = layer->slot + layer->slot_of[blocks[i]];
        slot->score = SLOT_PREFETCH_SCORE * layer->weight;
        slot->kept = layer->n_prefetches;
        slot->ahead = true;
        n_asked++;
    }
    s->stats.issued += n_asked;
    if (n_asked > 1) pthread_cond_broadcast(&s->work);
    if (n_asked == 1) pthread_cond_signal(&s->work);
}

void repkv_store_prefetch(struct repkv_store *s, int32_t layer, const int32_t *blocks, int32_t n) {
    pthread_mutex_lock(&s->lock);
    read_ahead(s, layer, blocks, n, SLOT_PREFETCH_SCORE * s->layers[layer].weight);
    pthread_mutex_unlock(&s->lock);
}

void repkv_store_fetch(struct repkv_store *s, int32_t layer, const int32_t *blocks, int32_t n) {
    pthread_mutex_lock(&s->lock);
    read_ahead(s, layer, blocks, n, SLOT_ANY);
    pthread_mutex_unlock(&s->lock);
}

/* Drops reads that were queued ahead for a layer and that its requirement does not want. */
static void drop_stale(struct slots *layer) {
    for (int32_t i = 0; i < layer->n_used; i++) {
        struct slot *slot = layer->slot + i;
        if (slot->state == SLOT_QUEUED && slot->last != layer->now) slots_release(layer, i);
    }
}

static int32_t count_pending(const struct slots *layer, const int32_t *selected, int32_t n_rows, int64_t stride) {
    int32_t n = 0;
    for (int32_t r = 0; r < n_rows; r++) {
        const int32_t *row = selected + r * stride;
        for (int32_t i = 1; i <= row[0]; i++) {
            const int32_t slot = layer->slot_of[row[i]];
            n += slot < 0 || layer->slot[slot].state != SLOT_READY;
        }
    }
    return n;
}

/* Counts and raises the resident blocks, and queues the others; -1 if a slot must become free first. */
static int ask_for_all(struct repkv_store *s, int32_t layer_index, const int32_t *selected, int32_t n_rows, int64_t stride) {
    struct slots *layer = s->layers + layer_index;
    int32_t n_queued = 0;
    int status = 0;
    for (int pass = 0; pass < 2; pass++) {
        for (int32_t r = 0; r < n_rows && status == 0; r++) {
            const int32_t *row = selected + r * stride;
            for (int32_t i = 1; i <= row[0] && status == 0; i++) {
                const int32_t b = row[i];
                const int32_t at = layer->slot_of[b];
                if (pass == 0 && at < 0) continue;
                if (pass == 1 && at >= 0) continue;
                if (pass == 1) {
                    if (!ask(s, &s->required, layer_index, b, SLOT_REQUIRED)) {
                        status = -1;
                        break;
                    }
                    n_queued++;
                }
                struct slot *slot = layer->slot + layer->slot_of[b];
                if (slot->last == layer->now) continue; /* another head wants it too */
                s->stats.required++;
                if (pass == 1) s->stats.missed++;
                if (pass == 0 && slot->state == SLOT_READY) s->stats.hits++;
                if (pass == 0 && slot->state != SLOT_READY) s->stats.late++;
                if (pass == 0 && slot->state == SLOT_QUEUED) queue_push(s, &s->required, layer_index, layer->slot_of[b]);
                s->stats.used += slot->ahead;
                slot->ahead = false;
                /* A block read ahead counts as if it came now. */
                slot->score += layer->weight;
                slot->last = layer->now;
            }
        }
        if (pass == 0) drop_stale(layer);
    }
    if (n_queued > 0) pthread_cond_broadcast(&s->work);
    return status;
}

int repkv_store_require(struct repkv_store *s, int32_t layer_index, const int32_t *selected, int32_t n_rows, int64_t stride,
                        const struct repkv_compute *compute) {
    struct slots *layer = s->layers + layer_index;
    const struct worker *own = s->workers + s->config.n_threads;
    int status = 0;
    pthread_mutex_lock(&s->lock);
    s->requiring = layer_index;
    s->read_error = (struct repkv_store_error){0};
    slots_tick(layer);
    store_record(s, REPKV_EVENT_SELECTED, layer_index, -1, false, now_ms());
    int complete = ask_for_all(s, layer_index, selected, n_rows, stride);
    if (complete != 0 || count_pending(layer, selected, n_rows, stride) > 0) {
        const double start = now_ms();
        while (status == 0) {
            if (complete != 0) complete = ask_for_all(s, layer_index, selected, n_rows, stride);
            struct request r;
            if (s->read_error.kind != REPKV_IO_OK) status = -1;
            else if (repkv_abort_requested(compute)) status = -2;
            else if (complete == 0 && count_pending(layer, selected, n_rows, stride) == 0) break;
            else if (queue_pop(s, &s->required, &r)) store_serve(s, own, r);
            else store_wait(&s->done, &s->lock);
        }
        s->stats.wait_ms += now_ms() - start;
        store_record(s, REPKV_EVENT_WAIT, layer_index, -1, false, start);
    }
    s->requiring = -1;
    if (s->config.debug) {
        int32_t *audited = s->audited + (size_t)layer_index * (size_t)s->config.n_slots;
        for (int32_t i = 0; i < layer->n; i++) {
            const bool named = i < layer->n_used && layer->slot[i].state == SLOT_READY && layer->slot[i].last == layer->now;
            audited[i] = named ? layer->slot[i].block : -1;
        }
    }
    pthread_mutex_unlock(&s->lock);
    return status;
}

int repkv_store_audit(struct repkv_store *s, int32_t layer_index) {
    if (!s->config.debug) return 0;
    const struct slots *layer = s->layers + layer_index;
    const int32_t *audited = s->audited + (size_t)layer_index * (size_t)s->config.n_slots;
    int n_changed = 0;
    pthread_mutex_lock(&s->lock);
    for (int32_t i = 0; i < layer->n_used; i++) {
        if (audited[i] < 0) continue;
        const struct slot *slot = layer->slot + i;
        n_changed += slot->state != SLOT_READY || slot->block != audited[i];
    }
    pthread_mutex_unlock(&s->lock);
    return n_changed;
}

void repkv_store_unrotate(struct repkv_store *s, const float *table) {
    pthread_mutex_lock(&s->lock);
    /* With empty queues, no thread begins a read while this one waits. */
    s->required.n = s->ahead.n = 0;
    for (int32_t l = 0; l < s->config.layout.n_layer; l++) {
        struct slots *layer = s->layers + l;
        for (int32_t i = 0; i < layer->n_used; i++) {
            while (layer->slot[i].state == SLOT_READING) store_wait(&s->done, &s->lock);
            if (layer->slot[i].state != SLOT_FREE) slots_release(layer, i);
        }
    }
    s->unrotate = table;
    pthread_mutex_unlock(&s->lock);
}

void repkv_store_resident(struct repkv_store *s, int32_t layer_index, int32_t *blocks) {
    const struct slots *layer = s->layers + layer_index;
    pthread_mutex_lock(&s->lock);
    for (int32_t i = 0; i < layer->n; i++) {
        blocks[i] = i < layer->n_used && layer->slot[i].state == SLOT_READY ? layer->slot[i].block : -1;
    }
    pthread_mutex_unlock(&s->lock);
}

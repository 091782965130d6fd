#include "block_store_private.h"

#include <string.h>

#include "compute.h"

/* Rows of a selection, row r at selected + r * stride. */
struct lane_rows {
    const int32_t *selected;
    int32_t n;
    int64_t stride;
};

/* Returns those rows of a selection that are lane l's. */
static struct lane_rows rows_of_lane(const struct repkv_store *s, int32_t l, const int32_t *selected, int32_t n_rows,
                                     int64_t stride) {
    const int32_t n_lanes = s->config.layout.n_lanes;
    return (struct lane_rows){selected + l * stride, (n_rows - l + n_lanes - 1) / n_lanes, stride * n_lanes};
}

static void poison(struct repkv_store *s, int32_t lane, int32_t slot) {
    const struct repkv_record_layout *l = &s->config.layout;
    char *k = rows_of_slot(s, s->k_rows, lane, slot, l->k_row_bytes);
    char *v = rows_of_slot(s, s->v_rows, lane, slot, l->v_row_bytes);
    for (int32_t i = 0; i < l->max_unit_tokens; i++, k += l->k_row_bytes, v += l->v_row_bytes) {
        memset(k, 0xff, l->k_row_bytes / (size_t)l->n_lanes);
        memset(v, 0xff, l->v_row_bytes / (size_t)l->n_lanes);
    }
}

/* Queues the read of a unit; returns its slot, -1 if none may give way. */
static int32_t ask(struct repkv_store *s, struct queue *q, int32_t lane, int32_t unit, double limit) {
    const int32_t slot = slots_take(s->lanes + lane, unit, limit, &s->victims);
    if (slot < 0) return -1;
    if (s->config.debug) poison(s, lane, slot);
    queue_push(s, q, lane, slot);
    return slot;
}

/* Queues reads of a lane's units; resident ones that score less than `limit` give way. Returns how many. */
static int32_t read_lane_ahead(struct repkv_store *s, int32_t lane_index, struct lane_rows rows, double limit) {
    struct slots *lane = s->lanes + lane_index;
    int32_t n_asked = 0;
    lane->n_prefetches++;
    for (int32_t r = 0; r < rows.n; r++) {
        const int32_t *row = rows.selected + r * rows.stride;
        for (int32_t i = 1; i <= row[0]; i++) {
            const int32_t slot = slot_of(lane, row[i]);
            if (slot >= 0) lane->slot[slot].kept = lane->n_prefetches;
        }
    }
    s->victims.n = -1;
    for (int32_t r = 0; r < rows.n; r++) {
        const int32_t *row = rows.selected + r * rows.stride;
        for (int32_t i = 1; i <= row[0]; i++) {
            if (slot_of(lane, row[i]) >= 0) continue;
            const int32_t at = ask(s, &s->ahead, lane_index, row[i], limit);
            if (at < 0) return n_asked;
            lane->slot[at].score = SLOT_PREFETCH_SCORE * lane->weight;
            lane->slot[at].kept = lane->n_prefetches;
            lane->slot[at].ahead = true;
            n_asked++;
        }
    }
    return n_asked;
}

/* limit: as of slots_take, times the weight of each lane if that is `weighted`. */
static void read_ahead(struct repkv_store *s, int32_t layer, const int32_t *selected, int32_t n_rows, int64_t stride,
                       double limit, bool weighted) {
    const int32_t n_lanes = s->config.layout.n_lanes;
    int32_t n_asked = 0;
    pthread_mutex_lock(&s->lock);
    for (int32_t l = 0; l < n_lanes && l < n_rows; l++) {
        const int32_t lane = layer * n_lanes + l;
        n_asked += read_lane_ahead(s, lane, rows_of_lane(s, l, selected, n_rows, stride),
                                   weighted ? limit * s->lanes[lane].weight : limit);
    }
    s->stats.issued += n_asked;
    if (n_asked > 1) pthread_cond_broadcast(&s->work);
    if (n_asked == 1) pthread_cond_signal(&s->work);
    pthread_mutex_unlock(&s->lock);
}

void repkv_store_prefetch(struct repkv_store *s, int32_t layer, const int32_t *selected, int32_t n_rows, int64_t stride) {
    read_ahead(s, layer, selected, n_rows, stride, SLOT_PREFETCH_SCORE, true);
}

void repkv_store_fetch(struct repkv_store *s, int32_t layer, const int32_t *selected, int32_t n_rows, int64_t stride) {
    read_ahead(s, layer, selected, n_rows, stride, SLOT_ANY, false);
}

/* Drops reads that were queued ahead for a lane and that its requirement does not want. */
static void drop_stale(struct slots *lane) {
    for (int32_t i = 0; lane->n_queued > 0 && i < lane->n_used; i++) {
        const struct slot *slot = lane->slot + i;
        if (slot->state == SLOT_QUEUED && slot->last != lane->now) slots_release(lane, i);
    }
}

/* Takes note of a unit that is in a slot or on its way there; it is required for the first time. */
static void note_present(struct repkv_store *s, int32_t lane_index, int32_t at) {
    struct slots *lane = s->lanes + lane_index;
    struct slot *slot = lane->slot + at;
    s->stats.required++;
    if (slot->state == SLOT_READY) {
        s->stats.hits++;
    } else {
        s->stats.late++;
        s->n_missing++;
    }
    if (slot->state == SLOT_QUEUED) queue_push(s, &s->required, lane_index, at);
    s->stats.used += slot->ahead;
    slot->ahead = false;
    /* A unit read ahead counts as if it came now. */
    slot->score += lane->weight;
    slot->last = lane->now;
}

/* Counts and raises a lane's resident units, and queues the others; -1 if a slot must become free first. */
static int ask_for_lane(struct repkv_store *s, int32_t lane_index, struct lane_rows rows, int32_t *n_queued) {
    struct slots *lane = s->lanes + lane_index;
    bool complete = true;
    for (int32_t r = 0; r < rows.n; r++) {
        const int32_t *row = rows.selected + r * rows.stride;
        for (int32_t i = 1; i <= row[0]; i++) {
            const int32_t at = slot_of(lane, row[i]);
            if (at < 0) complete = false;
            else if (lane->slot[at].last != lane->now) note_present(s, lane_index, at);
        }
    }
    drop_stale(lane);
    s->victims.n = -1;
    for (int32_t r = 0; r < rows.n && !complete; r++) {
        const int32_t *row = rows.selected + r * rows.stride;
        for (int32_t i = 1; i <= row[0]; i++) {
            if (slot_of(lane, row[i]) >= 0) continue;
            const int32_t at = ask(s, &s->required, lane_index, row[i], SLOT_REQUIRED);
            if (at < 0) return -1;
            lane->slot[at].score = lane->weight;
            lane->slot[at].last = lane->now;
            s->stats.required++;
            s->stats.missed++;
            s->n_missing++;
            ++*n_queued;
        }
    }
    return 0;
}

static int ask_for_all(struct repkv_store *s, int32_t layer, const int32_t *selected, int32_t n_rows, int64_t stride) {
    const int32_t n_lanes = s->config.layout.n_lanes;
    int32_t n_queued = 0;
    int status = 0;
    for (int32_t l = 0; l < n_lanes && l < n_rows; l++) {
        if (ask_for_lane(s, layer * n_lanes + l, rows_of_lane(s, l, selected, n_rows, stride), &n_queued) != 0) status = -1;
    }
    if (n_queued > 0) pthread_cond_broadcast(&s->work);
    return status;
}

/* Whether a slot of a layer may still become free. */
static bool slots_will_come(const struct repkv_store *s, int32_t layer) {
    const int32_t n_lanes = s->config.layout.n_lanes;
    int32_t n = s->n_missing;
    for (int32_t i = layer * n_lanes; i < (layer + 1) * n_lanes; i++) n += s->lanes[i].n_reading;
    return n > 0;
}

/* Notes which slots attention reads from now on. */
static void note_attended(struct repkv_store *s, int32_t layer) {
    const int32_t n_lanes = s->config.layout.n_lanes;
    for (int32_t i = layer * n_lanes; i < (layer + 1) * n_lanes; i++) {
        const struct slots *lane = s->lanes + i;
        int32_t *audited = s->audited + (size_t)i * (size_t)s->config.n_slots;
        for (int32_t at = 0; at < lane->n; at++) {
            const struct slot *slot = lane->slot + at;
            audited[at] = at < lane->n_used && slot->state == SLOT_READY && slot->last == lane->now ? slot->unit : -1;
        }
    }
}

int repkv_store_require(struct repkv_store *s, int32_t layer, const int32_t *selected, int32_t n_rows, int64_t stride,
                        const struct repkv_compute *compute) {
    const int32_t n_lanes = s->config.layout.n_lanes;
    const struct worker *own = s->workers + s->config.n_threads;
    int status = 0;
    pthread_mutex_lock(&s->lock);
    s->requiring = layer;
    s->n_missing = 0;
    s->read_error = (struct repkv_store_error){0};
    for (int32_t l = 0; l < n_lanes; l++) slots_tick(s->lanes + layer * n_lanes + l);
    struct repkv_event event = {.kind = REPKV_EVENT_SELECTED, .layer = layer, .lane = -1, .block = -1, .begin_ms = now_ms()};
    store_record(s, event);
    int complete = ask_for_all(s, layer, selected, n_rows, stride);
    if (complete != 0 || s->n_missing > 0) {
        event.kind = REPKV_EVENT_WAIT;
        event.begin_ms = now_ms();
        while (status == 0) {
            if (complete != 0) complete = ask_for_all(s, layer, selected, n_rows, stride);
            if (complete != 0 && !slots_will_come(s, layer)) {
                s->read_error = (struct repkv_store_error){REPKV_IO_SLOTS, layer, -1, 0};
            }
            struct request r;
            if (s->read_error.kind != REPKV_IO_OK) status = -1;
            else if (repkv_abort_requested(compute)) status = -2;
            else if (complete == 0 && s->n_missing == 0) break;
            else if (queue_pop(s, &s->required, &r)) store_serve(s, own, r);
            else store_wait(&s->done, &s->lock);
        }
        s->stats.wait_ms += now_ms() - event.begin_ms;
        store_record(s, event);
    }
    s->requiring = -1;
    if (s->config.debug) note_attended(s, layer);
    pthread_mutex_unlock(&s->lock);
    return status;
}

int repkv_store_audit(struct repkv_store *s, int32_t layer) {
    if (!s->config.debug) return 0;
    const int32_t n_lanes = s->config.layout.n_lanes;
    int n_changed = 0;
    pthread_mutex_lock(&s->lock);
    for (int32_t i = layer * n_lanes; i < (layer + 1) * n_lanes; i++) {
        const struct slots *lane = s->lanes + i;
        const int32_t *audited = s->audited + (size_t)i * (size_t)s->config.n_slots;
        for (int32_t at = 0; at < lane->n_used; at++) {
            if (audited[at] < 0) continue;
            n_changed += lane->slot[at].state != SLOT_READY || lane->slot[at].unit != audited[at];
        }
    }
    pthread_mutex_unlock(&s->lock);
    return n_changed;
}

void repkv_store_unrotate(struct repkv_store *s, const float *table) {
    pthread_mutex_lock(&s->lock);
    /* With empty queues, no thread begins a read while this one waits. */
    s->required.n = s->ahead.n = 0;
    for (size_t l = 0; l < all_lanes(s); l++) {
        struct slots *lane = s->lanes + l;
        for (int32_t i = 0; i < lane->n_used; i++) {
            while (lane->slot[i].state == SLOT_READING) store_wait(&s->done, &s->lock);
            if (lane->slot[i].state != SLOT_FREE) slots_release(lane, i);
        }
    }
    s->unrotate = table;
    pthread_mutex_unlock(&s->lock);
}

void repkv_store_resident(struct repkv_store *s, int32_t layer, int32_t *units) {
    const int32_t n_lanes = s->config.layout.n_lanes;
    pthread_mutex_lock(&s->lock);
    for (int32_t i = layer * n_lanes; i < (layer + 1) * n_lanes; i++) {
        const struct slots *lane = s->lanes + i;
        for (int32_t at = 0; at < lane->n; at++) {
            *units++ = at < lane->n_used && lane->slot[at].state == SLOT_READY ? lane->slot[at].unit : -1;
        }
    }
    pthread_mutex_unlock(&s->lock);
}

#include "block_store_private.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "xxh64.h"

enum { MAX_THREADS = 64 };

static bool open_tables(struct repkv_store *s) {
    const struct repkv_store_config *c = &s->config;
    const size_t n_lanes = all_lanes(s), n_slots = (size_t)c->n_slots, n_units = (size_t)c->max_units;
    if (n_lanes * n_slots > INT32_MAX / 4 - 64) return false; /* places in a queue are 32-bit numbers */
    s->lanes = calloc(n_lanes, sizeof *s->lanes);
    s->victims.slot = malloc(n_slots * sizeof *s->victims.slot);
    s->blocks = calloc((size_t)c->max_blocks, sizeof *s->blocks);
    s->units = calloc(n_units, sizeof *s->units);
    s->checksums = calloc(n_units * n_lanes, sizeof *s->checksums);
    s->staging = calloc((size_t)c->n_staging, sizeof *s->staging);
    s->workers = calloc((size_t)c->n_threads + 1, sizeof *s->workers);
    s->audited = c->debug ? malloc(n_lanes * n_slots * sizeof *s->audited) : NULL;
    if (!s->lanes || !s->victims.slot || !s->blocks || !s->units || !s->checksums || !s->staging || !s->workers) return false;
    if (c->debug && !s->audited) return false;
    for (size_t i = 0; c->debug && i < n_lanes * n_slots; i++) s->audited[i] = -1;
    for (size_t i = 0; i < n_lanes; i++) {
        struct slots *lane = s->lanes + i;
        *lane = (struct slots){.n = c->n_slots, .first_free = -1, .weight = 1.0};
        lane->slot = calloc(n_slots, sizeof *lane->slot);
        lane->slot_after = calloc(n_units, sizeof *lane->slot_after);
        if (!lane->slot || !lane->slot_after) return false;
    }
    struct queue *queues[2] = {&s->required, &s->ahead};
    for (int i = 0; i < 2; i++) {
        /* One request for each slot, and room for requests whose slot was taken back. */
        queues[i]->capacity = (int32_t)(2 * n_lanes * n_slots + 64);
        queues[i]->items = malloc((size_t)queues[i]->capacity * sizeof *queues[i]->items);
        if (queues[i]->items == NULL) return false;
    }
    for (int32_t i = 0; i < c->n_staging; i++) {
        void *data = NULL;
        const size_t n_bytes = c->layout.header_bytes + n_lanes * repkv_most_lane_bytes(&c->layout);
        if (posix_memalign(&data, REPKV_ALIGN, n_bytes) != 0) return false;
        s->staging[i].data = data;
    }
    return true;
}

struct repkv_store *repkv_store_open(const struct repkv_store_config *config, char **k_rows, char **v_rows, int32_t **places) {
    struct repkv_store *s = calloc(1, sizeof *s);
    if (s == NULL) return NULL;
    s->config = *config;
    if (s->config.n_threads > MAX_THREADS) s->config.n_threads = MAX_THREADS;
    const size_t n_layer = (size_t)config->layout.n_layer;
    s->file.fd = config->fd;
    s->filling = s->requiring = -1;
    pthread_mutex_init(&s->lock, NULL);
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_t *conditions[4] = {&s->work, &s->done, &s->to_write, &s->written};
    for (int i = 0; i < 4; i++) pthread_cond_init(conditions[i], &monotonic);
    pthread_condattr_destroy(&monotonic);
    s->k_rows = malloc(n_layer * sizeof *k_rows);
    s->v_rows = malloc(n_layer * sizeof *v_rows);
    s->places = malloc(n_layer * sizeof *places);
    bool ok = s->k_rows && s->v_rows && s->places && open_tables(s);
    if (ok) {
        memcpy(s->k_rows, k_rows, n_layer * sizeof *k_rows);
        memcpy(s->v_rows, v_rows, n_layer * sizeof *v_rows);
        memcpy(s->places, places, n_layer * sizeof *places);
    }
    for (int32_t i = 0; ok && i <= s->config.n_threads; i++) ok = worker_open(s, s->workers + i);
    if (ok && store_start_threads(s)) return s;
    repkv_store_close(s);
    return NULL;
}

void repkv_store_close(struct repkv_store *s) {
    store_stop_threads(s);
    for (int32_t i = 0; s->workers && i <= s->config.n_threads; i++) worker_close(s->workers + i);
    for (int32_t i = 0; s->staging && i < s->config.n_staging; i++) free(s->staging[i].data);
    for (size_t i = 0; s->lanes && i < all_lanes(s); i++) {
        free(s->lanes[i].slot);
        free(s->lanes[i].slot_after);
    }
    void *tables[] = {s->k_rows,    s->v_rows,  s->places,  s->lanes,   s->victims.slot,   s->blocks,     s->units,
                      s->checksums, s->staging, s->workers, s->audited, s->required.items, s->ahead.items};
    for (size_t i = 0; i < sizeof tables / sizeof *tables; i++) free(tables[i]);
    pthread_cond_t *conditions[4] = {&s->work, &s->done, &s->to_write, &s->written};
    for (int i = 0; i < 4; i++) pthread_cond_destroy(conditions[i]);
    pthread_mutex_destroy(&s->lock);
    free(s);
}

static int32_t free_staging(const struct repkv_store *s) {
    for (int32_t i = 0; i < s->config.n_staging; i++) {
        /* A block that was put and never committed does not count. */
        if (s->staging[i].state == STAGING_FREE || s->staging[i].state == STAGING_FILLING) return i;
    }
    return -1;
}

/* Notes a block and its units, and copies the checksums of its records. */
static void set_block(struct repkv_store *s, int32_t b, const struct repkv_block_shape *shape, int64_t offset, int32_t staged,
                      const uint64_t *checksums) {
    const struct repkv_record_layout *l = &s->config.layout;
    const int32_t first_unit = b > 0 ? s->blocks[b - 1].first_unit + s->blocks[b - 1].n_units : 0, n = shape->n_units;
    s->blocks[b] = (struct block){offset, shape->first_position, repkv_lane_bytes(l, shape->unit_ends, n),
                                  shape->unit_ends[n - 1], first_unit, n, staged, shape->rotated != 0};
    size_t at = 0;
    for (int32_t i = 0, first = 0; i < n; first = shape->unit_ends[i++]) {
        s->units[first_unit + i] = (struct unit){b, first, shape->unit_ends[i] - first, (uint32_t)at};
        at += repkv_record_aligned(repkv_record_bytes(l, shape->unit_ends[i] - first));
    }
    memcpy(s->checksums + (size_t)first_unit * all_lanes(s), checksums, (size_t)n * all_lanes(s) * sizeof *checksums);
}

/* Encodes one lane of a block, and sets the checksum of unit i at i * n_lanes. k, v: the lane in its first rows. */
static void encode_lane(const struct repkv_record_layout *l, char *lane, const struct repkv_block_shape *shape, char *k, char *v,
                        uint64_t *checksums, size_t n_lanes, float *scratch) {
    struct repkv_record record = {0};
    for (int32_t i = 0, first = 0; i < shape->n_units; first = shape->unit_ends[i++]) {
        record.n_tokens = shape->unit_ends[i] - first;
        record.n_bytes = repkv_record_bytes(l, record.n_tokens);
        record.k = k + (size_t)first * l->k_row_bytes;
        record.v = v + (size_t)first * l->v_row_bytes;
        repkv_encode(l, lane, &record, scratch);
        checksums[(size_t)i * n_lanes] = record.checksum;
        record.at += repkv_record_aligned(record.n_bytes);
    }
    memset(lane + record.at, 0, repkv_aligned(record.at) - record.at);
}

int repkv_store_put(struct repkv_store *s, int32_t block, const struct repkv_block_shape *shape, char **k_rows, char **v_rows,
                    uint64_t *checksums) {
    const struct repkv_record_layout *layout = &s->config.layout;
    const struct worker *own = s->workers + s->config.n_threads;
    pthread_mutex_lock(&s->lock);
    const double start = now_ms();
    int32_t at = free_staging(s);
    if (at < 0 && !failed_write(s)) {
        store_wait(&s->written, &s->lock);
        at = free_staging(s);
    }
    const int status = failed_write(s) ? -1 : at < 0;
    s->stats.write_wait_ms += now_ms() - start;
    if (status == 0) s->staging[at].state = STAGING_FILLING;
    pthread_mutex_unlock(&s->lock);
    if (status != 0) return status;

    struct staging *staging = s->staging + at;
    const size_t lane_bytes = repkv_lane_bytes(layout, shape->unit_ends, shape->n_units);
    char *lane = staging->data + layout->header_bytes;
    for (int32_t i = 0; i < (int32_t)all_lanes(s); i++, lane += lane_bytes) {
        const int32_t layer = i / layout->n_lanes, l = i % layout->n_lanes;
        char *k = k_rows[layer] + lane_column(s, l, layout->k_row_bytes);
        char *v = v_rows[layer] + lane_column(s, l, layout->v_row_bytes);
        encode_lane(layout, lane, shape, k, v, checksums + i, all_lanes(s), own->scratch);
    }
    pthread_mutex_lock(&s->lock);
    staging->block = block;
    set_block(s, block, shape, -1, at, checksums);
    s->filling = at;
    pthread_mutex_unlock(&s->lock);
    return 0;
}

void repkv_store_commit(struct repkv_store *s, const char *header, int64_t offset) {
    struct staging *staging = s->staging + s->filling;
    memcpy(staging->data, header, s->config.layout.header_bytes);
    pthread_mutex_lock(&s->lock);
    staging->offset = offset;
    staging->state = STAGING_FILLED;
    s->n_waiting++;
    pthread_cond_signal(&s->to_write);
    pthread_mutex_unlock(&s->lock);
}

void repkv_store_add(struct repkv_store *s, int32_t block, const struct repkv_block_shape *shape, int64_t offset,
                     const uint64_t *checksums) {
    pthread_mutex_lock(&s->lock);
    set_block(s, block, shape, offset, -1, checksums);
    pthread_mutex_unlock(&s->lock);
}

int repkv_store_flush(struct repkv_store *s) {
    pthread_mutex_lock(&s->lock);
    if (s->n_waiting > 0 && !failed_write(s)) store_wait(&s->written, &s->lock);
    const int status = failed_write(s) ? -1 : s->n_waiting > 0;
    pthread_mutex_unlock(&s->lock);
    return status;
}

/* Reads one lane of a block into rows of its layer; the caller holds the lock. */
static enum repkv_io_error read_lane(struct repkv_store *s, const struct worker *w, int32_t lane, int32_t b, char *k, char *v,
                                     int *error) {
    const struct repkv_record_layout *layout = &s->config.layout;
    const struct block block = s->blocks[b];
    for (int32_t i = 0; i < block.n_units; i++) {
        const size_t first = (size_t)s->units[block.first_unit + i].first;
        w->records[i].k = k + first * layout->k_row_bytes + lane_column(s, lane % layout->n_lanes, layout->k_row_bytes);
        w->records[i].v = v + first * layout->v_row_bytes + lane_column(s, lane % layout->n_lanes, layout->v_row_bytes);
    }
    store_load(s, w, lane, block.first_unit, block.n_units, error);
    for (int32_t i = 0; i < block.n_units; i++) {
        if (w->records[i].result != REPKV_IO_OK) return w->records[i].result;
    }
    return REPKV_IO_OK;
}

int repkv_store_read(struct repkv_store *s, int32_t layer, int32_t block, char *k, char *v, struct repkv_store_error *error) {
    const int32_t n_lanes = s->config.layout.n_lanes;
    /* This call needs its own buffers: another thread may call it while the computing thread uses its own. */
    struct worker reader = {0};
    *error = (struct repkv_store_error){REPKV_IO_READ, layer, block, ENOMEM};
    if (worker_open(s, &reader)) {
        pthread_mutex_lock(&s->lock);
        error->kind = REPKV_IO_OK;
        for (int32_t l = 0; l < n_lanes && error->kind == REPKV_IO_OK; l++) {
            error->kind = (int32_t)read_lane(s, &reader, layer * n_lanes + l, block, k, v, &error->error);
        }
        pthread_mutex_unlock(&s->lock);
    }
    worker_close(&reader);
    return error->kind == REPKV_IO_OK ? 0 : -1;
}

struct repkv_store_error repkv_store_last_error(struct repkv_store *s, int32_t of_writes) {
    pthread_mutex_lock(&s->lock);
    const struct repkv_store_error error = of_writes ? s->write_error : s->read_error;
    pthread_mutex_unlock(&s->lock);
    return error;
}

void repkv_store_inject(struct repkv_store *s, const struct repkv_faults *faults) {
    pthread_mutex_lock(&s->lock);
    s->faults = *faults;
    s->random = faults->seed;
    pthread_mutex_unlock(&s->lock);
}

uint64_t repkv_checksum(const char *data, size_t n_bytes) {
    return xxh64(data, n_bytes, 0);
}

#include "block_store_private.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "xxh64.h"

enum { MAX_THREADS = 64 };

static bool open_tables(struct repkv_store *s) {
    const struct repkv_store_config *c = &s->config;
    const size_t n_layer = (size_t)c->layout.n_layer, n_slots = (size_t)c->n_slots, n_blocks = (size_t)c->max_blocks;
    if (n_layer * n_slots > INT32_MAX / 4 - 64) return false; /* places in a queue are 32-bit numbers */
    s->layers = calloc(n_layer, sizeof *s->layers);
    s->blocks = calloc(n_blocks, sizeof *s->blocks);
    s->checksums = calloc(n_blocks * n_layer, sizeof *s->checksums);
    s->staging = calloc((size_t)c->n_staging, sizeof *s->staging);
    s->workers = calloc((size_t)c->n_threads + 1, sizeof *s->workers);
    s->audited = c->debug ? malloc(n_layer * n_slots * sizeof *s->audited) : NULL;
    if (!s->layers || !s->blocks || !s->checksums || !s->staging || !s->workers || (c->debug && !s->audited)) return false;
    for (size_t i = 0; c->debug && i < n_layer * n_slots; i++) s->audited[i] = -1;
    for (size_t i = 0; i < n_layer; i++) {
        struct slots *layer = s->layers + i;
        *layer = (struct slots){.n = c->n_slots, .weight = 1.0};
        layer->slot = calloc(n_slots, sizeof *layer->slot);
        layer->slot_of = malloc(n_blocks * sizeof *layer->slot_of);
        if (!layer->slot || !layer->slot_of) return false;
        for (size_t b = 0; b < n_blocks; b++) layer->slot_of[b] = -1;
    }
    struct queue *queues[2] = {&s->required, &s->ahead};
    for (int i = 0; i < 2; i++) {
        /* One request for each slot, and room for requests whose slot was taken back. */
        queues[i]->capacity = (int32_t)(2 * n_layer * n_slots + 64);
        queues[i]->items = malloc((size_t)queues[i]->capacity * sizeof *queues[i]->items);
        if (queues[i]->items == NULL) return false;
    }
    for (int32_t i = 0; i < c->n_staging; i++) {
        void *data = NULL;
        if (posix_memalign(&data, REPKV_ALIGN, repkv_block_bytes(&c->layout, c->layout.max_tokens)) != 0) return false;
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
    for (int32_t i = 0; s->layers && i < s->config.layout.n_layer; i++) {
        free(s->layers[i].slot);
        free(s->layers[i].slot_of);
    }
    void *tables[] = {s->k_rows, s->v_rows, s->places, s->layers, s->blocks, s->checksums, s->staging, s->workers, s->audited,
                      s->required.items, s->ahead.items};
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

int repkv_store_put(struct repkv_store *s, int32_t block, int32_t n_tokens, int32_t rotated, int64_t first_position,
                    char **k_rows, char **v_rows, uint64_t *checksums) {
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
    char *record = staging->data + layout->header_bytes;
    for (int32_t i = 0; i < layout->n_layer; i++, record += repkv_aligned(repkv_record_bytes(layout, n_tokens))) {
        checksums[i] = repkv_encode(layout, record, k_rows[i], v_rows[i], n_tokens, own->scratch);
    }
    pthread_mutex_lock(&s->lock);
    staging->block = block;
    s->blocks[block] = (struct block){-1, first_position, n_tokens, at, rotated != 0};
    memcpy(s->checksums + (size_t)block * (size_t)layout->n_layer, checksums, (size_t)layout->n_layer * sizeof *checksums);
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

void repkv_store_add(struct repkv_store *s, int32_t block, int32_t n_tokens, int32_t rotated, int64_t first_position,
                     int64_t offset, const uint64_t *checksums) {
    const size_t n_layer = (size_t)s->config.layout.n_layer;
    pthread_mutex_lock(&s->lock);
    s->blocks[block] = (struct block){offset, first_position, n_tokens, -1, rotated != 0};
    memcpy(s->checksums + (size_t)block * n_layer, checksums, n_layer * sizeof *checksums);
    pthread_mutex_unlock(&s->lock);
}

int repkv_store_flush(struct repkv_store *s) {
    pthread_mutex_lock(&s->lock);
    if (s->n_waiting > 0 && !failed_write(s)) store_wait(&s->written, &s->lock);
    const int status = failed_write(s) ? -1 : s->n_waiting > 0;
    pthread_mutex_unlock(&s->lock);
    return status;
}

int repkv_store_read(struct repkv_store *s, int32_t layer, int32_t block, char *k, char *v, struct repkv_store_error *error) {
    /* This call needs its own buffers: another thread may call it while the computing thread uses its own. */
    struct worker reader = {0};
    *error = (struct repkv_store_error){REPKV_IO_READ, layer, block, ENOMEM};
    if (worker_open(s, &reader)) {
        pthread_mutex_lock(&s->lock);
        error->kind = (int32_t)store_load(s, &reader, layer, block, k, v, &error->error);
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

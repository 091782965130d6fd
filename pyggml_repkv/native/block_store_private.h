/* The block store's state, all of it under `lock` if nothing else is said, and the functions that its files share.
 *
 * block_store.c opens it and takes blocks; block_store_slots.c decides which of them lie in slots; block_store_threads.c reads
 * and writes; block_store_trace.c counts. The caller of a function with a store holds its lock. */
#ifndef REPKV_BLOCK_STORE_PRIVATE_H
#define REPKV_BLOCK_STORE_PRIVATE_H

#include <pthread.h>
#include <time.h>

#include "block_store.h"
#include "slots.h"

struct block {
    int64_t offset, first_position;
    int32_t n_tokens, staged; /* index of the staging buffer that holds it, -1 once it is on disk */
    bool rotated;
};

struct staging {
    char *data; /* header and records, as on disk */
    int64_t offset;
    int32_t block, readers;
    enum { STAGING_FREE, STAGING_FILLING, STAGING_FILLED, STAGING_WRITTEN } state;
};

struct request {
    int32_t layer, slot;
};

/* Requests in the order they came; one slot is in it at most once. */
struct queue {
    struct request *items;
    int32_t head, n, capacity;
};

struct worker {
    struct repkv_store *store;
    pthread_t thread;
    char *buffer;
    float *scratch;
};

struct repkv_store {
    struct repkv_store_config config;
    struct repkv_file file;
    char **k_rows, **v_rows;
    int32_t **places;
    struct slots *layers;
    struct block *blocks;
    uint64_t *checksums; /* [max_blocks, n_layer] */
    struct staging *staging;
    int32_t n_waiting; /* staged blocks to write */
    int32_t filling;   /* staging buffer of the last put */
    struct queue required, ahead;
    struct worker *workers; /* the last one belongs to the computing thread */
    int32_t n_started;
    pthread_t writer;
    bool has_writer, stopping;
    pthread_mutex_t lock;
    pthread_cond_t work, done, to_write, written;
    const float *unrotate;
    struct repkv_store_stats stats;
    int32_t requiring;                   /* layer of the running requirement, -1: none */
    struct repkv_store_error read_error; /* of that requirement, or of the last one */
    struct repkv_store_error write_error;
    int32_t n_reading;
    double reading_since;
    int32_t *audited; /* [n_layer, n_slots]: block, or -1 */
    struct repkv_faults faults;
    uint64_t random;
    struct repkv_event *events;
    int32_t n_events, max_events;
};

static inline double now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

/* Waits for the condition, at most some milliseconds. */
void store_wait(pthread_cond_t *condition, pthread_mutex_t *lock);

/* Allocates a worker's buffers; false without memory. Call worker_close also after a failure. */
bool worker_open(struct repkv_store *s, struct worker *w);
void worker_close(struct worker *w);

/* Starts the threads; false if one could not be started. */
bool store_start_threads(struct repkv_store *s);

/* Stops the started threads and waits for them. The caller does not hold the lock. */
void store_stop_threads(struct repkv_store *s);

/* Adds a request to read a queued slot. */
void queue_push(struct repkv_store *s, struct queue *q, int32_t layer, int32_t slot);

/* Takes the next request whose slot still waits for it; false if there is none. */
bool queue_pop(struct repkv_store *s, struct queue *q, struct request *r);

/* Reads the block of a request into its slot. The lock is free meanwhile. */
void store_serve(struct repkv_store *s, const struct worker *w, struct request r);

/* Reads a block's rows of one layer into k and v; error: errno. The lock is free meanwhile. */
enum repkv_io_error store_load(struct repkv_store *s, const struct worker *w, int32_t layer, int32_t block, char *k, char *v,
                               int *error);

static inline bool failed_write(const struct repkv_store *s) {
    return s->write_error.kind != REPKV_IO_OK;
}

static inline char *rows_of_slot(const struct repkv_store *s, char **rows, int32_t layer, int32_t slot, size_t row_bytes) {
    return rows[layer] + ((size_t)s->config.first_row + (size_t)slot * (size_t)s->config.layout.max_tokens) * row_bytes;
}

/* Notes an event that began at `begin` and ends now. */
void store_record(struct repkv_store *s, enum repkv_event_kind kind, int32_t layer, int32_t block, bool ahead, double begin);

#endif

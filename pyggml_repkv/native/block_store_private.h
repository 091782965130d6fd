/* The block store's state, all of it under `lock` if nothing else is said, and the functions that its files share.
 *
 * block_store.c opens it and takes blocks; block_store_slots.c decides which units lie in slots; block_store_threads.c reads
 * and writes; block_store_trace.c counts. The caller of a function with a store holds its lock. */
#ifndef REPKV_BLOCK_STORE_PRIVATE_H
#define REPKV_BLOCK_STORE_PRIVATE_H

#include <pthread.h>
#include <time.h>

#include "block_store.h"
#include "slots.h"

struct block {
    int64_t offset, first_position;
    size_t lane_bytes;
    int32_t n_tokens, first_unit, n_units;
    int32_t staged; /* index of the staging buffer that holds it, -1 once it is on disk */
    bool rotated;
};

/* A unit, whose record lies `at` bytes after the beginning of its block's lane; first: its first token, from the block's. */
struct unit {
    int32_t block, first, n_tokens;
    uint32_t at;
};

struct staging {
    char *data; /* header and lanes, as on disk */
    int64_t offset;
    int32_t block, readers;
    enum { STAGING_FREE, STAGING_FILLING, STAGING_FILLED, STAGING_WRITTEN } state;
};

/* Lanes are numbered through the layers: lane l of a layer is layer * n_lanes + l. */
struct request {
    int32_t lane, slot;
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
    struct repkv_record *records; /* of the units that are read at once */
    float *scratch;
};

struct repkv_store {
    struct repkv_store_config config;
    struct repkv_file file;
    char **k_rows, **v_rows;
    int32_t **places;
    struct slots *lanes; /* [n_layer, n_lanes] */
    struct victims victims;
    struct block *blocks;
    struct unit *units;
    uint64_t *checksums; /* [max_units, n_layer, n_lanes] */
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
    int32_t n_missing;                   /* units that it has asked for and that are not there */
    struct repkv_store_error read_error; /* of that requirement, or of the last one */
    struct repkv_store_error write_error;
    int32_t n_reading;
    double reading_since;
    int32_t *audited; /* [n_layer, n_lanes, n_slots]: unit, or -1 */
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
void queue_push(struct repkv_store *s, struct queue *q, int32_t lane, int32_t slot);

/* Takes the next request whose slot still waits for it; false if there is none. */
bool queue_pop(struct repkv_store *s, struct queue *q, struct request *r);

/* Reads the unit of a request into its slot, and those beside it that are queued too. The lock is free meanwhile. */
void store_serve(struct repkv_store *s, const struct worker *w, struct request r);

/* Reads n_units of a lane from `first` on, which are in one block, into the rows that the worker's records name, and sets the
 * results of these; error: errno. The lock is free meanwhile. */
void store_load(struct repkv_store *s, const struct worker *w, int32_t lane, int32_t first, int32_t n_units, int *error);

static inline bool failed_write(const struct repkv_store *s) {
    return s->write_error.kind != REPKV_IO_OK;
}

/* Returns where the columns of lane l of a layer begin in rows of so many bytes. */
static inline size_t lane_column(const struct repkv_store *s, int32_t l, size_t row_bytes) {
    return (size_t)l * (row_bytes / (size_t)s->config.layout.n_lanes);
}

/* Returns a lane's part of the first row of a slot, in the arenas `rows` of all layers. */
static inline char *rows_of_slot(const struct repkv_store *s, char **rows, int32_t lane, int32_t slot, size_t row_bytes) {
    const struct repkv_record_layout *l = &s->config.layout;
    const size_t row = (size_t)s->config.first_row + (size_t)slot * (size_t)l->max_unit_tokens;
    return rows[lane / l->n_lanes] + row * row_bytes + lane_column(s, lane % l->n_lanes, row_bytes);
}

static inline size_t all_lanes(const struct repkv_store *s) {
    return (size_t)s->config.layout.n_layer * (size_t)s->config.layout.n_lanes;
}

/* Notes an event that ends now. */
void store_record(struct repkv_store *s, struct repkv_event event);

#endif

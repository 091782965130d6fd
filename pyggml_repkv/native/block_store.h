/* Blocks on disk, and slots in RAM for the attended parts of them.
 *
 * What is attended is a unit of a lane: some consecutive tokens of a block, and some key heads of a layer (block_file.h). Each
 * lane has a fixed number of slots, which a pool of threads fills. A block is put once. It is encoded into a staging buffer,
 * and a writing thread writes it; until then, reads take it from the staging buffer. Queued units of a lane that follow one
 * another in a block are read at once.
 *
 * Slots are replaced by LRU with score decay: a unit scores 1 each time it is required, times SLOT_DECAY for each later
 * requirement of its layer; of equals the least recently used gives way, of these the lowest slot. A unit read ahead scores
 * SLOT_PREFETCH_SCORE.
 *
 * Units are numbered through the sequence. A selection is n_rows rows, row r at selected + r * stride: how many units, then
 * which, each once. Row r is of lane r % n_lanes.
 *
 * Only one thread at a time, the computing one, may call repkv_store_put, _commit, _require, _prefetch and the functions that
 * change the table of blocks. The pool never touches a required slot until the next requirement of its layer. ggml's threads
 * must not wait: waits happen between two of ggml's computes (hooks.h). */
#ifndef REPKV_BLOCK_STORE_H
#define REPKV_BLOCK_STORE_H

#include "block_file.h"
#include "regions.h"

struct repkv_compute;
struct repkv_store;

struct repkv_store_config {
    struct repkv_record_layout layout;
    int32_t fd;
    int32_t n_slots;    /* per lane */
    int32_t max_blocks, max_units; /* of the sequence */
    int32_t n_threads;  /* for reads */
    int32_t n_staging;  /* blocks that may wait for their write */
    int32_t first_row;  /* of slot 0 in the arenas; slot s begins at first_row + s * max_unit_tokens */
    int32_t debug;      /* poison empty slots, and check that attended slots do not change */
};

struct repkv_store_stats {
    int64_t required, hits; /* units that lanes required, and those of them that were in a slot */
    int64_t issued, used;   /* units read ahead, and those of them that a lane required later */
    int64_t late, missed;   /* units required during their read, and those whose read had not begun */
    int64_t reads, read_bytes, written_bytes, retries, staged_reads;
    double wait_ms;  /* compute waited for reads */
    double read_ms;  /* at least one read ran */
    double write_wait_ms; /* compute waited for a staging buffer */
};

struct repkv_store_error {
    int32_t kind; /* enum repkv_io_error */
    int32_t layer, block;
    int32_t error; /* errno */
};

/* Opens a store. k_rows, v_rows: the arenas of each layer; places: the table I32 [n_lanes, max_units, 3] in which each layer's
 * attention finds its units. All outlive the store. NULL if there is too little memory or no thread. */
struct repkv_store *repkv_store_open(const struct repkv_store_config *config, char **k_rows, char **v_rows, int32_t **places);

/* Waits for the threads and frees everything. Blocks that are not written yet are lost. */
void repkv_store_close(struct repkv_store *s);

/* A block's shape. unit_ends [n_units]: where its units end, counted in tokens from its first; the last one is how many it has. */
struct repkv_block_shape {
    int64_t first_position;
    const int32_t *unit_ends;
    int32_t n_units;
    int32_t rotated;
};

/* Encodes the next block from its rows in each layer, and sets checksums [n_units, n_layer, n_lanes] of its records. Returns 1
 * if no staging buffer became free within some milliseconds (try again), -1 after a failed write (repkv_store_last_error). */
int repkv_store_put(struct repkv_store *s, int32_t block, const struct repkv_block_shape *shape, char **k_rows, char **v_rows,
                    uint64_t *checksums);

/* Gives the block of the last put to the writer. header: header_bytes of the layout; offset is aligned. */
void repkv_store_commit(struct repkv_store *s, const char *header, int64_t offset);

/* Adds the next block, which is on disk already. */
void repkv_store_add(struct repkv_store *s, int32_t block, const struct repkv_block_shape *shape, int64_t offset,
                     const uint64_t *checksums);

/* Waits some milliseconds for the writes of all committed blocks. Returns 1 if some remain, -1 after a failed write. */
int repkv_store_flush(struct repkv_store *s);

/* Makes the units of a selection, all of its rows, resident in a layer.
 * Returns -1 if one cannot be read or a lane has too few slots (repkv_store_last_error), -2 if `compute` (or NULL) must stop meanwhile. */
int repkv_store_require(struct repkv_store *s, int32_t layer, const int32_t *selected, int32_t n_rows, int64_t stride,
                        const struct repkv_compute *compute);

/* Starts to read units, best first, if they are worth a slot: they replace units with lower scores. */
void repkv_store_prefetch(struct repkv_store *s, int32_t layer, const int32_t *selected, int32_t n_rows, int64_t stride);

/* Starts to read units that the layer's next requirement will name: they replace any unit that was not required last. */
void repkv_store_fetch(struct repkv_store *s, int32_t layer, const int32_t *selected, int32_t n_rows, int64_t stride);

/* Reads a block's rows of one layer into k, v. Any thread may call it at any time. Returns 0, or -1 and sets `error`. */
int repkv_store_read(struct repkv_store *s, int32_t layer, int32_t block, char *k, char *v, struct repkv_store_error *error);

/* From now on, reads undo the rotation of keys that were stored rotated. table [n_positions, rope_dim] outlives the store.
 * Empties every slot. */
void repkv_store_unrotate(struct repkv_store *s, const float *table);

/* Sets units [n_lanes, n_slots] to the unit in each slot of a layer, -1 for none. */
void repkv_store_resident(struct repkv_store *s, int32_t layer, int32_t *units);

/* Returns 0, or in debug mode not 0 if a slot that the layer's last requirement named has changed since. */
int repkv_store_audit(struct repkv_store *s, int32_t layer);

void repkv_store_get_stats(struct repkv_store *s, struct repkv_store_stats *stats);
/* Returns the read that failed the last requirement, or the write that failed; its kind is REPKV_IO_OK if none did. */
struct repkv_store_error repkv_store_last_error(struct repkv_store *s, int32_t of_writes);
void repkv_store_inject(struct repkv_store *s, const struct repkv_faults *faults);

enum repkv_event_kind {
    REPKV_EVENT_SELECTED, /* a layer has selected its units */
    REPKV_EVENT_WAIT,     /* compute waited for them */
    REPKV_EVENT_READ,     /* n_units of a block's lane were read from disk, at once */
    REPKV_EVENT_STAGED,   /* they were taken from a staging buffer */
    REPKV_EVENT_WRITE,    /* a block was written; its layer is -1 */
};

/* Times are in milliseconds of CLOCK_MONOTONIC. lane: of its layer. ahead: whether the read began before the layer required the
 * units. */
struct repkv_event {
    int32_t kind, layer, lane, block, n_units, ahead;
    double begin_ms, end_ms;
};

/* Records the next n events into the caller's memory; NULL ends it. Returns how many it has recorded so far. */
int32_t repkv_store_trace(struct repkv_store *s, struct repkv_event *events, int32_t n);

/* Returns the checksum of a record or header: XXH64 with seed 0. */
uint64_t repkv_checksum(const char *data, size_t n_bytes);

#endif

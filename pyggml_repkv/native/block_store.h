/* Blocks on disk and the slots of RAM in which the attended ones lie: a fixed number per layer, filled by a pool of threads.
 *
 * A block is put once: encoded into a staging buffer, then written by a thread of its own; until it is on disk it is read
 * from there. Slots are replaced by LRU with score decay: a block scores 1 each time it is required, times SLOT_DECAY for each
 * time that its layer required others since; of equals the least recently used gives way, of these the lowest slot. A block
 * fetched ahead scores SLOT_PREFETCH_SCORE.
 *
 * repkv_store_put, _commit, _require, _prefetch and what changes the table of blocks are for one thread at a time, the one
 * that computes; the pool never touches a slot that was required until the next requirement of its layer. Wait for nothing
 * under ggml's threads: waiting happens between two of its computes (hooks.h). */
#ifndef REPKV_BLOCK_STORE_H
#define REPKV_BLOCK_STORE_H

#include "block_file.h"
#include "regions.h"

struct repkv_compute;
struct repkv_store;

struct repkv_store_config {
    struct repkv_record_layout layout;
    int32_t fd;
    int32_t n_slots;    /* per layer */
    int32_t max_blocks; /* of the sequence */
    int32_t n_threads;  /* that read */
    int32_t n_staging;  /* blocks that may wait to be written */
    int32_t first_row;  /* of slot 0 in the arenas; slot s begins at first_row + s * max_tokens */
    int32_t debug;      /* poison slots that hold nothing, check that attended slots were left alone */
};

struct repkv_store_stats {
    int64_t required, hits; /* blocks asked for by layers, and of those the ones that lay in a slot */
    int64_t issued, used;   /* read ahead, and of those the ones asked for later */
    int64_t late, missed;   /* asked for while on their way, and while nobody had begun to read them */
    int64_t reads, read_bytes, written_bytes, retries, staged_reads;
    double wait_ms;  /* that compute stood still for reads */
    double read_ms;  /* during which at least one read was on its way */
    double write_wait_ms; /* that compute stood still for a staging buffer */
};

struct repkv_store_error {
    int32_t kind; /* enum repkv_io_error */
    int32_t layer, block;
    int32_t error; /* errno */
};

/* k_rows, v_rows: the arenas of each layer; places: where each layer's attention looks up its blocks. All outlive the store.
 * NULL if there is not enough memory or no thread. */
struct repkv_store *repkv_store_open(const struct repkv_store_config *config, char **k_rows, char **v_rows, int32_t **places);

/* Waits for the threads and frees everything; what is not written yet is lost. */
void repkv_store_close(struct repkv_store *s);

/* Encodes a block from its rows in each layer. checksums [n_layer] are those of its records. 1 if after some milliseconds
 * there still was no staging buffer (try again), -1 after a failed write (repkv_store_last_error). */
int repkv_store_put(struct repkv_store *s, int32_t block, int32_t n_tokens, int32_t rotated, int64_t first_position,
                    char **k_rows, char **v_rows, uint64_t *checksums);

/* Hands the block that was put last to the writer. header: header_bytes of the layout; offset is aligned. */
void repkv_store_commit(struct repkv_store *s, const char *header, int64_t offset);

/* Tells of a block that is on disk already. */
void repkv_store_add(struct repkv_store *s, int32_t block, int32_t n_tokens, int32_t rotated, int64_t first_position,
                     int64_t offset, const uint64_t *checksums);

/* Waits some milliseconds until all committed blocks are written; 1 if they are not yet, -1 after a failed write. */
int repkv_store_flush(struct repkv_store *s);

/* Makes the blocks of n_rows selections (row r at selected + r * stride: how many, then which) resident in a layer.
 * -1 if one cannot be read (repkv_store_last_error), -2 if `compute` (or NULL) is to stop meanwhile. */
int repkv_store_require(struct repkv_store *s, int32_t layer, const int32_t *selected, int32_t n_rows, int64_t stride,
                        const struct repkv_compute *compute);

/* Starts to read blocks, best first, as far as they are worth a slot: they replace what scores less than them. */
void repkv_store_prefetch(struct repkv_store *s, int32_t layer, const int32_t *blocks, int32_t n);

/* Starts to read blocks that the layer's next requirement will name: they replace whatever was not required last. */
void repkv_store_fetch(struct repkv_store *s, int32_t layer, const int32_t *blocks, int32_t n);

/* Reads a block's rows of one layer into k, v of max_tokens rows; any thread may, at any time. -1 and `error` on failure. */
int repkv_store_read(struct repkv_store *s, int32_t layer, int32_t block, char *k, char *v, struct repkv_store_error *error);

/* From now on keys that were stored rotated are turned back as they are read; table [n_positions, rope_dim] outlives the
 * store. Empties every slot. */
void repkv_store_unrotate(struct repkv_store *s, const float *table);

/* Which block each slot of a layer holds, -1 for none, into blocks [n_slots]. */
void repkv_store_resident(struct repkv_store *s, int32_t layer, int32_t *blocks);

/* 0 unless, in debug mode, a slot that the last requirement of the layer named has changed since. */
int repkv_store_audit(struct repkv_store *s, int32_t layer);

void repkv_store_get_stats(struct repkv_store *s, struct repkv_store_stats *stats);
/* The read that failed the last requirement, or the write that failed; no kind if none did. */
struct repkv_store_error repkv_store_last_error(struct repkv_store *s, int32_t of_writes);
void repkv_store_inject(struct repkv_store *s, const struct repkv_faults *faults);

enum repkv_event_kind {
    REPKV_EVENT_SELECTED, /* a layer has selected its blocks */
    REPKV_EVENT_WAIT,     /* compute stood still for them */
    REPKV_EVENT_READ,     /* a block was read from disk */
    REPKV_EVENT_STAGED,   /* a block was taken from a staging buffer */
    REPKV_EVENT_WRITE,    /* a block was written; its layer is -1 */
};

/* Times are of CLOCK_MONOTONIC, in milliseconds. ahead: whether the read was begun before its layer asked for the block. */
struct repkv_event {
    int32_t kind, layer, block, ahead;
    double begin_ms, end_ms;
};

/* Records the next n events into memory of the caller's; NULL ends it. Returns how many were recorded so far. */
int32_t repkv_store_trace(struct repkv_store *s, struct repkv_event *events, int32_t n);

/* Checksum of records and headers: XXH64 with seed 0. */
uint64_t repkv_checksum(const char *data, size_t n_bytes);

#endif

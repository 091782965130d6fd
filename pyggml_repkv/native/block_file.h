/* Reads, writes and checks a block's records on disk, and converts them to and from rows of an arena.
 *
 * A block is cut into units of consecutive tokens, and the columns of a layer's rows into n_lanes lanes of as many key heads
 * each. A block is written at once: header_bytes of header, then its lanes, layer by layer. A lane begins at a multiple of
 * REPKV_ALIGN and is a record for each unit: the keys of its tokens, of the lane's heads, then their values, padded to
 * REPKV_RECORD_ALIGN (docs/block_file.md). Nothing here allocates or locks. */
#ifndef REPKV_BLOCK_FILE_H
#define REPKV_BLOCK_FILE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    REPKV_ALIGN = 4096, /* of offsets, lengths and buffers, for O_DIRECT */
    REPKV_RECORD_ALIGN = 64,
    REPKV_READ_TRIES = 3,
};

enum repkv_io_error {
    REPKV_IO_OK,
    REPKV_IO_READ,     /* pread failed: errno */
    REPKV_IO_SHORT,    /* the file ends before the record does */
    REPKV_IO_CHECKSUM, /* the bytes read are not those written */
    REPKV_IO_WRITE,    /* pwrite failed: errno */
    REPKV_IO_SLOTS,    /* more units are required at once than a lane has slots */
};

struct repkv_record_layout {
    int32_t n_layer, n_lanes, n_head_kv, head_dim, rope_dim;
    int32_t max_tokens, max_units;    /* of a block */
    int32_t max_unit_tokens;
    int32_t type_k, type_v;           /* of the arena's rows */
    int32_t file_type_k, file_type_v; /* of the rows on disk */
    size_t k_row_bytes, v_row_bytes, file_k_row_bytes, file_v_row_bytes;
    size_t header_bytes; /* a multiple of REPKV_ALIGN */
};

/* Faults for tests: the nth call of a kind since the store opened fails, counted from 1, and with `keep` all after it. */
struct repkv_faults {
    int64_t read_at, write_at; /* 0: never */
    int32_t keep;
    int32_t read_kind; /* enum repkv_io_error: how that read fails */
    int32_t error;     /* errno of a failed read or write; 0 for a write makes it short */
    int32_t delay_us;  /* before every read, a random time up to this */
    int32_t reorder;   /* threads take queued reads in random order */
    uint32_t seed;
};

struct repkv_file {
    int fd;
    atomic_llong n_reads, n_writes;
};

/* Gives the disk back what these bytes of a file take; they read as zero then. 0, or -1 with errno: not every file system can. */
int repkv_discard(int fd, int64_t offset, int64_t n_bytes);

static inline size_t repkv_aligned(size_t n) {
    return (n + REPKV_ALIGN - 1) / REPKV_ALIGN * REPKV_ALIGN;
}

static inline size_t repkv_record_aligned(size_t n) {
    return (n + REPKV_RECORD_ALIGN - 1) / REPKV_RECORD_ALIGN * REPKV_RECORD_ALIGN;
}

/* Returns the bytes of a unit's record in one lane, without padding. */
size_t repkv_record_bytes(const struct repkv_record_layout *layout, int32_t n_tokens);

/* Return the bytes of one lane of a block with all padding, and of a whole block, cut into n_units that end before the tokens
 * unit_ends, counted from the block's first. */
size_t repkv_lane_bytes(const struct repkv_record_layout *layout, const int32_t *unit_ends, int32_t n_units);
size_t repkv_block_bytes(const struct repkv_record_layout *layout, const int32_t *unit_ends, int32_t n_units);

/* Returns the most bytes that one lane of any block takes. */
size_t repkv_most_lane_bytes(const struct repkv_record_layout *layout);

/* A unit of a lane, among others in a buffer; k, v: its lane in its first row of the arenas, NULL where it is only read because
 * it lies between others. */
struct repkv_record {
    size_t at, n_bytes; /* in the buffer */
    uint64_t checksum;
    enum repkv_io_error result;
    int32_t n_tokens;
    char *k, *v;
};

/* Encodes rows of the arenas as a record in the buffer, padded with zeros, and sets its checksum. scratch: F32 of a lane. */
void repkv_encode(const struct repkv_record_layout *layout, char *buffer, struct repkv_record *record, float *scratch);

/* Decodes a record of the buffer into rows of the arenas. unrotate: NULL, or [n_tokens, rope_dim] to rotate the keys. scratch:
 * twice that of encode. */
void repkv_decode(const struct repkv_record_layout *layout, const char *buffer, const struct repkv_record *record,
                  const float *unrotate, float *scratch);

/* Reads n_bytes at `offset` (both aligned) into an aligned buffer, and sets the result of each record that lies in them; tries
 * up to REPKV_READ_TRIES times while one is bad. error: errno. */
void repkv_read_records(struct repkv_file *file, struct repkv_faults faults, char *buffer, size_t n_bytes, int64_t offset,
                        struct repkv_record *records, int32_t n_records, int *error, int64_t *n_retries);

/* Writes n_bytes (aligned) at offset (aligned). */
enum repkv_io_error repkv_write_bytes(struct repkv_file *file, struct repkv_faults faults, const char *buffer,
                                      size_t n_bytes, int64_t offset, int *error);

#endif

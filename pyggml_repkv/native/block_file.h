/* Reads, writes and checks a block's records on disk, and converts them to and from rows of an arena.
 *
 * A block is written at once: header_bytes of header, then n_layer records. A record is the keys of the block's tokens, then
 * their values, padded to REPKV_ALIGN (docs/block_file.md). Nothing here allocates or locks. */
#ifndef REPKV_BLOCK_FILE_H
#define REPKV_BLOCK_FILE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    REPKV_ALIGN = 4096, /* of offsets, lengths and buffers, for O_DIRECT */
    REPKV_READ_TRIES = 3,
};

enum repkv_io_error {
    REPKV_IO_OK,
    REPKV_IO_READ,     /* pread failed: errno */
    REPKV_IO_SHORT,    /* the file ends before the record does */
    REPKV_IO_CHECKSUM, /* the bytes read are not those written */
    REPKV_IO_WRITE,    /* pwrite failed: errno */
};

struct repkv_record_layout {
    int32_t n_layer, max_tokens, n_head_kv, head_dim, rope_dim;
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

/* Return the bytes of a record on disk, without and with padding, and of a whole block. */
size_t repkv_record_bytes(const struct repkv_record_layout *layout, int32_t n_tokens);
size_t repkv_block_bytes(const struct repkv_record_layout *layout, int32_t n_tokens);

/* Encodes rows of the arenas as a record, padded with zeros, and returns its checksum. scratch: F32 [n_head_kv * head_dim]. */
uint64_t repkv_encode(const struct repkv_record_layout *layout, char *record, const char *k, const char *v, int32_t n_tokens,
                      float *scratch);

/* Decodes a record into rows of the arenas. unrotate: NULL, or [n_tokens, rope_dim] to rotate the keys. scratch: twice that
 * of encode. */
void repkv_decode(const struct repkv_record_layout *layout, char *k, char *v, const char *record, int32_t n_tokens,
                  const float *unrotate, float *scratch);

/* Reads a record into an aligned buffer and checks it; tries up to REPKV_READ_TRIES times. error: errno. */
enum repkv_io_error repkv_read_record(struct repkv_file *file, struct repkv_faults faults, char *buffer, size_t n_bytes,
                                      int64_t offset, uint64_t checksum, int *error, int64_t *n_retries);

/* Writes n_bytes (aligned) at offset (aligned). */
enum repkv_io_error repkv_write_bytes(struct repkv_file *file, struct repkv_faults faults, const char *buffer,
                                      size_t n_bytes, int64_t offset, int *error);

#endif

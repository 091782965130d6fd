#include "block_file.h"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#include "convert.h"
#include "memory_ops.h"
#include "xxh64.h"

size_t repkv_record_bytes(const struct repkv_record_layout *l, int32_t n_tokens) {
    return (size_t)n_tokens * (l->file_k_row_bytes + l->file_v_row_bytes) / (size_t)l->n_lanes;
}

size_t repkv_lane_bytes(const struct repkv_record_layout *l, const int32_t *unit_ends, int32_t n_units) {
    size_t n = 0;
    for (int32_t i = 0; i < n_units; i++) {
        n += repkv_record_aligned(repkv_record_bytes(l, unit_ends[i] - (i > 0 ? unit_ends[i - 1] : 0)));
    }
    return repkv_aligned(n);
}

size_t repkv_block_bytes(const struct repkv_record_layout *l, const int32_t *unit_ends, int32_t n_units) {
    return l->header_bytes + (size_t)l->n_layer * (size_t)l->n_lanes * repkv_lane_bytes(l, unit_ends, n_units);
}

size_t repkv_most_lane_bytes(const struct repkv_record_layout *l) {
    return repkv_aligned(repkv_record_bytes(l, l->max_tokens) + (size_t)l->max_units * REPKV_RECORD_ALIGN);
}

int repkv_discard(int fd, int64_t offset, int64_t n_bytes) {
    return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, n_bytes);
}

/* Rows of which n_bytes are converted. */
struct rows {
    int type;
    size_t stride, n_bytes;
};

static void convert_rows(char *to, struct rows to_rows, const char *from, struct rows from_rows, int32_t n_rows, int width,
                         float *scratch) {
    for (int32_t r = 0; r < n_rows; r++, to += to_rows.stride, from += from_rows.stride) {
        if (to_rows.type == from_rows.type) {
            memcpy(to, from, to_rows.n_bytes);
        } else {
            to_f32((enum ggml_type)from_rows.type, from, scratch, width);
            from_f32((enum ggml_type)to_rows.type, scratch, to, width);
        }
    }
}

static struct rows in_arena(const struct repkv_record_layout *l, int type, size_t row_bytes) {
    return (struct rows){type, row_bytes, row_bytes / (size_t)l->n_lanes};
}

static struct rows in_record(const struct repkv_record_layout *l, int type, size_t row_bytes) {
    return (struct rows){type, row_bytes / (size_t)l->n_lanes, row_bytes / (size_t)l->n_lanes};
}

void repkv_encode(const struct repkv_record_layout *l, char *buffer, struct repkv_record *record, float *scratch) {
    const int32_t n = record->n_tokens;
    const int width = l->n_head_kv / l->n_lanes * l->head_dim;
    const struct rows k = in_record(l, l->file_type_k, l->file_k_row_bytes), v = in_record(l, l->file_type_v, l->file_v_row_bytes);
    char *keys = buffer + record->at, *values = keys + (size_t)n * k.stride;
    convert_rows(keys, k, record->k, in_arena(l, l->type_k, l->k_row_bytes), n, width, scratch);
    convert_rows(values, v, record->v, in_arena(l, l->type_v, l->v_row_bytes), n, width, scratch);
    memset(keys + record->n_bytes, 0, repkv_record_aligned(record->n_bytes) - record->n_bytes);
    record->checksum = xxh64(keys, record->n_bytes, 0);
}

void repkv_decode(const struct repkv_record_layout *l, const char *buffer, const struct repkv_record *record,
                  const float *unrotate, float *scratch) {
    const int32_t n = record->n_tokens;
    const int n_heads = l->n_head_kv / l->n_lanes, width = n_heads * l->head_dim;
    const struct rows k = in_record(l, l->file_type_k, l->file_k_row_bytes), v = in_record(l, l->file_type_v, l->file_v_row_bytes);
    const char *keys = buffer + record->at, *values = keys + (size_t)n * k.stride;
    convert_rows(record->k, in_arena(l, l->type_k, l->k_row_bytes), keys, k, n, width, scratch);
    convert_rows(record->v, in_arena(l, l->type_v, l->v_row_bytes), values, v, n, width, scratch);
    if (unrotate != NULL) {
        repkv_rotate_rows(record->k, l->type_k, l->k_row_bytes, n, n_heads, l->head_dim, unrotate, l->rope_dim, scratch);
    }
}

static bool strikes(int64_t at, int32_t keep, long long n) {
    return at > 0 && (n == at || (keep && n > at));
}

/* Reads as much as there is; returns how much that is, 0 after an error. */
static size_t read_once(struct repkv_file *file, const struct repkv_faults *f, char *buffer, size_t n_bytes, int64_t offset,
                        const struct repkv_record *first, int *error) {
    const long long n = atomic_fetch_add(&file->n_reads, 1) + 1;
    if (f->delay_us > 0) usleep((useconds_t)(xxh64(&n, sizeof n, f->seed) % (uint64_t)f->delay_us));
    const bool struck = strikes(f->read_at, f->keep, n);
    if (struck && f->read_kind == REPKV_IO_READ) *error = f->error;
    if (struck && f->read_kind != REPKV_IO_CHECKSUM) return 0;
    size_t done = 0;
    while (done < n_bytes) {
        const ssize_t got = pread(file->fd, buffer + done, n_bytes - done, offset + (int64_t)done);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) {
            *error = errno;
            return 0;
        }
        done += (size_t)got;
        /* The file ends here, perhaps at an odd place, from which a direct read cannot continue. */
        if (got % REPKV_ALIGN != 0 || got == 0) break;
    }
    if (struck) buffer[first->at + first->n_bytes / 2] ^= 1;
    return done;
}

void repkv_read_records(struct repkv_file *file, struct repkv_faults faults, char *buffer, size_t n_bytes, int64_t offset,
                        struct repkv_record *records, int32_t n_records, int *error, int64_t *n_retries) {
    bool whole = false;
    for (int i = 0; i < REPKV_READ_TRIES && !whole; i++) {
        if (i > 0) ++*n_retries;
        *error = 0;
        const size_t done = read_once(file, &faults, buffer, n_bytes, offset, records, error);
        whole = true;
        for (struct repkv_record *r = records; r < records + n_records; r++) {
            if (r->k == NULL) continue;
            if (*error != 0) r->result = REPKV_IO_READ;
            else if (r->at + r->n_bytes > done) r->result = REPKV_IO_SHORT;
            else r->result = xxh64(buffer + r->at, r->n_bytes, 0) == r->checksum ? REPKV_IO_OK : REPKV_IO_CHECKSUM;
            whole = whole && r->result == REPKV_IO_OK;
        }
    }
}

enum repkv_io_error repkv_write_bytes(struct repkv_file *file, struct repkv_faults faults, const char *buffer, size_t n_bytes,
                                      int64_t offset, int *error) {
    size_t done = 0;
    while (done < n_bytes) {
        const long long n = atomic_fetch_add(&file->n_writes, 1) + 1;
        size_t want = n_bytes - done;
        if (strikes(faults.write_at, faults.keep, n)) {
            if (faults.error != 0) {
                *error = faults.error;
                return REPKV_IO_WRITE;
            }
            want = (want / 2) / REPKV_ALIGN * REPKV_ALIGN;
            if (want == 0) want = REPKV_ALIGN;
        }
        const ssize_t put = pwrite(file->fd, buffer + done, want, offset + (int64_t)done);
        if (put < 0 && errno == EINTR) continue;
        /* On a nearly full disk a write may end within a page: that page is written again. */
        const size_t whole = put < 0 ? 0 : (size_t)put / REPKV_ALIGN * REPKV_ALIGN;
        if (whole == 0) {
            *error = put < 0 ? errno : ENOSPC;
            return REPKV_IO_WRITE;
        }
        done += whole;
    }
    return REPKV_IO_OK;
}

#include "block_file.h"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#include "convert.h"
#include "memory_ops.h"
#include "xxh64.h"

size_t repkv_record_bytes(const struct repkv_record_layout *l, int32_t n_tokens) {
    return (size_t)n_tokens * (l->file_k_row_bytes + l->file_v_row_bytes);
}

size_t repkv_block_bytes(const struct repkv_record_layout *l, int32_t n_tokens) {
    return l->header_bytes + (size_t)l->n_layer * repkv_aligned(repkv_record_bytes(l, n_tokens));
}

int repkv_discard(int fd, int64_t offset, int64_t n_bytes) {
    return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, n_bytes);
}

static void convert_rows(char *to, int to_type, size_t to_bytes, const char *from, int from_type, size_t from_bytes,
                         int32_t n_rows, int width, float *scratch) {
    if (to_type == from_type) {
        memcpy(to, from, (size_t)n_rows * to_bytes);
        return;
    }
    for (int32_t r = 0; r < n_rows; r++, to += to_bytes, from += from_bytes) {
        to_f32((enum ggml_type)from_type, from, scratch, width);
        from_f32((enum ggml_type)to_type, scratch, to, width);
    }
}

uint64_t repkv_encode(const struct repkv_record_layout *l, char *record, const char *k, const char *v, int32_t n_tokens,
                      float *scratch) {
    const int width = l->n_head_kv * l->head_dim;
    char *values = record + (size_t)n_tokens * l->file_k_row_bytes;
    convert_rows(record, l->file_type_k, l->file_k_row_bytes, k, l->type_k, l->k_row_bytes, n_tokens, width, scratch);
    convert_rows(values, l->file_type_v, l->file_v_row_bytes, v, l->type_v, l->v_row_bytes, n_tokens, width, scratch);
    const size_t n = repkv_record_bytes(l, n_tokens);
    memset(record + n, 0, repkv_aligned(n) - n);
    return xxh64(record, n, 0);
}

void repkv_decode(const struct repkv_record_layout *l, char *k, char *v, const char *record, int32_t n_tokens,
                  const float *unrotate, float *scratch) {
    const int width = l->n_head_kv * l->head_dim;
    const char *values = record + (size_t)n_tokens * l->file_k_row_bytes;
    convert_rows(k, l->type_k, l->k_row_bytes, record, l->file_type_k, l->file_k_row_bytes, n_tokens, width, scratch);
    convert_rows(v, l->type_v, l->v_row_bytes, values, l->file_type_v, l->file_v_row_bytes, n_tokens, width, scratch);
    if (unrotate != NULL) {
        repkv_rotate_rows(k, l->type_k, l->k_row_bytes, n_tokens, l->n_head_kv, l->head_dim, unrotate, l->rope_dim, scratch);
    }
}

static bool strikes(int64_t at, int32_t keep, long long n) {
    return at > 0 && (n == at || (keep && n > at));
}

static enum repkv_io_error read_once(struct repkv_file *file, const struct repkv_faults *f, char *buffer, size_t n_bytes,
                                     int64_t offset, uint64_t checksum, int *error) {
    const long long n = atomic_fetch_add(&file->n_reads, 1) + 1;
    if (f->delay_us > 0) usleep((useconds_t)(xxh64(&n, sizeof n, f->seed) % (uint64_t)f->delay_us));
    const bool struck = strikes(f->read_at, f->keep, n);
    if (struck && f->read_kind == REPKV_IO_READ) {
        *error = f->error;
        return REPKV_IO_READ;
    }
    size_t want = repkv_aligned(n_bytes), done = 0;
    if (struck && f->read_kind == REPKV_IO_SHORT) want = 0;
    while (done < want) {
        const ssize_t got = pread(file->fd, buffer + done, want - done, offset + (int64_t)done);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) {
            *error = errno;
            return REPKV_IO_READ;
        }
        done += (size_t)got;
        /* The file ends here, perhaps at an odd place, from which a direct read cannot continue. */
        if (got % REPKV_ALIGN != 0 || got == 0) break;
    }
    if (done < n_bytes) return REPKV_IO_SHORT;
    if (struck && f->read_kind == REPKV_IO_CHECKSUM) buffer[n_bytes / 2] ^= 1;
    return xxh64(buffer, n_bytes, 0) == checksum ? REPKV_IO_OK : REPKV_IO_CHECKSUM;
}

enum repkv_io_error repkv_read_record(struct repkv_file *file, struct repkv_faults faults, char *buffer, size_t n_bytes,
                                      int64_t offset, uint64_t checksum, int *error, int64_t *n_retries) {
    enum repkv_io_error result = REPKV_IO_OK;
    for (int i = 0; i < REPKV_READ_TRIES; i++) {
        if (i > 0) ++*n_retries;
        result = read_once(file, &faults, buffer, n_bytes, offset, checksum, error);
        if (result == REPKV_IO_OK) break;
    }
    return result;
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

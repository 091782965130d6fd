#include "block_store_private.h"

#include <signal.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { POLL_MS = 50 };

void store_wait(pthread_cond_t *condition, pthread_mutex_t *lock) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    t.tv_nsec += POLL_MS * 1000000L;
    if (t.tv_nsec >= 1000000000L) {
        t.tv_sec++;
        t.tv_nsec -= 1000000000L;
    }
    pthread_cond_timedwait(condition, lock, &t);
}

/* Drops requests whose slot no longer waits for them. */
static void compact(struct repkv_store *s, struct queue *q) {
    int32_t n = 0;
    for (int32_t i = 0; i < q->n; i++) {
        const struct request r = q->items[(q->head + i) % q->capacity];
        struct slot *slot = s->layers[r.layer].slot + r.slot;
        if (slot->state != SLOT_QUEUED || slot->listed) continue;
        slot->listed = true;
        q->items[(q->head + n++) % q->capacity] = r;
    }
    q->n = n;
    for (int32_t i = 0; i < n; i++) {
        const struct request r = q->items[(q->head + i) % q->capacity];
        s->layers[r.layer].slot[r.slot].listed = false;
    }
}

void queue_push(struct repkv_store *s, struct queue *q, int32_t layer, int32_t slot) {
    if (q->n == q->capacity) compact(s, q);
    q->items[(q->head + q->n++) % q->capacity] = (struct request){layer, slot};
}

bool queue_pop(struct repkv_store *s, struct queue *q, struct request *r) {
    while (q->n > 0) {
        if (s->faults.reorder) {
            s->random = s->random * 6364136223846793005u + 1442695040888963407u;
            const int32_t at = (q->head + (int32_t)((s->random >> 33) % (uint64_t)q->n)) % q->capacity;
            const struct request other = q->items[at];
            q->items[at] = q->items[q->head];
            q->items[q->head] = other;
        }
        *r = q->items[q->head];
        q->head = (q->head + 1) % q->capacity;
        q->n--;
        if (s->layers[r->layer].slot[r->slot].state == SLOT_QUEUED) return true;
    }
    return false;
}

bool worker_open(struct repkv_store *s, struct worker *w) {
    const struct repkv_record_layout *l = &s->config.layout;
    void *buffer = NULL;
    w->store = s;
    w->scratch = malloc(2 * (size_t)(l->n_head_kv * l->head_dim) * sizeof(float));
    if (w->scratch == NULL) return false;
    if (posix_memalign(&buffer, REPKV_ALIGN, repkv_aligned(repkv_record_bytes(l, l->max_tokens))) != 0) return false;
    w->buffer = buffer;
    return true;
}

void worker_close(struct worker *w) {
    free(w->buffer);
    free(w->scratch);
}

enum repkv_io_error store_load(struct repkv_store *s, const struct worker *w, int32_t layer, int32_t b, char *k, char *v,
                               int *error) {
    const struct repkv_record_layout *layout = &s->config.layout;
    const struct block block = s->blocks[b];
    const uint64_t checksum = s->checksums[(size_t)b * (size_t)layout->n_layer + (size_t)layer];
    const size_t n_bytes = repkv_record_bytes(layout, block.n_tokens);
    const size_t in_block = layout->header_bytes + (size_t)layer * repkv_aligned(n_bytes);
    const float *table = block.rotated && s->unrotate ? s->unrotate + block.first_position * layout->rope_dim : NULL;
    const char *record = w->buffer;
    enum repkv_io_error result = REPKV_IO_OK;
    int64_t n_retries = 0;
    if (block.staged >= 0) {
        s->staging[block.staged].readers++;
        s->stats.staged_reads++;
        record = s->staging[block.staged].data + in_block;
    } else {
        s->stats.reads++;
        s->stats.read_bytes += (int64_t)repkv_aligned(n_bytes);
        if (s->n_reading++ == 0) s->reading_since = now_ms();
    }
    const struct repkv_faults faults = s->faults;
    pthread_mutex_unlock(&s->lock);
    if (block.staged < 0) {
        const int64_t offset = block.offset + (int64_t)in_block;
        result = repkv_read_record(&s->file, faults, w->buffer, n_bytes, offset, checksum, error, &n_retries);
    }
    if (result == REPKV_IO_OK) repkv_decode(layout, k, v, record, block.n_tokens, table, w->scratch);
    pthread_mutex_lock(&s->lock);
    s->stats.retries += n_retries;
    if (block.staged >= 0) {
        struct staging *staging = s->staging + block.staged;
        if (--staging->readers == 0 && staging->state == STAGING_WRITTEN) {
            staging->state = STAGING_FREE;
            pthread_cond_broadcast(&s->written);
        }
    } else if (--s->n_reading == 0) {
        s->stats.read_ms += now_ms() - s->reading_since;
    }
    return result;
}

void store_serve(struct repkv_store *s, const struct worker *w, struct request r) {
    struct slots *layer = s->layers + r.layer;
    struct slot *slot = layer->slot + r.slot;
    const int32_t b = slot->block;
    slot->state = SLOT_READING;
    int error = 0;
    const double begin = now_ms();
    const bool ahead = slot->last != layer->now, staged = s->blocks[b].staged >= 0;
    char *k = rows_of_slot(s, s->k_rows, r.layer, r.slot, s->config.layout.k_row_bytes);
    char *v = rows_of_slot(s, s->v_rows, r.layer, r.slot, s->config.layout.v_row_bytes);
    const enum repkv_io_error result = store_load(s, w, r.layer, b, k, v, &error);
    store_record(s, staged ? REPKV_EVENT_STAGED : REPKV_EVENT_READ, r.layer, b, ahead, begin);
    if (result == REPKV_IO_OK) {
        struct place *place = (struct place *)s->places[r.layer] + b;
        place->row = s->config.first_row + r.slot * s->config.layout.max_tokens;
        place->n_tokens = s->blocks[b].n_tokens;
        place->position = (int32_t)s->blocks[b].first_position;
        slot->state = SLOT_READY;
    } else {
        /* A failed read ahead is no error: the next requirement of the block tries again. */
        if (s->requiring == r.layer && slot->last == layer->now && s->read_error.kind == REPKV_IO_OK) {
            s->read_error = (struct repkv_store_error){(int32_t)result, r.layer, b, error};
        }
        slots_release(layer, r.slot);
    }
    pthread_cond_broadcast(&s->done);
}

/* Asks for a short time slice, if the kernel knows it (Linux 6.12): compute threads keep every core busy, and a thread that
 * only starts or finishes a read must not wait for the end of their slices. The process's policy (such as SCHED_BATCH)
 * stays. */
static void be_prompt(void) {
#if defined(__linux__) && defined(SYS_sched_setattr)
    enum { KEEP_POLICY = 8 }; /* SCHED_FLAG_KEEP_POLICY */
    struct {
        uint32_t size, policy;
        uint64_t flags;
        int32_t nice;
        uint32_t priority;
        uint64_t runtime, deadline, period;
    } attributes = {.size = 48, .flags = KEEP_POLICY, .runtime = 100000};
    attributes.nice = getpriority(PRIO_PROCESS, 0);
    syscall(SYS_sched_setattr, 0, &attributes, 0);
#endif
}

static void *read_loop(void *data) {
    struct worker *w = data;
    struct repkv_store *s = w->store;
    be_prompt();
    pthread_mutex_lock(&s->lock);
    while (!s->stopping) {
        struct request r;
        if (queue_pop(s, &s->required, &r) || queue_pop(s, &s->ahead, &r)) {
            store_serve(s, w, r);
        } else {
            pthread_cond_wait(&s->work, &s->lock);
        }
    }
    pthread_mutex_unlock(&s->lock);
    return NULL;
}

static struct staging *next_to_write(struct repkv_store *s) {
    struct staging *first = NULL;
    for (int32_t i = 0; i < s->config.n_staging; i++) {
        struct staging *a = s->staging + i;
        if (a->state == STAGING_FILLED && (first == NULL || a->block < first->block)) first = a;
    }
    return first;
}

static void *write_loop(void *data) {
    struct repkv_store *s = data;
    pthread_mutex_lock(&s->lock);
    while (!s->stopping) {
        struct staging *staging = failed_write(s) ? NULL : next_to_write(s);
        if (staging == NULL) {
            pthread_cond_wait(&s->to_write, &s->lock);
            continue;
        }
        const size_t n_bytes = repkv_block_bytes(&s->config.layout, s->blocks[staging->block].n_tokens);
        const struct repkv_faults faults = s->faults;
        pthread_mutex_unlock(&s->lock);
        int error = 0;
        const double begin = now_ms();
        const enum repkv_io_error result = repkv_write_bytes(&s->file, faults, staging->data, n_bytes, staging->offset, &error);
        pthread_mutex_lock(&s->lock);
        store_record(s, REPKV_EVENT_WRITE, -1, staging->block, false, begin);
        if (result == REPKV_IO_OK) {
            s->blocks[staging->block].offset = staging->offset;
            s->blocks[staging->block].staged = -1;
            staging->state = staging->readers > 0 ? STAGING_WRITTEN : STAGING_FREE;
            s->stats.written_bytes += (int64_t)n_bytes;
            s->n_waiting--;
        } else {
            s->write_error = (struct repkv_store_error){(int32_t)result, -1, staging->block, error};
        }
        pthread_cond_broadcast(&s->written);
    }
    pthread_mutex_unlock(&s->lock);
    return NULL;
}

bool store_start_threads(struct repkv_store *s) {
    bool ok = true;
    /* Python's threads handle the signals. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (; ok && s->n_started < s->config.n_threads; s->n_started += ok) {
        struct worker *w = s->workers + s->n_started;
        ok = pthread_create(&w->thread, NULL, read_loop, w) == 0;
    }
    ok = ok && (s->has_writer = pthread_create(&s->writer, NULL, write_loop, s) == 0);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return ok;
}

void store_stop_threads(struct repkv_store *s) {
    pthread_mutex_lock(&s->lock);
    s->stopping = true;
    pthread_cond_broadcast(&s->work);
    pthread_cond_broadcast(&s->to_write);
    pthread_mutex_unlock(&s->lock);
    for (int32_t i = 0; i < s->n_started; i++) pthread_join(s->workers[i].thread, NULL);
    if (s->has_writer) pthread_join(s->writer, NULL);
}

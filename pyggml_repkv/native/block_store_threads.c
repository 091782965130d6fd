#include "block_store_private.h"

#include <signal.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    POLL_MS = 50,
    MAX_GAP = 8192, /* bytes that are read only because they lie between wanted units: cheaper than another read */
};

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
        struct slot *slot = s->lanes[r.lane].slot + r.slot;
        if (slot->state != SLOT_QUEUED || slot->listed) continue;
        slot->listed = true;
        q->items[(q->head + n++) % q->capacity] = r;
    }
    q->n = n;
    for (int32_t i = 0; i < n; i++) {
        const struct request r = q->items[(q->head + i) % q->capacity];
        s->lanes[r.lane].slot[r.slot].listed = false;
    }
}

void queue_push(struct repkv_store *s, struct queue *q, int32_t lane, int32_t slot) {
    if (q->n == q->capacity) compact(s, q);
    q->items[(q->head + q->n++) % q->capacity] = (struct request){lane, slot};
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
        if (s->lanes[r->lane].slot[r->slot].state == SLOT_QUEUED) return true;
    }
    q->head = 0; /* so that a long queue that is mostly empty stays in few pages */
    return false;
}

bool worker_open(struct repkv_store *s, struct worker *w) {
    const struct repkv_record_layout *l = &s->config.layout;
    void *buffer = NULL;
    w->store = s;
    w->scratch = malloc(2 * (size_t)(l->n_head_kv / l->n_lanes * l->head_dim) * sizeof(float));
    w->records = malloc((size_t)l->max_units * sizeof *w->records);
    if (w->scratch == NULL || w->records == NULL) return false;
    if (posix_memalign(&buffer, REPKV_ALIGN, repkv_most_lane_bytes(l)) != 0) return false;
    w->buffer = buffer;
    return true;
}

void worker_close(struct worker *w) {
    free(w->buffer);
    free(w->records);
    free(w->scratch);
}

void store_load(struct repkv_store *s, const struct worker *w, int32_t lane, int32_t first, int32_t n_units, int *error) {
    const struct repkv_record_layout *layout = &s->config.layout;
    const struct unit *units = s->units + first;
    const struct block block = s->blocks[units->block];
    struct repkv_record *records = w->records;
    /* From the lane's first page that holds any of them to the last. */
    const size_t begin = block.staged >= 0 ? 0 : units->at / REPKV_ALIGN * REPKV_ALIGN;
    for (int32_t i = 0; i < n_units; i++) {
        records[i].at = units[i].at - begin;
        records[i].n_tokens = units[i].n_tokens;
        records[i].n_bytes = repkv_record_bytes(layout, units[i].n_tokens);
        records[i].checksum = s->checksums[(size_t)(first + i) * all_lanes(s) + (size_t)lane];
        records[i].result = REPKV_IO_OK;
    }
    const size_t n_bytes = repkv_aligned(records[n_units - 1].at + records[n_units - 1].n_bytes);
    const size_t in_block = layout->header_bytes + (size_t)lane * block.lane_bytes + begin;
    const float *table = block.rotated ? s->unrotate : NULL;
    const char *buffer = w->buffer;
    int64_t n_retries = 0;
    if (block.staged >= 0) {
        s->staging[block.staged].readers++;
        s->stats.staged_reads++;
        buffer = s->staging[block.staged].data + in_block;
    } else {
        s->stats.reads++;
        s->stats.read_bytes += (int64_t)n_bytes;
        if (s->n_reading++ == 0) s->reading_since = now_ms();
    }
    const struct repkv_faults faults = s->faults;
    pthread_mutex_unlock(&s->lock);
    if (block.staged < 0) {
        repkv_read_records(&s->file, faults, w->buffer, n_bytes, block.offset + (int64_t)in_block, records, n_units, error,
                           &n_retries);
    }
    for (int32_t i = 0; i < n_units; i++) {
        const float *from = table ? table + (block.first_position + units[i].first) * layout->rope_dim : NULL;
        if (records[i].k && records[i].result == REPKV_IO_OK) repkv_decode(layout, buffer, records + i, from, w->scratch);
    }
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
}

static bool is_queued(const struct slots *lane, int32_t unit) {
    const int32_t at = slot_of(lane, unit);
    return at >= 0 && lane->slot[at].state == SLOT_QUEUED;
}

/* Returns the last of the queued units that one read brings along with `unit`; `end` bounds its block, step is 1 or -1. */
static int32_t run_end(const struct repkv_store *s, const struct slots *lane, int32_t unit, int32_t end, int32_t step) {
    int32_t last = unit;
    for (int32_t u = unit + step; u != end; u += step) {
        const uint32_t gap = step > 0 ? s->units[u].at - s->units[last + 1].at : s->units[last].at - s->units[u + 1].at;
        if (gap > MAX_GAP) break;
        if (is_queued(lane, u)) last = u;
    }
    return last;
}

/* Takes note of a unit of a lane that was read into its slot, or that could not be. */
static void finish(struct repkv_store *s, int32_t lane_index, int32_t u, enum repkv_io_error result, int error) {
    const struct repkv_record_layout *layout = &s->config.layout;
    struct slots *lane = s->lanes + lane_index;
    const int32_t layer = lane_index / layout->n_lanes, l = lane_index % layout->n_lanes, at = slot_of(lane, u);
    const struct unit *unit = s->units + u;
    const bool required = s->requiring == layer && lane->slot[at].last == lane->now;
    lane->n_reading--;
    if (result == REPKV_IO_OK) {
        struct place *place = (struct place *)s->places[layer] + (size_t)l * (size_t)s->config.max_units + u;
        place->row = s->config.first_row + at * layout->max_unit_tokens;
        place->n_tokens = unit->n_tokens;
        place->position = (int32_t)s->blocks[unit->block].first_position + unit->first;
        lane->slot[at].state = SLOT_READY;
        s->n_missing -= required;
        return;
    }
    /* A failed read ahead is no error: the next requirement of the unit tries again. */
    if (required && s->read_error.kind == REPKV_IO_OK) {
        s->read_error = (struct repkv_store_error){(int32_t)result, layer, unit->block, error};
    }
    slots_release(lane, at);
}

void store_serve(struct repkv_store *s, const struct worker *w, struct request r) {
    const struct repkv_record_layout *layout = &s->config.layout;
    struct slots *lane = s->lanes + r.lane;
    const struct slot *asked = lane->slot + r.slot;
    const int32_t b = s->units[asked->unit].block;
    const struct block *block = s->blocks + b;
    const int32_t first = run_end(s, lane, asked->unit, block->first_unit - 1, -1);
    const int32_t n = run_end(s, lane, asked->unit, block->first_unit + block->n_units, 1) + 1 - first;
    struct repkv_event event = {
        .kind = block->staged >= 0 ? REPKV_EVENT_STAGED : REPKV_EVENT_READ,
        .layer = r.lane / layout->n_lanes,
        .lane = r.lane % layout->n_lanes,
        .block = b,
        .ahead = asked->last != lane->now,
        .begin_ms = now_ms(),
    };
    for (int32_t i = 0; i < n; i++) {
        struct repkv_record *record = w->records + i;
        record->k = record->v = NULL;
        if (!is_queued(lane, first + i)) continue;
        const int32_t at = slot_of(lane, first + i);
        slots_begin_read(lane, at);
        record->k = rows_of_slot(s, s->k_rows, r.lane, at, layout->k_row_bytes);
        record->v = rows_of_slot(s, s->v_rows, r.lane, at, layout->v_row_bytes);
        event.n_units++;
    }
    int error = 0;
    store_load(s, w, r.lane, first, n, &error);
    store_record(s, event);
    for (int32_t i = 0; i < n; i++) {
        if (w->records[i].k != NULL) finish(s, r.lane, first + i, w->records[i].result, error);
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
        const size_t n_bytes = s->config.layout.header_bytes + all_lanes(s) * s->blocks[staging->block].lane_bytes;
        const struct repkv_faults faults = s->faults;
        pthread_mutex_unlock(&s->lock);
        int error = 0;
        const double begin = now_ms();
        const enum repkv_io_error result = repkv_write_bytes(&s->file, faults, staging->data, n_bytes, staging->offset, &error);
        pthread_mutex_lock(&s->lock);
        store_record(s, (struct repkv_event){.kind = REPKV_EVENT_WRITE, .layer = -1, .lane = -1, .block = staging->block,
                                             .n_units = s->blocks[staging->block].n_units, .begin_ms = begin});
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

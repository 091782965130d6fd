#include "block_store.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "compute.h"
#include "slots.h"
#include "xxh64.h"

enum { MAX_THREADS = 64, POLL_MS = 50 };

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
    int32_t n_waiting; /* staged blocks that are not written */
    int32_t filling;   /* staging buffer of the last put */
    struct queue required, ahead;
    struct worker *workers; /* the last one is of the thread that computes */
    int32_t n_started;
    pthread_t writer;
    bool has_writer, stopping;
    pthread_mutex_t lock;
    pthread_cond_t work, done, to_write, written;
    const float *unrotate;
    struct repkv_store_stats stats;
    int32_t requiring;                   /* layer whose requirement is running, -1: none */
    struct repkv_store_error read_error; /* what fails that requirement, or failed the last one */
    struct repkv_store_error write_error;
    int32_t n_reading;
    double reading_since;
    int32_t *audited; /* [n_layer, n_slots]: block, or -1 */
    uint64_t random;
    struct repkv_event *events;
    int32_t n_events, max_events;
};

static double now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

/* With the lock held. */
static void record(struct repkv_store *s, enum repkv_event_kind kind, int32_t layer, int32_t block, bool ahead, double begin) {
    if (s->n_events == s->max_events) return;
    s->events[s->n_events++] = (struct repkv_event){(int32_t)kind, layer, block, ahead, begin, now_ms()};
}

static void wait_a_while(pthread_cond_t *condition, pthread_mutex_t *lock) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    t.tv_nsec += POLL_MS * 1000000L;
    if (t.tv_nsec >= 1000000000L) {
        t.tv_sec++;
        t.tv_nsec -= 1000000000L;
    }
    pthread_cond_timedwait(condition, lock, &t);
}

/* Forgets requests that nobody waits for any more. */
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

static void push(struct repkv_store *s, struct queue *q, int32_t layer, int32_t slot) {
    if (q->n == q->capacity) compact(s, q);
    q->items[(q->head + q->n++) % q->capacity] = (struct request){layer, slot};
}

/* The next request whose slot still waits for it; false if there is none. */
static bool pop(struct repkv_store *s, struct queue *q, struct request *r) {
    while (q->n > 0) {
        if (s->file.faults.reorder) {
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

static char *rows_of_slot(const struct repkv_store *s, char **rows, int32_t layer, int32_t slot, size_t row_bytes) {
    return rows[layer] + ((size_t)s->config.first_row + (size_t)slot * (size_t)s->config.layout.max_tokens) * row_bytes;
}

/* A block's rows of one layer into k and v; called and left with the lock held, which is free meanwhile. */
static enum repkv_io_error load(struct repkv_store *s, const struct worker *w, int32_t layer, int32_t b, char *k, char *v,
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
    pthread_mutex_unlock(&s->lock);
    if (block.staged < 0) {
        result = repkv_read_record(&s->file, w->buffer, n_bytes, block.offset + (int64_t)in_block, checksum, error, &n_retries);
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

static void serve(struct repkv_store *s, const struct worker *w, struct request r) {
    struct slots *layer = s->layers + r.layer;
    struct slot *slot = layer->slot + r.slot;
    const int32_t b = slot->block;
    slot->state = SLOT_READING;
    int error = 0;
    const double begin = now_ms();
    const bool ahead = slot->last != layer->now, staged = s->blocks[b].staged >= 0;
    const enum repkv_io_error result =
        load(s, w, r.layer, b, rows_of_slot(s, s->k_rows, r.layer, r.slot, s->config.layout.k_row_bytes),
             rows_of_slot(s, s->v_rows, r.layer, r.slot, s->config.layout.v_row_bytes), &error);
    record(s, staged ? REPKV_EVENT_STAGED : REPKV_EVENT_READ, r.layer, b, ahead, begin);
    if (result == REPKV_IO_OK) {
        struct place *place = (struct place *)s->places[r.layer] + b;
        place->row = s->config.first_row + r.slot * s->config.layout.max_tokens;
        place->n_tokens = s->blocks[b].n_tokens;
        slot->state = SLOT_READY;
    } else {
        /* A block that nobody waits for is not lost yet: whoever asks for it will try again. */
        if (s->requiring == r.layer && slot->last == layer->now && s->read_error.kind == REPKV_IO_OK) {
            s->read_error = (struct repkv_store_error){(int32_t)result, r.layer, b, error};
        }
        slots_release(layer, r.slot);
    }
    pthread_cond_broadcast(&s->done);
}

/* Asks for a short time slice, where the kernel knows it (Linux 6.12): compute threads keep every core busy, and a thread
 * that has only to start a read or to take one in must not wait for the end of their slices. The policy that the process
 * was given (SCHED_BATCH, say) stays. */
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
        if (pop(s, &s->required, &r) || pop(s, &s->ahead, &r)) {
            serve(s, w, r);
        } else {
            pthread_cond_wait(&s->work, &s->lock);
        }
    }
    pthread_mutex_unlock(&s->lock);
    return NULL;
}

static bool failed_write(const struct repkv_store *s) {
    return s->write_error.kind != REPKV_IO_OK;
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
        pthread_mutex_unlock(&s->lock);
        int error = 0;
        const double begin = now_ms();
        const enum repkv_io_error result = repkv_write_bytes(&s->file, staging->data, n_bytes, staging->offset, &error);
        pthread_mutex_lock(&s->lock);
        record(s, REPKV_EVENT_WRITE, -1, staging->block, false, begin);
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

static bool worker_open(struct repkv_store *s, struct worker *w) {
    const struct repkv_record_layout *l = &s->config.layout;
    void *buffer = NULL;
    w->store = s;
    w->scratch = malloc(2 * (size_t)(l->n_head_kv * l->head_dim) * sizeof(float));
    if (w->scratch == NULL) return false;
    if (posix_memalign(&buffer, REPKV_ALIGN, repkv_aligned(repkv_record_bytes(l, l->max_tokens))) != 0) return false;
    w->buffer = buffer;
    return true;
}

static void worker_close(struct worker *w) {
    free(w->buffer);
    free(w->scratch);
}

static bool open_tables(struct repkv_store *s) {
    const struct repkv_store_config *c = &s->config;
    const size_t n_layer = (size_t)c->layout.n_layer, n_slots = (size_t)c->n_slots, n_blocks = (size_t)c->max_blocks;
    s->layers = calloc(n_layer, sizeof *s->layers);
    s->blocks = calloc(n_blocks, sizeof *s->blocks);
    s->checksums = calloc(n_blocks * n_layer, sizeof *s->checksums);
    s->staging = calloc((size_t)c->n_staging, sizeof *s->staging);
    s->workers = calloc((size_t)c->n_threads + 1, sizeof *s->workers);
    s->audited = c->debug ? malloc(n_layer * n_slots * sizeof *s->audited) : NULL;
    if (!s->layers || !s->blocks || !s->checksums || !s->staging || !s->workers || (c->debug && !s->audited)) return false;
    for (size_t i = 0; c->debug && i < n_layer * n_slots; i++) s->audited[i] = -1;
    for (size_t i = 0; i < n_layer; i++) {
        struct slots *layer = s->layers + i;
        *layer = (struct slots){.n = c->n_slots, .weight = 1.0};
        layer->slot = calloc(n_slots, sizeof *layer->slot);
        layer->slot_of = malloc(n_blocks * sizeof *layer->slot_of);
        if (!layer->slot || !layer->slot_of) return false;
        for (size_t b = 0; b < n_blocks; b++) layer->slot_of[b] = -1;
    }
    struct queue *queues[2] = {&s->required, &s->ahead};
    for (int i = 0; i < 2; i++) {
        /* One for each slot, and room for those whose slot was taken back meanwhile. */
        queues[i]->capacity = (int32_t)(2 * n_layer * n_slots + 64);
        queues[i]->items = malloc((size_t)queues[i]->capacity * sizeof *queues[i]->items);
        if (queues[i]->items == NULL) return false;
    }
    for (int32_t i = 0; i < c->n_staging; i++) {
        void *data = NULL;
        if (posix_memalign(&data, REPKV_ALIGN, repkv_block_bytes(&c->layout, c->layout.max_tokens)) != 0) return false;
        s->staging[i].data = data;
    }
    return true;
}

struct repkv_store *repkv_store_open(const struct repkv_store_config *config, char **k_rows, char **v_rows, int32_t **places) {
    struct repkv_store *s = calloc(1, sizeof *s);
    if (s == NULL) return NULL;
    s->config = *config;
    if (s->config.n_threads > MAX_THREADS) s->config.n_threads = MAX_THREADS;
    const size_t n_layer = (size_t)config->layout.n_layer;
    s->file.fd = config->fd;
    s->filling = s->requiring = -1;
    pthread_mutex_init(&s->lock, NULL);
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_t *conditions[4] = {&s->work, &s->done, &s->to_write, &s->written};
    for (int i = 0; i < 4; i++) pthread_cond_init(conditions[i], &monotonic);
    pthread_condattr_destroy(&monotonic);
    s->k_rows = malloc(n_layer * sizeof *k_rows);
    s->v_rows = malloc(n_layer * sizeof *v_rows);
    s->places = malloc(n_layer * sizeof *places);
    bool ok = s->k_rows && s->v_rows && s->places && open_tables(s);
    if (ok) {
        memcpy(s->k_rows, k_rows, n_layer * sizeof *k_rows);
        memcpy(s->v_rows, v_rows, n_layer * sizeof *v_rows);
        memcpy(s->places, places, n_layer * sizeof *places);
    }
    for (int32_t i = 0; ok && i <= s->config.n_threads; i++) ok = worker_open(s, s->workers + i);
    /* Signals are for Python's threads. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (; ok && s->n_started < s->config.n_threads; s->n_started += ok) {
        struct worker *w = s->workers + s->n_started;
        ok = pthread_create(&w->thread, NULL, read_loop, w) == 0;
    }
    ok = ok && (s->has_writer = pthread_create(&s->writer, NULL, write_loop, s) == 0);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (ok) return s;
    repkv_store_close(s);
    return NULL;
}

void repkv_store_close(struct repkv_store *s) {
    pthread_mutex_lock(&s->lock);
    s->stopping = true;
    pthread_cond_broadcast(&s->work);
    pthread_cond_broadcast(&s->to_write);
    pthread_mutex_unlock(&s->lock);
    for (int32_t i = 0; i < s->n_started; i++) pthread_join(s->workers[i].thread, NULL);
    if (s->has_writer) pthread_join(s->writer, NULL);
    for (int32_t i = 0; s->workers && i <= s->config.n_threads; i++) worker_close(s->workers + i);
    for (int32_t i = 0; s->staging && i < s->config.n_staging; i++) free(s->staging[i].data);
    for (int32_t i = 0; s->layers && i < s->config.layout.n_layer; i++) {
        free(s->layers[i].slot);
        free(s->layers[i].slot_of);
    }
    void *tables[] = {s->k_rows, s->v_rows, s->places, s->layers, s->blocks, s->checksums, s->staging, s->workers, s->audited,
                      s->required.items, s->ahead.items};
    for (size_t i = 0; i < sizeof tables / sizeof *tables; i++) free(tables[i]);
    pthread_cond_t *conditions[4] = {&s->work, &s->done, &s->to_write, &s->written};
    for (int i = 0; i < 4; i++) pthread_cond_destroy(conditions[i]);
    pthread_mutex_destroy(&s->lock);
    free(s);
}

static int32_t free_staging(const struct repkv_store *s) {
    for (int32_t i = 0; i < s->config.n_staging; i++) {
        /* One that was put and never committed is as good as free. */
        if (s->staging[i].state == STAGING_FREE || s->staging[i].state == STAGING_FILLING) return i;
    }
    return -1;
}

int repkv_store_put(struct repkv_store *s, int32_t block, int32_t n_tokens, int32_t rotated, int64_t first_position,
                    char **k_rows, char **v_rows, uint64_t *checksums) {
    const struct repkv_record_layout *layout = &s->config.layout;
    const struct worker *own = s->workers + s->config.n_threads;
    pthread_mutex_lock(&s->lock);
    const double start = now_ms();
    int32_t at = free_staging(s);
    if (at < 0 && !failed_write(s)) {
        wait_a_while(&s->written, &s->lock);
        at = free_staging(s);
    }
    const int status = failed_write(s) ? -1 : at < 0;
    s->stats.write_wait_ms += now_ms() - start;
    if (status == 0) s->staging[at].state = STAGING_FILLING;
    pthread_mutex_unlock(&s->lock);
    if (status != 0) return status;

    struct staging *staging = s->staging + at;
    char *record = staging->data + layout->header_bytes;
    for (int32_t i = 0; i < layout->n_layer; i++, record += repkv_aligned(repkv_record_bytes(layout, n_tokens))) {
        checksums[i] = repkv_encode(layout, record, k_rows[i], v_rows[i], n_tokens, own->scratch);
    }
    pthread_mutex_lock(&s->lock);
    staging->block = block;
    s->blocks[block] = (struct block){-1, first_position, n_tokens, at, rotated != 0};
    memcpy(s->checksums + (size_t)block * (size_t)layout->n_layer, checksums, (size_t)layout->n_layer * sizeof *checksums);
    s->filling = at;
    pthread_mutex_unlock(&s->lock);
    return 0;
}

void repkv_store_commit(struct repkv_store *s, const char *header, int64_t offset) {
    struct staging *staging = s->staging + s->filling;
    memcpy(staging->data, header, s->config.layout.header_bytes);
    pthread_mutex_lock(&s->lock);
    staging->offset = offset;
    staging->state = STAGING_FILLED;
    s->n_waiting++;
    pthread_cond_signal(&s->to_write);
    pthread_mutex_unlock(&s->lock);
}

void repkv_store_add(struct repkv_store *s, int32_t block, int32_t n_tokens, int32_t rotated, int64_t first_position,
                     int64_t offset, const uint64_t *checksums) {
    const size_t n_layer = (size_t)s->config.layout.n_layer;
    pthread_mutex_lock(&s->lock);
    s->blocks[block] = (struct block){offset, first_position, n_tokens, -1, rotated != 0};
    memcpy(s->checksums + (size_t)block * n_layer, checksums, n_layer * sizeof *checksums);
    pthread_mutex_unlock(&s->lock);
}

int repkv_store_flush(struct repkv_store *s) {
    pthread_mutex_lock(&s->lock);
    if (s->n_waiting > 0 && !failed_write(s)) wait_a_while(&s->written, &s->lock);
    const int status = failed_write(s) ? -1 : s->n_waiting > 0;
    pthread_mutex_unlock(&s->lock);
    return status;
}

static void poison(struct repkv_store *s, int32_t layer, int32_t slot) {
    const struct repkv_record_layout *l = &s->config.layout;
    memset(rows_of_slot(s, s->k_rows, layer, slot, l->k_row_bytes), 0xff, (size_t)l->max_tokens * l->k_row_bytes);
    memset(rows_of_slot(s, s->v_rows, layer, slot, l->v_row_bytes), 0xff, (size_t)l->max_tokens * l->v_row_bytes);
}

static bool ask(struct repkv_store *s, struct queue *q, int32_t layer, int32_t block, double limit) {
    const int32_t slot = slots_take(s->layers + layer, block, limit);
    if (slot < 0) return false;
    if (s->config.debug) poison(s, layer, slot);
    push(s, q, layer, slot);
    return true;
}

/* Blocks that score less than `limit` give way. */
static void read_ahead(struct repkv_store *s, int32_t layer_index, const int32_t *blocks, int32_t n, double limit) {
    struct slots *layer = s->layers + layer_index;
    layer->n_prefetches++;
    for (int32_t i = 0; i < n; i++) {
        const int32_t slot = layer->slot_of[blocks[i]];
        if (slot >= 0) layer->slot[slot].kept = layer->n_prefetches;
    }
    int32_t n_asked = 0;
    for (int32_t i = 0; i < n; i++) {
        if (layer->slot_of[blocks[i]] >= 0) continue;
        if (!ask(s, &s->ahead, layer_index, blocks[i], limit)) break;
        struct slot *slot = layer->slot + layer->slot_of[blocks[i]];
        slot->score = SLOT_PREFETCH_SCORE * layer->weight;
        slot->kept = layer->n_prefetches;
        slot->ahead = true;
        n_asked++;
    }
    s->stats.issued += n_asked;
    if (n_asked > 1) pthread_cond_broadcast(&s->work);
    if (n_asked == 1) pthread_cond_signal(&s->work);
}

void repkv_store_prefetch(struct repkv_store *s, int32_t layer, const int32_t *blocks, int32_t n) {
    pthread_mutex_lock(&s->lock);
    read_ahead(s, layer, blocks, n, SLOT_PREFETCH_SCORE * s->layers[layer].weight);
    pthread_mutex_unlock(&s->lock);
}

void repkv_store_fetch(struct repkv_store *s, int32_t layer, const int32_t *blocks, int32_t n) {
    pthread_mutex_lock(&s->lock);
    read_ahead(s, layer, blocks, n, SLOT_ANY);
    pthread_mutex_unlock(&s->lock);
}

/* Reads that were queued ahead for a layer and are not wanted by its requirement are no longer worth anything. */
static void drop_stale(struct slots *layer) {
    for (int32_t i = 0; i < layer->n_used; i++) {
        struct slot *slot = layer->slot + i;
        if (slot->state == SLOT_QUEUED && slot->last != layer->now) slots_release(layer, i);
    }
}

static int32_t count_pending(const struct slots *layer, const int32_t *selected, int32_t n_rows, int64_t stride) {
    int32_t n = 0;
    for (int32_t r = 0; r < n_rows; r++) {
        const int32_t *row = selected + r * stride;
        for (int32_t i = 1; i <= row[0]; i++) {
            const int32_t slot = layer->slot_of[row[i]];
            n += slot < 0 || layer->slot[slot].state != SLOT_READY;
        }
    }
    return n;
}

/* Counts and raises what is there, queues what is not; -1 if a slot must become free first. */
static int ask_for_all(struct repkv_store *s, int32_t layer_index, const int32_t *selected, int32_t n_rows, int64_t stride) {
    struct slots *layer = s->layers + layer_index;
    int32_t n_queued = 0;
    int status = 0;
    for (int pass = 0; pass < 2; pass++) {
        for (int32_t r = 0; r < n_rows && status == 0; r++) {
            const int32_t *row = selected + r * stride;
            for (int32_t i = 1; i <= row[0] && status == 0; i++) {
                const int32_t b = row[i];
                const int32_t at = layer->slot_of[b];
                if (pass == 0 && at < 0) continue;
                if (pass == 1 && at >= 0) continue;
                if (pass == 1) {
                    if (!ask(s, &s->required, layer_index, b, SLOT_REQUIRED)) {
                        status = -1;
                        break;
                    }
                    n_queued++;
                }
                struct slot *slot = layer->slot + layer->slot_of[b];
                if (slot->last == layer->now) continue; /* another head wants it too */
                s->stats.required++;
                if (pass == 1) s->stats.missed++;
                if (pass == 0 && slot->state == SLOT_READY) s->stats.hits++;
                if (pass == 0 && slot->state != SLOT_READY) s->stats.late++;
                if (pass == 0 && slot->state == SLOT_QUEUED) push(s, &s->required, layer_index, layer->slot_of[b]);
                s->stats.used += slot->ahead;
                slot->ahead = false;
                /* What was fetched ahead counts as if it came now. */
                slot->score += layer->weight;
                slot->last = layer->now;
            }
        }
        if (pass == 0) drop_stale(layer);
    }
    if (n_queued > 0) pthread_cond_broadcast(&s->work);
    return status;
}

int repkv_store_require(struct repkv_store *s, int32_t layer_index, const int32_t *selected, int32_t n_rows, int64_t stride) {
    struct slots *layer = s->layers + layer_index;
    const struct worker *own = s->workers + s->config.n_threads;
    int status = 0;
    pthread_mutex_lock(&s->lock);
    s->requiring = layer_index;
    s->read_error = (struct repkv_store_error){0};
    slots_tick(layer);
    record(s, REPKV_EVENT_SELECTED, layer_index, -1, false, now_ms());
    int complete = ask_for_all(s, layer_index, selected, n_rows, stride);
    if (complete != 0 || count_pending(layer, selected, n_rows, stride) > 0) {
        const double start = now_ms();
        while (status == 0) {
            if (complete != 0) complete = ask_for_all(s, layer_index, selected, n_rows, stride);
            struct request r;
            if (s->read_error.kind != REPKV_IO_OK) status = -1;
            else if (repkv_abort_requested()) status = -2;
            else if (complete == 0 && count_pending(layer, selected, n_rows, stride) == 0) break;
            else if (pop(s, &s->required, &r)) serve(s, own, r);
            else wait_a_while(&s->done, &s->lock);
        }
        s->stats.wait_ms += now_ms() - start;
        record(s, REPKV_EVENT_WAIT, layer_index, -1, false, start);
    }
    s->requiring = -1;
    if (s->config.debug) {
        int32_t *audited = s->audited + (size_t)layer_index * (size_t)s->config.n_slots;
        for (int32_t i = 0; i < layer->n; i++) {
            const bool named = i < layer->n_used && layer->slot[i].state == SLOT_READY && layer->slot[i].last == layer->now;
            audited[i] = named ? layer->slot[i].block : -1;
        }
    }
    pthread_mutex_unlock(&s->lock);
    return status;
}

int repkv_store_audit(struct repkv_store *s, int32_t layer_index) {
    if (!s->config.debug) return 0;
    const struct slots *layer = s->layers + layer_index;
    const int32_t *audited = s->audited + (size_t)layer_index * (size_t)s->config.n_slots;
    int n_changed = 0;
    pthread_mutex_lock(&s->lock);
    for (int32_t i = 0; i < layer->n_used; i++) {
        if (audited[i] < 0) continue;
        const struct slot *slot = layer->slot + i;
        n_changed += slot->state != SLOT_READY || slot->block != audited[i];
    }
    pthread_mutex_unlock(&s->lock);
    return n_changed;
}

int repkv_store_read(struct repkv_store *s, int32_t layer, int32_t block, char *k, char *v, struct repkv_store_error *error) {
    /* Buffers of this call: the caller may be another thread than the one that computes, whose own are in use. */
    struct worker reader = {0};
    *error = (struct repkv_store_error){REPKV_IO_READ, layer, block, ENOMEM};
    if (worker_open(s, &reader)) {
        pthread_mutex_lock(&s->lock);
        error->kind = (int32_t)load(s, &reader, layer, block, k, v, &error->error);
        pthread_mutex_unlock(&s->lock);
    }
    worker_close(&reader);
    return error->kind == REPKV_IO_OK ? 0 : -1;
}

void repkv_store_unrotate(struct repkv_store *s, const float *table) {
    pthread_mutex_lock(&s->lock);
    /* With nothing queued no thread begins to read while this one waits. */
    s->required.n = s->ahead.n = 0;
    for (int32_t l = 0; l < s->config.layout.n_layer; l++) {
        struct slots *layer = s->layers + l;
        for (int32_t i = 0; i < layer->n_used; i++) {
            while (layer->slot[i].state == SLOT_READING) wait_a_while(&s->done, &s->lock);
            if (layer->slot[i].state != SLOT_FREE) slots_release(layer, i);
        }
    }
    s->unrotate = table;
    pthread_mutex_unlock(&s->lock);
}

void repkv_store_resident(struct repkv_store *s, int32_t layer_index, int32_t *blocks) {
    const struct slots *layer = s->layers + layer_index;
    pthread_mutex_lock(&s->lock);
    for (int32_t i = 0; i < layer->n; i++) {
        blocks[i] = i < layer->n_used && layer->slot[i].state == SLOT_READY ? layer->slot[i].block : -1;
    }
    pthread_mutex_unlock(&s->lock);
}

void repkv_store_get_stats(struct repkv_store *s, struct repkv_store_stats *stats) {
    pthread_mutex_lock(&s->lock);
    *stats = s->stats;
    if (s->n_reading > 0) stats->read_ms += now_ms() - s->reading_since;
    pthread_mutex_unlock(&s->lock);
}

struct repkv_store_error repkv_store_last_error(struct repkv_store *s, int32_t of_writes) {
    pthread_mutex_lock(&s->lock);
    const struct repkv_store_error error = of_writes ? s->write_error : s->read_error;
    pthread_mutex_unlock(&s->lock);
    return error;
}

void repkv_store_inject(struct repkv_store *s, const struct repkv_faults *faults) {
    pthread_mutex_lock(&s->lock);
    s->file.faults = *faults;
    s->random = faults->seed;
    pthread_mutex_unlock(&s->lock);
}

int32_t repkv_store_trace(struct repkv_store *s, struct repkv_event *events, int32_t n) {
    pthread_mutex_lock(&s->lock);
    const int32_t n_recorded = s->n_events;
    s->events = events;
    s->max_events = events ? n : 0;
    s->n_events = 0;
    pthread_mutex_unlock(&s->lock);
    return n_recorded;
}

uint64_t repkv_checksum(const char *data, size_t n_bytes) {
    return xxh64(data, n_bytes, 0);
}

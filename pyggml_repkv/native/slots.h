/* Which unit lies in which slot of a lane. Only the block store uses it, under its lock. */
#ifndef REPKV_SLOTS_H
#define REPKV_SLOTS_H

#include <stdbool.h>
#include <stdint.h>

enum slot_state {
    SLOT_FREE,
    SLOT_QUEUED,  /* waits for a thread to read it */
    SLOT_READING, /* a thread reads it */
    SLOT_READY,
};

struct slot {
    double score;   /* in units of the lane's `weight` at its last raise, so that no slot needs to decay */
    int64_t last;   /* the last requirement that wanted it */
    int64_t kept;   /* the last prefetch that wanted it */
    int32_t unit;   /* of a free slot: the next free one, -1: none */
    uint8_t state;
    bool ahead; /* read ahead, not required yet */
    bool listed;
};

struct slots {
    struct slot *slot;
    int32_t *slot_after; /* [max_units]: the slot of a unit plus 1, 0: none. Most of a long context is never touched */
    int32_t n, n_used; /* slots from n_used on were never used */
    int32_t first_free; /* below n_used, -1: none */
    int32_t n_queued, n_reading;
    double weight;     /* what a score of 1 is worth now */
    int64_t now, n_prefetches;
};

/* Slots that may give way, the next one first: a heap. n is -1 until they are needed. */
struct victims {
    int32_t *slot;
    int32_t n;
};

static const double SLOT_DECAY = 0.9, SLOT_PREFETCH_SCORE = 0.5;

/* Limits for slots_take, above any score: for a unit that is probably wanted, and for one that is required now. */
static const double SLOT_ANY = 1e300, SLOT_REQUIRED = 1e301;

/* Begins another requirement. All scores decay, because new ones are worth more. */
static inline void slots_tick(struct slots *s) {
    s->now++;
    s->weight /= SLOT_DECAY;
    if (s->weight < 1e200) return;
    for (int32_t i = 0; i < s->n_used; i++) s->slot[i].score *= 1e-200;
    s->weight *= 1e-200;
}

/* Returns the slot of a unit, -1: none. */
static inline int32_t slot_of(const struct slots *s, int32_t unit) {
    return s->slot_after[unit] - 1;
}

static inline void slots_begin_read(struct slots *s, int32_t i) {
    s->slot[i].state = SLOT_READING;
    s->n_queued--;
    s->n_reading++;
}

static inline void slots_release(struct slots *s, int32_t i) {
    s->n_queued -= s->slot[i].state == SLOT_QUEUED;
    s->slot_after[s->slot[i].unit] = 0;
    s->slot[i].state = SLOT_FREE;
    s->slot[i].unit = s->first_free;
    s->first_free = i;
}

/* Whether slot a gives way before slot b. */
static inline bool slots_before(const struct slots *s, int32_t a, int32_t b) {
    const struct slot *x = s->slot + a, *y = s->slot + b;
    if (x->score != y->score) return x->score < y->score;
    return x->last != y->last ? x->last < y->last : a < b;
}

static inline void victims_sink(const struct slots *s, struct victims *v, int32_t at) {
    const int32_t slot = v->slot[at];
    for (int32_t child; (child = 2 * at + 1) < v->n; at = child) {
        if (child + 1 < v->n && slots_before(s, v->slot[child + 1], v->slot[child])) child++;
        if (!slots_before(s, v->slot[child], slot)) break;
        v->slot[at] = v->slot[child];
    }
    v->slot[at] = slot;
}

static inline void victims_find(const struct slots *s, struct victims *v, double limit) {
    v->n = 0;
    for (int32_t i = 0; i < s->n_used; i++) {
        const struct slot *a = s->slot + i;
        if (a->state != SLOT_READY || a->last == s->now || (a->kept == s->n_prefetches && limit < SLOT_REQUIRED)) continue;
        if (a->score < limit) v->slot[v->n++] = i;
    }
    for (int32_t at = v->n / 2 - 1; at >= 0; at--) victims_sink(s, v, at);
}

/* Returns a slot for a unit, queued and with score 0: a free one, else the one with the lowest score below `limit` that is
 * ready and neither required now nor kept by the present prefetch. -1: none. `victims` serves as many calls as follow one
 * another with the same limit. */
static inline int32_t slots_take(struct slots *s, int32_t unit, double limit, struct victims *victims) {
    int32_t taken = s->first_free;
    if (taken >= 0) {
        s->first_free = s->slot[taken].unit;
    } else if (s->n_used < s->n) {
        taken = s->n_used++;
    } else {
        if (victims->n < 0) victims_find(s, victims, limit);
        if (victims->n == 0) return -1;
        taken = victims->slot[0];
        victims->slot[0] = victims->slot[--victims->n];
        if (victims->n > 0) victims_sink(s, victims, 0);
        s->slot_after[s->slot[taken].unit] = 0;
    }
    s->slot[taken] = (struct slot){.unit = unit, .state = SLOT_QUEUED, .last = -1, .kept = -1};
    s->slot_after[unit] = taken + 1;
    s->n_queued++;
    return taken;
}

#endif

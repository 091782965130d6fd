/* Which block lies in which slot of a layer. Only the block store uses it, under its lock. */
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
    double score;   /* in units of the layer's `weight` at its last raise, so that no slot needs to decay */
    int64_t last;   /* the last requirement that wanted it */
    int64_t kept;   /* the last prefetch that wanted it */
    int32_t block;
    uint8_t state;
    bool ahead; /* read ahead, not required yet */
    bool listed;
};

struct slots {
    struct slot *slot;
    int32_t *slot_of; /* [max_blocks], -1: none */
    int32_t n, n_used; /* slots from n_used on were never used */
    int32_t n_free;    /* below n_used */
    double weight;     /* what a score of 1 is worth now */
    int64_t now, n_prefetches;
};

static const double SLOT_DECAY = 0.9, SLOT_PREFETCH_SCORE = 0.5;

/* Limits for slots_take, above any score: for a block that is probably wanted, and for one that is required now. */
static const double SLOT_ANY = 1e300, SLOT_REQUIRED = 1e301;

/* Begins another requirement. All scores decay, because new ones are worth more. */
static inline void slots_tick(struct slots *s) {
    s->now++;
    s->weight /= SLOT_DECAY;
    if (s->weight < 1e200) return;
    for (int32_t i = 0; i < s->n_used; i++) s->slot[i].score *= 1e-200;
    s->weight *= 1e-200;
}

static inline void slots_release(struct slots *s, int32_t i) {
    s->slot_of[s->slot[i].block] = -1;
    s->slot[i].state = SLOT_FREE;
    s->n_free++;
}

/* Returns a slot for a block, queued and with score 0: the lowest free one, else the one with the lowest score below `limit`
 * that is ready and neither required now nor kept by the present prefetch. -1: none. */
static inline int32_t slots_take(struct slots *s, int32_t block, double limit) {
    int32_t best = -1;
    if (s->n_free > 0) {
        for (best = 0; s->slot[best].state != SLOT_FREE;) best++;
        s->n_free--;
    } else if (s->n_used < s->n) {
        best = s->n_used++;
    } else {
        for (int32_t i = 0; i < s->n; i++) {
            const struct slot *a = s->slot + i;
            if (a->state != SLOT_READY || a->last == s->now || (a->kept == s->n_prefetches && limit < SLOT_REQUIRED)) continue;
            if (!(a->score < limit)) continue;
            if (best < 0 || a->score < s->slot[best].score ||
                (a->score == s->slot[best].score && a->last < s->slot[best].last)) {
                best = i;
            }
        }
        if (best < 0) return -1;
        s->slot_of[s->slot[best].block] = -1;
    }
    s->slot[best] = (struct slot){.block = block, .state = SLOT_QUEUED, .last = -1, .kept = -1};
    s->slot_of[block] = best;
    return best;
}

#endif

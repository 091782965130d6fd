/* A thread's scratch memory, which an op takes piece by piece.
 *
 * Every op declares how much a call takes: the sum of repkv_piece() over its pieces. With REPKV_DEBUG the process ends if a
 * call takes more than that, or more than there is, and AddressSanitizer finds reads and writes beside a piece. */
#ifndef REPKV_SCRATCH_H
#define REPKV_SCRATCH_H

#include <stddef.h>

#ifdef REPKV_DEBUG
#include <stdio.h>
#include <stdlib.h>
#endif
#if defined(REPKV_DEBUG) && defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

enum {
#ifdef REPKV_DEBUG
    REPKV_PIECE_GAP = 64,
#else
    REPKV_PIECE_GAP = 0,
#endif
};

struct repkv_scratch {
    char *next, *end;
};

/* Returns the bytes of a piece of n numbers; pieces begin at multiples of 64. */
static inline size_t repkv_piece(size_t n) {
    return (n * sizeof(float) + 63) / 64 * 64 + REPKV_PIECE_GAP;
}

/* Returns the scratch of a call that takes n_bytes, of `size` at `data`. */
static inline struct repkv_scratch repkv_scratch_begin(char *data, size_t size, size_t n_bytes) {
#ifdef REPKV_DEBUG
    if (n_bytes > size) {
        fprintf(stderr, "an op takes %zu bytes of scratch, and there are %zu\n", n_bytes, size);
        abort();
    }
#endif
#if defined(REPKV_DEBUG) && defined(__SANITIZE_ADDRESS__)
    ASAN_POISON_MEMORY_REGION(data, size);
#endif
    (void)size;
    return (struct repkv_scratch){data, data + n_bytes};
}

/* Returns the next n numbers. */
static inline float *repkv_take(struct repkv_scratch *s, size_t n) {
    float *piece = (float *)s->next;
    s->next += repkv_piece(n);
#ifdef REPKV_DEBUG
    if (s->next > s->end) {
        fprintf(stderr, "an op takes %td bytes of scratch more than it said\n", s->next - s->end);
        abort();
    }
#endif
#if defined(REPKV_DEBUG) && defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(piece, n * sizeof(float));
#endif
    return piece;
}

#endif

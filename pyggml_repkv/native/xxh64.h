/* XXH64 (Yann Collet's xxHash, 64 bits), written from its specification: the checksum of records on disk. */
#ifndef REPKV_XXH64_H
#define REPKV_XXH64_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "files hold little-endian numbers"
#endif

static const uint64_t XXH_P1 = 0x9E3779B185EBCA87u, XXH_P2 = 0xC2B2AE3D27D4EB4Fu, XXH_P3 = 0x165667B19E3779F9u,
                      XXH_P4 = 0x85EBCA77C2B2AE63u, XXH_P5 = 0x27D4EB2F165667C5u;

static inline uint64_t xxh_rotate(uint64_t x, int bits) {
    return x << bits | x >> (64 - bits);
}

static inline uint64_t xxh_read(const unsigned char *p, size_t n) {
    uint64_t x = 0;
    memcpy(&x, p, n);
    return x;
}

static inline uint64_t xxh_round(uint64_t lane, uint64_t input) {
    return xxh_rotate(lane + input * XXH_P2, 31) * XXH_P1;
}

static inline uint64_t xxh64(const void *data, size_t n, uint64_t seed) {
    const unsigned char *p = data, *end = p + n;
    uint64_t h = seed + XXH_P5;
    if (n >= 32) {
        uint64_t lane[4] = {seed + XXH_P1 + XXH_P2, seed + XXH_P2, seed, seed - XXH_P1};
        for (; end - p >= 32; p += 32) {
            for (int i = 0; i < 4; i++) lane[i] = xxh_round(lane[i], xxh_read(p + 8 * i, 8));
        }
        h = xxh_rotate(lane[0], 1) + xxh_rotate(lane[1], 7) + xxh_rotate(lane[2], 12) + xxh_rotate(lane[3], 18);
        for (int i = 0; i < 4; i++) h = (h ^ xxh_round(0, lane[i])) * XXH_P1 + XXH_P4;
    }
    h += n;
    for (; end - p >= 8; p += 8) h = xxh_rotate(h ^ xxh_round(0, xxh_read(p, 8)), 27) * XXH_P1 + XXH_P4;
    if (end - p >= 4) {
        h = xxh_rotate(h ^ xxh_read(p, 4) * XXH_P1, 23) * XXH_P2 + XXH_P3;
        p += 4;
    }
    for (; p < end; p++) h = xxh_rotate(h ^ *p * XXH_P5, 11) * XXH_P1;
    h = (h ^ h >> 33) * XXH_P2;
    h = (h ^ h >> 29) * XXH_P3;
    return h ^ h >> 32;
}

#endif

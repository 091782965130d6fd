/* Files as memory, at addresses that are in use: what a fork of a session shares. */
#ifndef REPKV_MAP_H
#define REPKV_MAP_H

#include <stddef.h>
#include <stdint.h>

/* Puts n_bytes of a file from `offset` on where `at` is, instead of what was mapped there; all are multiples of the page size.
 * What is written there is seen nowhere else. 0, or -1 with errno. */
int repkv_map_private(char *at, size_t n_bytes, int fd, int64_t offset);

#endif

/* Maps files at addresses that are in use: the memory that forks of a session share. */
#ifndef REPKV_MAP_H
#define REPKV_MAP_H

#include <stddef.h>
#include <stdint.h>

/* Maps n_bytes of a file, from `offset` on, at `at` in place of the present mapping; all are multiples of the page size.
 * Writes there stay private to this mapping. Returns 0, or -1 with errno. */
int repkv_map_private(char *at, size_t n_bytes, int fd, int64_t offset);

#endif

/* Mapped files: at addresses that are in use, which forks of a session share; and what ends a process when one is lost. */
#ifndef REPKV_MAP_H
#define REPKV_MAP_H

#include <stddef.h>
#include <stdint.h>

/* Maps n_bytes of a file, from `offset` on, at `at` in place of the present mapping; all are multiples of the page size.
 * Writes there stay private to this mapping. Returns 0, or -1 with errno. */
int repkv_map_private(char *at, size_t n_bytes, int fd, int64_t offset);

/* From now on a fault (SIGBUS) in these n_bytes at `begin` writes `line`, which must live as long, to stderr and ends the
 * process with exit code 1. Other faults go where they went before. Any thread may call; returns a number for
 * repkv_unwatch_map, or -1 when too many are watched. */
int repkv_watch_map(const void *begin, size_t n_bytes, const char *line);
void repkv_unwatch_map(int slot);

#endif

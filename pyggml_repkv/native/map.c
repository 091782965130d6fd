#include "map.h"

#include <sys/mman.h>

int repkv_map(char *at, size_t n_bytes, int fd, int64_t offset, int shared) {
    const int flags = MAP_FIXED | MAP_NORESERVE | (shared ? MAP_SHARED : MAP_PRIVATE);
    void *found = mmap(at, n_bytes, PROT_READ | PROT_WRITE, flags, fd, offset);
    if (found == MAP_FAILED) return -1;
    /* Of many arenas that are used from their start, each would take a huge page at its first row. */
    madvise(at, n_bytes, MADV_NOHUGEPAGE);
    return 0;
}

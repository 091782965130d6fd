#include "map.h"

#include <sys/mman.h>

int repkv_map_private(char *at, size_t n_bytes, int fd, int64_t offset) {
    void *found = mmap(at, n_bytes, PROT_READ | PROT_WRITE, MAP_FIXED | MAP_NORESERVE | MAP_PRIVATE, fd, offset);
    return found == MAP_FAILED ? -1 : 0;
}
